/* Adds many adapters' LoRA to one linear layer's output, for steps of few tokens. The formula stands in grouped.py.

   Each adapter's bytes are read once for every TOKENS of its tokens, where they lie; sums are made in float32 and
   rounded once. */

#include "floats.h"

#define TOKENS 4    /* tokens of one adapter that share a pass over its A */
#define COLUMNS 256 /* of the output, summed up at a time */
#define ALIGNED 32  /* columns: the border between two threads' shares */

/* What the active adapters do to every module: entry [module * num_adapters + adapter]; rank 0: nothing. */
typedef struct {
    int64_t num_adapters;
    const int64_t *in, *out; /* by module */
    const uint64_t *a, *b;   /* addresses: A is [rank, in], B transposed [rank, out] */
    const int32_t *rank;
    const float *scale;
} Table;

/* Whose tokens a step has: group g are the rows token[begin[g]] ... token[begin[g + 1] - 1] of x and y. */
typedef struct {
    int32_t num_groups, num_threads, max_rank;
    const int32_t *adapter, *begin, *token;
    const float *weight; /* by place in `token`: multiplies the adapter's scale */
    float *x, *h;        /* scratch: [tokens, in] and [tokens, max_rank] */
} Step;

/* h[k * stride] = sum_i a[i] * x[k][i] for k < TOKENS */
#define DEFINE_SHRINK(T)                                                                          \
    FOR_EACH_CPU static void shrink_##T(const T *restrict a, const float *const *x, int64_t in,   \
                                        float *restrict h, int64_t stride, int num_tokens) {      \
        const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];                               \
        float sums[TOKENS] = {0, 0, 0, 0};                                                        \
        for (int64_t i = 0; i < in; i += LINE / sizeof(T)) READ_AHEAD(a + in + i);                \
        if (num_tokens == 1) {                                                                    \
            float s0 = 0;                                                                         \
            _Pragma("omp simd reduction(+ : s0)") for (int64_t i = 0; i < in; i++)                \
                s0 += widen_##T(a[i]) * x0[i];                                                    \
            sums[0] = s0;                                                                         \
        } else {                                                                                  \
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                 \
            _Pragma("omp simd reduction(+ : s0, s1, s2, s3)") for (int64_t i = 0; i < in; i++) {  \
                float wide = widen_##T(a[i]);                                                     \
                s0 += wide * x0[i], s1 += wide * x1[i], s2 += wide * x2[i], s3 += wide * x3[i];   \
            }                                                                                     \
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;                               \
        }                                                                                         \
        for (int k = 0; k < num_tokens; k++) h[k * stride] = sums[k];                             \
    }

/* y[c] += scale * sum_j h[j] * b[j * out + c] for c < width <= COLUMNS */
#define DEFINE_EXPAND(T)                                                                          \
    FOR_EACH_CPU static void expand_##T(const T *restrict b, int64_t out, int64_t width,          \
                                        const float *restrict h, int rank, float scale,           \
                                        T *restrict y) {                                          \
        float sums[COLUMNS];                                                                      \
        memset(sums, 0, sizeof sums);                                                             \
        int j = 0;                                                                                \
        for (; j + 4 <= rank; j += 4, b += 4 * out) {                                             \
            float h0 = h[j], h1 = h[j + 1], h2 = h[j + 2], h3 = h[j + 3];                         \
            for (int64_t c = 0; c < width; c += LINE / sizeof(T))                                 \
                for (int next = 4; next < 8; next++) READ_AHEAD(b + next * out + c);              \
            _Pragma("omp simd") for (int64_t c = 0; c < width; c++)                               \
                sums[c] += h0 * widen_##T(b[c]) + h1 * widen_##T(b[out + c]) +                    \
                           h2 * widen_##T(b[2 * out + c]) + h3 * widen_##T(b[3 * out + c]);       \
        }                                                                                         \
        for (; j < rank; j++, b += out) {                                                         \
            float h0 = h[j];                                                                      \
            _Pragma("omp simd") for (int64_t c = 0; c < width; c++) sums[c] += h0 * widen_##T(b[c]); \
        }                                                                                         \
        _Pragma("omp simd") for (int64_t c = 0; c < width; c++)                                   \
            y[c] = narrow_##T(widen_##T(y[c]) + scale * sums[c]);                                 \
    }

