/* Draws one token from each row of logits. The formula stands in cpu_draw.py.

   A filter keeps the logits that reach a threshold, which is found exactly: by what is counted, or weighs, in each of
   2048 ranges of numbers, then in 2048 parts of the range where enough is reached, then in 1024 parts of that. */

#include <math.h>

#include "exponential.h"

#define WORTH_THREADS 65536 /* numbers */
#define RANGES 2048
#define BLOCK 1024 /* tokens whose weights are added up together */

typedef struct {
    double draw; /* in [0, 1) */
    float temperature, top_p, min_p;
    int32_t top_k;
} Draw;

typedef struct {
    int64_t width;
    const Draw *draws; /* of each row */
    float *weights;    /* scratch: [threads, width] */
    double *sums;      /* scratch: [threads, width / BLOCK rounded up] */
} Draws;

/* Numbers in the order of unsigned words, and back. Infinities have their places, NaN has none. */
INLINED uint32_t word_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

static float number_of(uint32_t word) {
    uint32_t bits = word >> 31 ? word & 0x7fffffff : ~word;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The largest threshold >= `least` whose logits, those >= it, weigh `wanted` or more, and something; each weighs 1 where
   `weights` is NULL. `least` where even all of them do not. */
#define DEFINE_THRESHOLD(T)                                                                       \
    static float threshold_##T(const T *logits, const float *weights, int64_t width, float least, double wanted) { \
        static const int shifts[4] = {32, 21, 10, 0};                                             \
        uint32_t found = 0, lowest = word_of(least);                                              \
        double above = 0; /* what the ranges above weigh */                                       \
        for (int pass = 0; pass < 3; pass++) {                                                    \
            double sums[RANGES] = {0};                                                            \
            int shift = shifts[pass + 1], ranges = 1 << (shifts[pass] - shift), range = ranges - 1; \
            for (int64_t i = 0; i < width; i++) {                                                 \
                uint32_t word = word_of(widen_##T(logits[i]));                                    \
                if ((pass && word >> shifts[pass] != found) || word < lowest) continue;           \
                sums[word >> shift & (ranges - 1)] += weights ? weights[i] : 1;                   \
            }                                                                                     \
            while (range && (!sums[range] || above + sums[range] < wanted)) above += sums[range--]; \
            found = pass ? found << (shifts[pass] - shift) | range : (uint32_t)range;             \
        }                                                                                         \
        return number_of(found > lowest ? found : lowest);                                        \
    }

/* The largest logit; NaN where there is any. */
#define DEFINE_LARGEST(T)                                                                         \
    FOR_EACH_CPU static float largest_##T(const T *logits, int64_t width) {                       \
        float most = -INFINITY;                                                                   \
        int is_nan = 0;                                                                           \
        _Pragma("omp simd reduction(max : most) reduction(| : is_nan)") for (int64_t i = 0; i < width; i++) { \
            float x = widen_##T(logits[i]);                                                       \
            is_nan |= x != x;                                                                     \
            most = x > most ? x : most;                                                           \
        }                                                                                         \
        return is_nan ? NAN : most;                                                               \
    }

/* The first token whose logit is that; the last where there is none. */
#define DEFINE_FIND(T)                                                                            \
    FOR_EACH_CPU static int64_t find_##T(const T *logits, int64_t width, float wanted) {          \
        int64_t i = 0;                                                                            \
        for (int is_here = 0; i + BLOCK < width; i += BLOCK) {                                    \
            _Pragma("omp simd reduction(| : is_here)") for (int64_t j = i; j < i + BLOCK; j++)    \
                is_here |= widen_##T(logits[j]) == wanted;                                        \
            if (is_here) break;                                                                   \
        }                                                                                         \
        while (i < width - 1 && widen_##T(logits[i]) != wanted) i++;                              \
        return i;                                                                                 \
    }

