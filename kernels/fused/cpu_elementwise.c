/* Sums and products of numbers in pairs, and rows that are picked. The formulas stand in cpu_elementwise.py. */

#include "floats.h"

#define WORTH_THREADS 65536 /* numbers */

#define DEFINE_OPERATION(name, sign, T)                                                           \
    FOR_EACH_CPU static void name##_some_##T(const T *a, const T *b, T *y, int64_t first, int64_t last) { \
        _Pragma("omp simd") for (int64_t i = first; i < last; i++)                                \
            y[i] = narrow_##T(widen_##T(a[i]) sign widen_##T(b[i]));                              \
    }                                                                                             \
    void loraplex_##name##_##T(const T *a, const T *b, T *y, int64_t count, int num_threads) {    \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1 && count >= WORTH_THREADS)") { \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            name##_some_##T(a, b, y, count * me / all, count * (me + 1) / all);                   \
        }                                                                                         \
    }

DEFINE_OPERATION(add, +, float)
DEFINE_OPERATION(add, +, bfloat16)
DEFINE_OPERATION(multiply, *, float)
DEFINE_OPERATION(multiply, *, bfloat16)

/* Rows of `width` bytes; those below 0 count from the end, and of what is not in the table all bits are set. */
void loraplex_pick_rows(const char *table, int64_t table_rows, const int64_t *rows, char *y, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        int64_t row = rows[i] < 0 ? rows[i] + table_rows : rows[i];
        if (row >= 0 && row < table_rows) memcpy(y + i * width, table + row * width, width);
        else memset(y + i * width, 0xff, width);
    }
}