/* One thread's part of each of the three passes; the caller keeps them apart. */
#define DEFINE_PASSES(T)                                                                          \
    static void widen_tokens_##T(const Step *s, const T *x, int64_t in, int me, int all) {        \
        for (int k = me; k < s->begin[s->num_groups]; k += all) {                                 \
            const T *row = x + s->token[k] * in;                                                  \
            float *wide = s->x + k * in;                                                          \
            for (int64_t i = 0; i < in; i++) wide[i] = widen_##T(row[i]);                         \
        }                                                                                         \
    }                                                                                             \
    static void shrink_tokens_##T(const Table *t, int64_t entry, const Step *s, int64_t in,       \
                                  int me, int all) {                                              \
        int row = 0;                                                                              \
        for (int g = 0; g < s->num_groups; g++) {                                                 \
            const T *a = (const T *)(uintptr_t)t->a[entry + s->adapter[g]];                       \
            int rank = t->rank[entry + s->adapter[g]], end = s->begin[g + 1];                     \
            for (int j = 0; j < rank; j++) {                                                      \
                if ((row++ / 4) % all != me) continue;                                            \
                for (int k = s->begin[g]; k < end; k += TOKENS) {                                 \
                    int n = end - k < TOKENS ? end - k : TOKENS;                                  \
                    const float *rows[TOKENS];                                                    \
                    for (int i = 0; i < TOKENS; i++) rows[i] = s->x + (k + (i < n ? i : 0)) * in; \
                    shrink_##T(a + j * in, rows, in, s->h + (int64_t)k * s->max_rank + j,         \
                               s->max_rank, n);                                                   \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
    static void expand_tokens_##T(const Table *t, int64_t entry, const Step *s, int64_t out,      \
                                  T *y, int me, int all) {                                        \
        int64_t share = ((out + all - 1) / all + ALIGNED - 1) / ALIGNED * ALIGNED;                \
        int64_t first = me * share, last = first + share < out ? first + share : out;             \
        for (int g = 0; g < s->num_groups; g++) {                                                 \
            const T *b = (const T *)(uintptr_t)t->b[entry + s->adapter[g]];                       \
            int rank = t->rank[entry + s->adapter[g]];                                            \
            if (!rank) continue;                                                                  \
            for (int64_t c = first; c < last; c += COLUMNS) {                                     \
                int64_t width = last - c < COLUMNS ? last - c : COLUMNS;                          \
                for (int k = s->begin[g]; k < s->begin[g + 1]; k++)                               \
                    expand_##T(b + c, out, width, s->h + (int64_t)k * s->max_rank, rank,          \
                               t->scale[entry + s->adapter[g]] * s->weight[k],                    \
                               y + s->token[k] * out + c);                                        \
            }                                                                                     \
        }                                                                                         \
    }

#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_lora_decode_##T(const Table *t, int64_t module, const Step *s, const T *x, T *y) { \
        int64_t entry = module * t->num_adapters, in = t->in[module], out = t->out[module];       \
        _Pragma("omp parallel num_threads(s->num_threads) if (s->num_threads > 1)") {             \
            int me = omp_get_thread_num(), all = omp_get_num_threads();                           \
            widen_tokens_##T(s, x, in, me, all);                                                  \
            _Pragma("omp barrier");                                                               \
            shrink_tokens_##T(t, entry, s, in, me, all);                                          \
            _Pragma("omp barrier");                                                               \
            expand_tokens_##T(t, entry, s, out, y, me, all);                                      \
        }                                                                                         \
    }

#define DEFINE(T) DEFINE_SHRINK(T) DEFINE_EXPAND(T) DEFINE_PASSES(T) DEFINE_ENTRY(T)

DEFINE(float)
DEFINE(bfloat16)
