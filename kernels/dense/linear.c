/* A linear layer of torch's form: y[t][o] = bias[o] + sum_i w[o][i] * x[t][i].

   Weights are read as they lie, once for every TOKENS_A_PASS tokens, and widened where they are used, or multiplied as
   they are where the CPU can (`pairs.h`); sums are made in float32 and rounded once. A tile of TILE outputs and DEPTH
   inputs stays in the cache while all tokens of the pass meet it. Each sum is made in the same order whatever the
   tokens beside it: results depend on no neighbour. */

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
    INLINED void dots_##T(const T *w, int64_t w_stride, const float *x, int64_t x_stride,         \
                          int64_t depth, float *sums, int outputs, int tokens) {                  \
        if (outputs == OUTPUTS && tokens == 4)                                                    \
            dot_##T(w, w_stride, x, x_stride, depth, sums, OUTPUTS, 4);                           \
        else if (outputs == OUTPUTS && tokens == 3)                                               \
            dot_##T(w, w_stride, x, x_stride, depth, sums, OUTPUTS, 3);                           \
        else if (outputs == OUTPUTS && tokens == 2)                                               \
            dot_##T(w, w_stride, x, x_stride, depth, sums, OUTPUTS, 2);                           \
        else                                                                                      \
            for (int o = 0; o < outputs; o++)                                                     \
                for (int t = 0; t < tokens; t++)                                                  \
                    dot_##T(w + o * w_stride, w_stride, x + t * x_stride, x_stride, depth,        \
                            sums + t * TILE + o, 1, 1);                                           \
    }

/* sums[t * TILE + o] += w[o]·x[t], all of them of `in` numbers. `wide` holds a tile, where there is a use for it. */
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
            int widens = sizeof(T) < sizeof(float) && tokens > WORTH_WIDENING;                    \
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

typedef struct {
    int64_t in, out;
    const void *weight, *bias; /* bias: or NULL */
} Layer;

#include "pairs.h"

int loraplex_linear_pairs = -1; /* whether pairs are multiplied: -1 not known yet */

/* `scratch`, where T is not float: tokens * in floats, and loraplex_linear_tile for each thread behind them. */
#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_linear_##T(const Layer *layer, const T *x, T *y, int64_t num_tokens,            \
                             int num_threads, float *scratch) {                                   \
        const T *weight = layer->weight, *bias = layer->bias;                                     \
        int64_t in = layer->in, out = layer->out, tiles = (out + TILE - 1) / TILE;                \
        const float *inputs = sizeof(T) == sizeof(float) ? (const float *)x : scratch;            \
        if (loraplex_linear_pairs < 0) loraplex_linear_pairs = multiplies_pairs();                \
        int pairs = sizeof(T) == sizeof(bfloat16) && loraplex_linear_pairs;                       \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)") {                   \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            if (sizeof(T) < sizeof(float) && !pairs) {                                            \
                int64_t end = num_tokens * in * (me + 1) / all;                                   \
                for (int64_t i = num_tokens * in * me / all; i < end; i++)                        \
                    scratch[i] = widen_##T(x[i]);                                                 \
                _Pragma("omp barrier");                                                           \
            }                                                                                     \
            int64_t first = tiles * me / all * TILE, last = tiles * (me + 1) / all * TILE;        \
            float sums[TOKENS_A_PASS * TILE];                                                     \
            for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_A_PASS)                   \
                for (int64_t o = first; o < last && o < out; o += TILE) {                         \
                    int tokens = num_tokens - begin < TOKENS_A_PASS ? num_tokens - begin : TOKENS_A_PASS; \
                    int outputs = out - o < TILE ? out - o : TILE;                                \
                    memset(sums, 0, tokens * TILE * sizeof(float));                               \
                    if (pairs)                                                                    \
                        tile_pairs((const bfloat16 *)(weight + o * in),                           \
                                   (const bfloat16 *)(x + begin * in), in, outputs, tokens, sums); \
                    else                                                                          \
                        tile_##T(weight + o * in, inputs + begin * in, in, outputs, tokens, sums, \
                                 scratch + num_tokens * in + me * DEPTH * TILE);                  \
                    for (int t = 0; t < tokens; t++)                                              \
                        for (int k = 0; k < outputs; k++) {                                       \
                            float offset = bias ? widen_##T(bias[o + k]) : 0;                     \
                            y[(begin + t) * out + o + k] = narrow_##T(sums[t * TILE + k] + offset); \
                        }                                                                         \
                }                                                                                 \
        }                                                                                         \
    }

#define DEFINE(T) DEFINE_DOT(T) DEFINE_DOTS(T) DEFINE_TILE(T) DEFINE_ENTRY(T)

DEFINE(float)
DEFINE(bfloat16)

const int64_t loraplex_linear_tile = DEPTH * TILE;