/* weights[i] = e^((logits[i] - most) / temperature), 0 where that is less than e^-87. */
#define DEFINE_WEIGH(T)                                                                           \
    FOR_EACH_CPU static void weigh_##T(const T *logits, int64_t width, float most, float temperature, float *weights) { \
        float inverse = 1 / temperature;                                                          \
        _Pragma("omp simd") for (int64_t i = 0; i < width; i++) {                                 \
            float x = (widen_##T(logits[i]) - most) * inverse, weight = exponential(x);           \
            weights[i] = x < -87 ? 0 : weight;                                                    \
        }                                                                                         \
    }

/* Leaves those that reach both thresholds; the others become 0. Result: the sum, also of each block. */
#define DEFINE_KEEP(T)                                                                            \
    FOR_EACH_CPU static double keep_##T(const T *logits, int64_t width, float threshold, float least, float *weights, \
                                        double *sums) {                                           \
        double total = 0;                                                                         \
        for (int64_t begin = 0; begin < width; begin += BLOCK) {                                  \
            int64_t end = begin + BLOCK < width ? begin + BLOCK : width;                          \
            double sum = 0;                                                                       \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = begin; i < end; i++) {        \
                float weight = widen_##T(logits[i]) >= threshold ? weights[i] : 0;                \
                weight = weight >= least ? weight : 0;                                            \
                weights[i] = weight;                                                              \
                sum += weight;                                                                    \
            }                                                                                     \
            total += sums[begin / BLOCK] = sum;                                                   \
        }                                                                                         \
        return total;                                                                             \
    }

/* The first token up to which more than `target` is weighed; the last that weighs anything where rounding leaves none. */
static int64_t meet(const float *weights, int64_t width, const double *sums, double target) {
    int64_t i = 0;
    double done = 0;
    for (; i + BLOCK < width && done + sums[i / BLOCK] <= target; i += BLOCK) done += sums[i / BLOCK];
    for (; i < width; i++) {
        done += weights[i];
        if (weights[i] > 0 && done > target) return i;
    }
    for (i = width - 1; i && !(weights[i] > 0); i--) {}
    return i;
}

#define DEFINE(T)                                                                                 \
    DEFINE_THRESHOLD(T) DEFINE_LARGEST(T) DEFINE_FIND(T) DEFINE_WEIGH(T) DEFINE_KEEP(T)           \
    static int64_t draw_##T(Draw d, const T *logits, int64_t width, float most, float *weights, double *sums) { \
        float threshold = -INFINITY;                                                              \
        if (!isfinite(1 / d.temperature) || !isfinite(most)) return find_##T(logits, width, most); \
        weigh_##T(logits, width, most, d.temperature, weights);                                   \
        if (d.top_k > 0 && d.top_k < width)                                                       \
            threshold = threshold_##T(logits, NULL, width, threshold, d.top_k);                   \
        double total = keep_##T(logits, width, threshold, 0, weights, sums);                      \
        if (d.top_p < 1)                                                                          \
            threshold = threshold_##T(logits, weights, width, threshold, d.top_p * total);        \
        if (d.top_p < 1 || d.min_p > 0)                                                           \
            total = keep_##T(logits, width, threshold, d.min_p, weights, sums);                   \
        return meet(weights, width, sums, d.draw * total);                                        \
    }                                                                                             \
    void loraplex_draw_##T(const Draws *d, const T *logits, float *largest, int64_t *tokens, int64_t num_rows, \
                           int num_threads) {                                                     \
        int64_t width = d->width, blocks = (width + BLOCK - 1) / BLOCK;                           \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1 && num_rows * width >= WORTH_THREADS)") { \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            for (int64_t row = num_rows * me / all; row < num_rows * (me + 1) / all; row++) {     \
                const T *own = logits + row * width;                                              \
                largest[row] = largest_##T(own, width);                                           \
                tokens[row] = draw_##T(d->draws[row], own, width, largest[row], d->weights + me * width, \
                                       d->sums + me * blocks);                                    \
            }                                                                                     \
        }                                                                                         \
    }

const int64_t loraplex_draw_block = BLOCK;

DEFINE(float)
DEFINE(bfloat16)
