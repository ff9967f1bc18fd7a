/* Products of rows of weights and rows of inputs, in float32: the heart of a linear layer and of LoRA's A.

   Weights are read as they lie, once for every TOKENS_A_PASS tokens, and widened where they are used, or multiplied as
   they are where the CPU can (`pairs.h`). A tile of TILE outputs and DEPTH inputs stays in the cache while all tokens
   of the pass meet it. Each sum is made in the same order whatever the tokens beside it. */

#ifndef LORAPLEX_TILE_H
#define LORAPLEX_TILE_H

#include "width.h"

#define TILE 24          /* outputs; a multiple of OUTPUTS and of OUTPUTS_ALONE */
#define DEPTH 2048       /* inputs */
#define TOKENS_A_PASS 64
#define OUTPUTS_Lanes 3  /* by TOKENS: sums held in registers, which are sixteen of eight floats in AVX2 */
#define TOKENS_Lanes 4
#define OUTPUTS_Broad 4  /* the same of thirty-two of sixteen floats */
#define TOKENS_Broad 6
#define OUTPUTS_ALONE 8  /* the same for a single token: several rows of weights are on their way at a time */
#define WORTH_WIDENING 8 /* tokens, beyond which a tile is widened once for all of them */

#include "fold.h"

/* The rows of weights that come next are asked for while these are computed: each begins on a page of its own, where
   the CPU's own guess would begin anew. */

/* sums[t * TILE + o] += sum of w[o * w_stride + i] * x[t * x_stride + i] over i < depth, for o < outputs, t < tokens,
   which are constants where it is called, in vectors of type V. */
#define DEFINE_DOT(T, V)                                                                          \
    FOR_##V INLINED void dot_##T##_##V(const T *w, int64_t w_stride, const float *x, int64_t x_stride, \
                                       int64_t depth, float *sums, int outputs, int tokens) {     \
        const int size = sizeof(V) / sizeof(float);                                               \
        V lanes[OUTPUTS_ALONE][TOKENS_##V];                                                       \
        UNROLLED for (int o = 0; o < OUTPUTS_ALONE; o++)                                          \
            UNROLLED for (int t = 0; t < tokens; t++) lanes[o][t] = (V){0};                       \
        int64_t whole = depth / size * size;                                                      \
        for (int64_t i = 0; i < whole; i += size) {                                               \
            V weights[OUTPUTS_ALONE];                                                             \
            UNROLLED for (int o = 0; o < outputs; o++) {                                          \
                weights[o] = LOAD_##T##_##V(w + o * w_stride + i);                                \
                if (i * sizeof(T) % LINE == 0) READ_AHEAD(w + (o + outputs) * w_stride + i);      \
            }                                                                                     \
            UNROLLED for (int t = 0; t < tokens; t++) {                                           \
                V input = LOAD_float_##V(x + t * x_stride + i);                                   \
                UNROLLED for (int o = 0; o < outputs; o++) lanes[o][t] += weights[o] * input;     \
            }                                                                                     \
        }                                                                                         \
        add_lanes_##V(lanes, sums, outputs, tokens);                                              \
        for (int64_t i = whole; i < depth; i++)                                                   \
            for (int o = 0; o < outputs; o++)                                                     \
                for (int t = 0; t < tokens; t++)                                                  \
                    sums[t * TILE + o] += widen_##T(w[o * w_stride + i]) * x[t * x_stride + i];   \
    }

/* As dot, for any number of outputs <= OUTPUTS and tokens <= TOKENS. */
#define DEFINE_DOTS(T, V)                                                                         \
    FOR_##V INLINED void dots_of_##T##_##V(const T *w, int64_t w_stride, const float *x, int64_t x_stride, \
                                           int64_t depth, float *sums, int outputs, int tokens) { \
        if (tokens == 6 && TOKENS_##V >= 6) dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 6); \
        else if (tokens == 5 && TOKENS_##V >= 5) dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 5); \
        else if (tokens == 4) dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 4);   \
        else if (tokens == 3) dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 3);   \
        else if (tokens == 2) dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 2);   \
        else dot_##T##_##V(w, w_stride, x, x_stride, depth, sums, outputs, 1);                    \
    }                                                                                             \
    FOR_##V INLINED void dots_##T##_##V(const T *w, int64_t w_stride, const float *x, int64_t x_stride, \
                                        int64_t depth, float *sums, int outputs, int tokens) {    \
        if (outputs == 4) dots_of_##T##_##V(w, w_stride, x, x_stride, depth, sums, 4, tokens);    \
        else if (outputs == 3) dots_of_##T##_##V(w, w_stride, x, x_stride, depth, sums, 3, tokens); \
        else if (outputs == 2) dots_of_##T##_##V(w, w_stride, x, x_stride, depth, sums, 2, tokens); \
        else dots_of_##T##_##V(w, w_stride, x, x_stride, depth, sums, 1, tokens);                 \
    }

