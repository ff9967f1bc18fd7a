/* Root-mean-square normalisation of rows. The formula stands in cpu_rms_norm.py. */

#include <math.h>

#include "floats.h"

#define WORTH_THREADS 65536 /* numbers */

typedef struct {
    int64_t width;
    const float *weight;
    float epsilon;
    int32_t rounds_twice;
} Norm;

/* Each row's sum is made in one order, whatever the rows beside it. */
#define DEFINE(T)                                                                                 \
    FOR_EACH_CPU static void row_##T(const Norm *norm, const T *restrict x, T *restrict y) {      \
        int64_t width = norm->width;                                                              \
        const float *weight = norm->weight;                                                       \
        float sum = 0;                                                                            \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < width; i++)                \
            sum += widen_##T(x[i]) * widen_##T(x[i]);                                             \
        float inverse = 1 / sqrtf(sum / width + norm->epsilon);                                   \
        if (norm->rounds_twice)                                                                   \
            _Pragma("omp simd") for (int64_t i = 0; i < width; i++)                               \
                y[i] = narrow_##T(weight[i] * widen_##T(narrow_##T(widen_##T(x[i]) * inverse)));  \
        else                                                                                      \
            _Pragma("omp simd") for (int64_t i = 0; i < width; i++)                               \
                y[i] = narrow_##T(weight[i] * (widen_##T(x[i]) * inverse));                       \
    }                                                                                             \
    void loraplex_rms_norm_##T(const Norm *norm, const T *x, T *y, int64_t num_rows, int num_threads) { \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1 && num_rows * norm->width >= WORTH_THREADS)") { \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            for (int64_t row = num_rows * me / all; row < num_rows * (me + 1) / all; row++)       \
                row_##T(norm, x + row * norm->width, y + row * norm->width);                      \
        }                                                                                         \
    }

DEFINE(float)
DEFINE(bfloat16)
