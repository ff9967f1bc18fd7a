/* A linear layer of torch's form: y[t][o] = bias[o] + sum_i w[o][i] * x[t][i].

   Sums are made in float32 and rounded once. Results depend on no neighbour: see `tile.h`. */

#include "tile.h"

typedef struct {
    int64_t in, out;
    const void *weight, *bias; /* bias: or NULL */
} Layer;

/* `scratch`, where T is not float: tokens * in floats, and loraplex_linear_tile for each thread behind them. */
#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_linear_##T(const Layer *layer, const T *x, T *y, int64_t num_tokens,            \
                             int num_threads, float *scratch) {                                   \
        const T *weight = layer->weight, *bias = layer->bias;                                     \
        int64_t in = layer->in, out = layer->out, tiles = (out + TILE - 1) / TILE;                \
        const float *inputs = sizeof(T) == sizeof(float) ? (const float *)x : scratch;            \
        int pairs = sizeof(T) == sizeof(bfloat16) && takes_pairs();                               \
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

DEFINE_ENTRY(float)
DEFINE_ENTRY(bfloat16)

const int64_t loraplex_linear_tile = DEPTH * TILE;