/* sums[t * TILE + o] += w[o]·x[t], all of them of `in` numbers. `wide` holds a tile, or is NULL: nothing is widened ahead.
   Tokens are shared out evenly between the passes over a tile's rows. */
#define DEFINE_TILE(T, V, FOR_CPU)                                                                \
    FOR_##V INLINED void alone_##T##_##V(const T *w, int64_t in, const float *x, int64_t depth,   \
                                         float *sums, int outputs) {                              \
        int o = 0;                                                                                \
        for (; o + OUTPUTS_ALONE <= outputs; o += OUTPUTS_ALONE)                                  \
            dot_##T##_##V(w + o * in, in, x, in, depth, sums + o, OUTPUTS_ALONE, 1);              \
        for (; o < outputs; o += OUTPUTS_##V) {                                                   \
            int m = outputs - o < OUTPUTS_##V ? outputs - o : OUTPUTS_##V;                        \
            dots_##T##_##V(w + o * in, in, x, in, depth, sums + o, m, 1);                         \
        }                                                                                         \
    }                                                                                             \
    FOR_CPU static void tile_##T##_##V(const T *w, const float *x, int64_t in, int outputs,       \
                                       int tokens, float *sums, float *wide) {                    \
        int passes = (tokens + TOKENS_##V - 1) / TOKENS_##V;                                      \
        for (int64_t begin = 0; begin < in; begin += DEPTH, w += DEPTH, x += DEPTH) {             \
            int64_t depth = in - begin < DEPTH ? in - begin : DEPTH;                              \
            if (tokens == 1) {                                                                    \
                alone_##T##_##V(w, in, x, depth, sums, outputs);                                  \
                continue;                                                                         \
            }                                                                                     \
            int widens = wide && sizeof(T) < sizeof(float) && tokens > WORTH_WIDENING;            \
            for (int o = 0; widens && o < outputs; o++)                                           \
                for (int64_t i = 0; i < depth; i++) wide[o * DEPTH + i] = widen_##T(w[o * in + i]); \
            for (int pass = 0; pass < passes; pass++)                                             \
                for (int o = 0; o < outputs; o += OUTPUTS_##V) {                                  \
                    int t = tokens * pass / passes, n = tokens * (pass + 1) / passes - t;         \
                    int m = outputs - o < OUTPUTS_##V ? outputs - o : OUTPUTS_##V;                \
                    float *some = sums + t * TILE + o;                                            \
                    if (widens)                                                                   \
                        dots_float_##V(wide + o * DEPTH, DEPTH, x + t * in, in, depth, some, m, n); \
                    else                                                                          \
                        dots_##T##_##V(w + o * in, in, x + t * in, in, depth, some, m, n);        \
                }                                                                                 \
        }                                                                                         \
    }

DEFINE_DOT(float, Lanes) DEFINE_DOTS(float, Lanes) DEFINE_TILE(float, Lanes, FOR_EACH_CPU)
DEFINE_DOT(bfloat16, Lanes) DEFINE_DOTS(bfloat16, Lanes) DEFINE_TILE(bfloat16, Lanes, FOR_EACH_CPU)

#if HAS_BROAD
DEFINE_DOT(float, Broad) DEFINE_DOTS(float, Broad) DEFINE_TILE(float, Broad, FOR_Broad)
DEFINE_DOT(bfloat16, Broad) DEFINE_DOTS(bfloat16, Broad) DEFINE_TILE(bfloat16, Broad, FOR_Broad)
#endif

#include "pairs.h"

int loraplex_pairs = -1; /* whether pairs are multiplied: -1 not asked yet */

static int takes_pairs(void) {
    if (loraplex_pairs < 0) loraplex_pairs = multiplies_pairs();
    return loraplex_pairs;
}

#endif
