/* Products of rows of weights and rows of inputs, in float32: the heart of a linear layer and of LoRA's A.

   Weights are read as they lie, once for every TOKENS_A_PASS tokens, and widened where they are used, or multiplied as
   they are where the CPU can (`pairs.h`). A tile of TILE outputs and DEPTH inputs stays in the cache while all tokens
   of the pass meet it. Each sum is made in the same order whatever the tokens beside it. */

#ifndef LORAPLEX_TILE_H
#define LORAPLEX_TILE_H

#include "floats.h"

#define TILE 24          /* outputs; a multiple of OUTPUTS and of OUTPUTS_ALONE */
#define DEPTH 2048       /* inputs */
#define TOKENS_A_PASS 64
#define OUTPUTS 3        /* by TOKENS: sums held in registers, which are sixteen of eight floats in AVX2 */
#define TOKENS 4
#define OUTPUTS_ALONE 8  /* the same for a single token: several rows of weights are on their way at a time */
#define WORTH_WIDENING 8 /* tokens, beyond which a tile is widened once for all of them */

/* The rows of weights that come next are asked for while these are computed: each begins on a page of its own, where
   the CPU's own guess would begin anew. */

/* sums[t * TILE + o] += sum of w[o * w_stride + i] * x[t * x_stride + i] over i < depth, for o < outputs, t < tokens,
   which are constants where it is called. */
#define DEFINE_DOT(T)                                                                             \
    INLINED void dot_##T(const T *w, int64_t w_stride, const float *x, int64_t x_stride,          \
                         int64_t depth, float *sums, int outputs, int tokens) {                   \
        Lanes lanes[OUTPUTS_ALONE][TOKENS];                                                       \
        UNROLLED for (int o = 0; o < outputs; o++)                                                \
            UNROLLED for (int t = 0; t < tokens; t++) lanes[o][t] = (Lanes){0};                   \
        int64_t whole = depth / LANES * LANES;                                                    \
        for (int64_t i = 0; i < whole; i += LANES) {                                              \
            Lanes weights[OUTPUTS_ALONE];                                                         \
            UNROLLED for (int o = 0; o < outputs; o++) {                                          \
                weights[o] = LOAD_##T(w + o * w_stride + i);                                      \
                if (i * sizeof(T) % LINE == 0) READ_AHEAD(w + (o + outputs) * w_stride + i);      \
            }                                                                                     \
            UNROLLED for (int t = 0; t < tokens; t++) {                                           \
                Lanes input = LOAD_float(x + t * x_stride + i);                                   \
                UNROLLED for (int o = 0; o < outputs; o++) lanes[o][t] += weights[o] * input;     \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int o = 0; o < outputs; o++) UNROLLED for (int t = 0; t < tokens; t++) {    \
            float sum = SUM(lanes[o][t]);                                                         \
            for (int64_t i = whole; i < depth; i++)                                               \
                sum += widen_##T(w[o * w_stride + i]) * x[t * x_stride + i];                      \
            sums[t * TILE + o] += sum;                                                            \
        }                                                                                         \
    }

/* As dot, for any number of outputs <= OUTPUTS and tokens <= TOKENS. */
#define DEFINE_DOTS(T)                                                                            \
    INLINED void dots_of_##T(const T *w, int64_t w_stride, const float *x, int64_t x_stride,      \
                             int64_t depth, float *sums, int outputs, int tokens) {               \
        if (tokens == 4) dot_##T(w, w_stride, x, x_stride, depth, sums, outputs, 4);              \
        else if (tokens == 3) dot_##T(w, w_stride, x, x_stride, depth, sums, outputs, 3);         \
        else if (tokens == 2) dot_##T(w, w_stride, x, x_stride, depth, sums, outputs, 2);         \
        else dot_##T(w, w_stride, x, x_stride, depth, sums, outputs, 1);                          \
    }                                                                                             \
    INLINED void dots_##T(const T *w, int64_t w_stride, const float *x, int64_t x_stride,         \
                          int64_t depth, float *sums, int outputs, int tokens) {                  \
        if (outputs == 3) dots_of_##T(w, w_stride, x, x_stride, depth, sums, 3, tokens);          \
        else if (outputs == 2) dots_of_##T(w, w_stride, x, x_stride, depth, sums, 2, tokens);     \
        else dots_of_##T(w, w_stride, x, x_stride, depth, sums, 1, tokens);                       \
    }

/* sums[t * TILE + o] += w[o]·x[t], all of them of `in` numbers. `wide` holds a tile, or is NULL: nothing is widened ahead. */
#define DEFINE_TILE(T)                                                                            \
    INLINED void alone_##T(const T *w, int64_t in, const float *x, int64_t depth, float *sums,    \
                           int outputs) {                                                         \
        int o = 0;                                                                                \
        for (; o + OUTPUTS_ALONE <= outputs; o += OUTPUTS_ALONE)                                  \
            dot_##T(w + o * in, in, x, in, depth, sums + o, OUTPUTS_ALONE, 1);                    \
        for (; o < outputs; o++) dot_##T(w + o * in, in, x, in, depth, sums + o, 1, 1);           \
    }                                                                                             \
    FOR_EACH_CPU static void tile_##T(const T *w, const float *x, int64_t in, int outputs,        \
                                      int tokens, float *sums, float *wide) {                     \
        for (int64_t begin = 0; begin < in; begin += DEPTH, w += DEPTH, x += DEPTH) {             \
            int64_t depth = in - begin < DEPTH ? in - begin : DEPTH;                              \
            if (tokens == 1) {                                                                    \
                alone_##T(w, in, x, depth, sums, outputs);                                        \
                continue;                                                                         \
            }                                                                                     \
            int widens = wide && sizeof(T) < sizeof(float) && tokens > WORTH_WIDENING;                    \
            for (int o = 0; widens && o < outputs; o++)                                           \
                for (int64_t i = 0; i < depth; i++) wide[o * DEPTH + i] = widen_##T(w[o * in + i]); \
            for (int t = 0; t < tokens; t += TOKENS)                                              \
                for (int o = 0; o < outputs; o += OUTPUTS) {                                      \
                    int n = tokens - t < TOKENS ? tokens - t : TOKENS;                            \
                    int m = outputs - o < OUTPUTS ? outputs - o : OUTPUTS;                        \
                    float *some = sums + t * TILE + o;                                            \
                    if (widens)                                                                   \
                        dots_float(wide + o * DEPTH, DEPTH, x + t * in, in, depth, some, m, n);   \
                    else                                                                          \
                        dots_##T(w + o * in, in, x + t * in, in, depth, some, m, n);              \
                }                                                                                 \
        }                                                                                         \
    }

DEFINE_DOT(float) DEFINE_DOTS(float) DEFINE_TILE(float)
DEFINE_DOT(bfloat16) DEFINE_DOTS(bfloat16) DEFINE_TILE(bfloat16)

#include "pairs.h"

int loraplex_pairs = -1; /* whether pairs are multiplied: -1 not asked yet */

static int takes_pairs(void) {
    if (loraplex_pairs < 0) loraplex_pairs = multiplies_pairs();
    return loraplex_pairs;
}

#endif
