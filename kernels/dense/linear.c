/* A linear layer of torch's form: y[t][o] = bias[o] + sum_i w[o][i] * x[t][i].

   Sums are made in float32 and rounded once. Results depend on no neighbour: see `tile.h` and `linear_amx.h`. Where tile
   registers are used, a token alone is not computed in them: a tenth faster, and other in its last bits. */

#include "dense/linear_amx.h"
#include "dense/tile.h"

typedef struct {
    int64_t in, out;
    const void *weight, *bias; /* bias: or NULL */
} Layer;

/* Whether to pack pairs: all rows of such a width would contend for the same lines of the first cache. */
static int is_worth_packing(int64_t in, int64_t num_tokens) { return num_tokens > 1 && in % 2048 == 0; }

/* y[t * out + k] = the tile's sums and a bias, rounded. */
#define DEFINE_FINISH(T)                                                                          \
    FOR_EACH_CPU static void finish_##T(const float *sums, const T *bias, T *restrict y, int64_t out, \
                                        int tokens, int outputs) {                                \
        float offset[TILE] = {0};                                                                 \
        for (int k = 0; bias && k < outputs; k++) offset[k] = widen_##T(bias[k]);                 \
        for (int t = 0; t < tokens; t++)                                                          \
            for (int k = 0; k < outputs; k++)                                                     \
                y[t * out + k] = narrow_##T(sums[t * TILE + k] + offset[k]);                      \
    }

DEFINE_FINISH(float)
DEFINE_FINISH(bfloat16)

/* One thread's outputs, in tiles. `inputs`: x in float32, or for pairs as it is or packed, where `wide` is not
   needed. */
#define DEFINE_OUTPUTS(T)                                                                         \
    static void some_outputs_##T(const Layer *layer, const void *inputs, T *y, int64_t num_tokens, \
                                 int pairs, float *wide, int64_t me, int64_t all) {               \
        const T *weight = layer->weight, *bias = layer->bias;                                     \
        int64_t in = layer->in, out = layer->out, tiles = (out + TILE - 1) / TILE;                \
        int64_t first = tiles * me / all * TILE, last = tiles * (me + 1) / all * TILE;            \
        float sums[TOKENS_A_PASS * TILE];                                                         \
        for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_A_PASS)                       \
            for (int64_t o = first; o < last && o < out; o += TILE) {                             \
                int tokens = num_tokens - begin < TOKENS_A_PASS ? num_tokens - begin : TOKENS_A_PASS; \
                int outputs = out - o < TILE ? out - o : TILE;                                    \
                memset(sums, 0, tokens * TILE * sizeof(float));                                   \
                if (pairs)                                                                        \
                    tile_pairs((const bfloat16 *)(weight + o * in),                               \
                               (const bfloat16 *)inputs + begin * in, in, outputs, tokens, sums,  \
                               is_worth_packing(in, num_tokens));                                 \
                else                                                                              \
                    tile_##T(weight + o * in, (const float *)inputs + begin * in, in, outputs,    \
                             tokens, sums, wide);                                                 \
                finish_##T(sums, bias ? bias + o : NULL, y + begin * out + o, out, tokens, outputs); \
            }                                                                                     \
    }

DEFINE_OUTPUTS(float)
DEFINE_OUTPUTS(bfloat16)

void loraplex_linear_float(const Layer *layer, const float *x, float *y, int64_t num_tokens, int num_threads,
                           void *scratch) {
    _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)")
        some_outputs_float(layer, x, y, num_tokens, 0, NULL, omp_get_thread_num(), omp_get_num_threads());
}

/* `scratch`: 64-byte lines; x packed, or in float32 and a widened tile for each thread behind it. */
void loraplex_linear_bfloat16(const Layer *layer, const bfloat16 *x, bfloat16 *y, int64_t num_tokens, int num_threads,
                              void *scratch) {
    int tiles = takes_tiles() && num_tokens > 1, pairs = takes_pairs();
    int64_t in = layer->in, size = num_tokens * in;
    int packs = pairs && !tiles && is_worth_packing(in, num_tokens);
    int alone = num_tokens <= SIDE;
    float *wide = scratch;
    _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)") {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        bfloat16 *packed = (bfloat16 *)scratch + (alone ? me * packed_size(in, num_tokens) : 0);
        if (tiles) pack_tokens(x, in, num_tokens, packed, alone ? 0 : me, alone ? 1 : all);
        if (packs) pack_pairs(x, in, NULL, 0, num_tokens, scratch, me, all);
        for (int64_t i = size * me / all; !tiles && !pairs && i < size * (me + 1) / all; i++)
            wide[i] = widen_bfloat16(x[i]);
        if (packs || !pairs || (tiles && !alone)) {
            _Pragma("omp barrier")
        }
        if (tiles)
            linear_tiles(layer->weight, layer->bias, in, layer->out, packed, y, num_tokens, me, all);
        else
            some_outputs_bfloat16(layer, packs || !pairs ? scratch : (const void *)x, y, num_tokens, pairs,
                                  wide + size + me * DEPTH * TILE, me, all);
    }
}

const int64_t loraplex_linear_tile = DEPTH * TILE;
