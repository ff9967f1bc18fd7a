/* A linear layer of torch's form: y[t][o] = bias[o] + sum_i w[o][i] * x[t][i].

   Sums are made in float32 and rounded once. Results depend on no neighbour: see `tile.h`, `panels.h` and `linear_amx.h`.
   Where tile registers are used, up to three tokens are not computed in them: a tenth faster, and other in their last
   bits. */

#include "dense/linear_amx.h"
#include "dense/panels.h"
#include "dense/tile.h"

#define FEW 16           /* tokens */
#define MOST_IN_PAIRS 3 /* tokens, where there are tiles */
#define WIDE_TILE (DEPTH * TILE * (int64_t)sizeof(float)) /* bytes */

typedef struct {
    int64_t in, out;
    const void *weight, *bias; /* bias: or NULL */
    const void *panels;        /* or NULL: the weight is read as it lies */
    const float *scales;       /* of the outputs, where panels are of int8, or NULL */
} Layer;

/* Whether to pack pairs: all rows of such a width would contend for the same lines of the first cache. */
static int is_worth_packing(int64_t in, int64_t num_tokens) { return num_tokens > 1 && in % 2048 == 0; }

/* One thread's part of packing all tokens, pass by pass; row k lies `paired_width` times k behind `packed`. */
static void pack_pairs(const bfloat16 *x, int64_t in, int64_t num_tokens, bfloat16 *packed, int me, int all) {
    for (int64_t k = 0; k < num_tokens; k += TOKENS_A_PASS)
        pack_pass(x, in, NULL, k, num_tokens - k < TOKENS_A_PASS ? num_tokens - k : TOKENS_A_PASS,
                  packed + k * paired_width(in), me, all);
}

/* y[t * out + k] = sums[t * stride + k], scaled where they are to be, and a bias, rounded. */
#define DEFINE_FINISH(T)                                                                          \
    FOR_EACH_CPU static void finish_##T(const float *sums, int stride, const float *scales, const T *bias, \
                                        T *restrict y, int64_t out, int tokens, int outputs) {    \
        float scale[TILE], offset[TILE] = {0};                                                    \
        for (int k = 0; k < outputs; k++) scale[k] = scales ? scales[k] : 1;                      \
        for (int k = 0; bias && k < outputs; k++) offset[k] = widen_##T(bias[k]);                 \
        for (int t = 0; t < tokens; t++)                                                          \
            for (int k = 0; k < outputs; k++)                                                     \
                y[t * out + k] = narrow_##T(sums[t * stride + k] * scale[k] + offset[k]);         \
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
                               (const bfloat16 *)(weight + (o + outputs) * in),                   \
                               is_worth_packing(in, num_tokens));                                 \
                else                                                                              \
                    BY_WIDTH(tile_##T)(weight + o * in, (const float *)inputs + begin * in, in,   \
                                       outputs, tokens, sums, wide);                              \
                finish_##T(sums, TILE, NULL, bias ? bias + o : NULL, y + begin * out + o, out, tokens, outputs); \
            }                                                                                     \
    }

DEFINE_OUTPUTS(float)
DEFINE_OUTPUTS(bfloat16)

/* One thread's outputs of a layer in panels of SIZE bytes. Rows of inputs lie `x_stride` numbers apart. */
#define DEFINE_PANELS_OUTPUTS(T, KIND, SIZE)                                                      \
    static void outputs_##T##_##KIND(const Layer *layer, const void *inputs, int64_t x_stride, T *y, \
                                     int64_t num_tokens, int64_t me, int64_t all) {               \
        const T *bias = layer->bias;                                                              \
        const float *scales = layer->scales;                                                      \
        const ROW_##KIND *x = inputs;                                                             \
        int64_t in = layer->in, out = layer->out, size = SIZE(in);                                \
        int64_t first = num_panels(out) * me / all, last = num_panels(out) * (me + 1) / all;      \
        float sums[MOST_PANELS_Broad * TOKENS_A_PANEL * PANEL];                                   \
        for (int64_t begin = 0; begin < num_tokens; begin += TOKENS_A_PANEL) {                    \
            int tokens = num_tokens - begin < TOKENS_A_PANEL ? num_tokens - begin : TOKENS_A_PANEL; \
            for (int64_t p = first, some; p < last; p += some) {                                  \
                some = last - p < at_once_##KIND(tokens) ? 1 : at_once_##KIND(tokens);            \
                memset(sums, 0, some * tokens * PANEL * sizeof(float));                           \
                some_panels_##KIND((const char *)layer->panels + p * size, in, x + begin * x_stride, x_stride, sums, \
                                   some, tokens);                                                 \
                for (int64_t q = 0, o = p * PANEL; q < some; q++, o += PANEL)                     \
                    finish_##T(sums + q * tokens * PANEL, PANEL, scales ? scales + o : NULL, bias ? bias + o : NULL, \
                               y + begin * out + o, out, tokens, out - o < PANEL ? out - o : PANEL); \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_PANELS_OUTPUTS(float, float, panel_bytes_float)
DEFINE_PANELS_OUTPUTS(float, int8_float, panel_bytes_int8)
DEFINE_PANELS_OUTPUTS(bfloat16, bfloat16, panel_bytes_bfloat16)
DEFINE_PANELS_OUTPUTS(bfloat16, int8_bfloat16, panel_bytes_int8)
DEFINE_PANELS_OUTPUTS(bfloat16, pairs, panel_bytes_bfloat16)
DEFINE_PANELS_OUTPUTS(bfloat16, int8_pairs, panel_bytes_int8)

#define OUTPUTS_OF_PANELS(layer, T, KIND) ((layer)->scales ? outputs_##T##_int8_##KIND : outputs_##T##_##KIND)

/* Bytes that a layer's panels take, or 0 where the CPU is not one for them: tile registers read bfloat16 by rows. */
#define DEFINE_PACKING(T)                                                                         \
    int64_t loraplex_panels_##T(int64_t in, int64_t out) {                                        \
        int can = takes_panels() && (sizeof(T) == sizeof(float) || !takes_tiles());               \
        return can ? num_panels(out) * panel_bytes_##T(in) : 0;                                   \
    }                                                                                             \
    void loraplex_pack_##T(const T *weight, T *panels, int64_t in, int64_t out, int num_threads) { \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)")                     \
            pack_panels_##T(weight, in, out, panels, omp_get_thread_num(), omp_get_num_threads()); \
    }                                                                                             \
    void loraplex_pack_int8_##T(const T *weight, int8_t *panels, float *scales, int64_t in, int64_t out, \
                                int num_threads) {                                                \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)")                     \
            pack_int8_##T(weight, in, out, panels, scales, omp_get_thread_num(), omp_get_num_threads()); \
    }

DEFINE_PACKING(float)
DEFINE_PACKING(bfloat16)

/* Bytes that they take in int8, of either type, or 0 where the CPU multiplies no panels. */
int64_t loraplex_panels_int8(int64_t in, int64_t out) {
    return takes_panels() ? num_panels(out) * panel_bytes_int8(in) : 0;
}

/* How tokens are multiplied: of bfloat16 in tiles, in pairs, packed or as they lie, or widened; of either type by panels,
   of rows as they lie, of copies or of widened ones; float32 else by rows as they lie. */
typedef enum { TILES, PACKED_PAIRS, PAIRS, WIDE, PANELS, PANELS_OF_COPIES, PANELS_OF_WIDE } Form;

static Form form_of_float(const Layer *layer, int64_t num_tokens) {
    if (!layer->panels) return WIDE;
    return contend(layer->in, sizeof(float), num_tokens) ? PANELS_OF_COPIES : PANELS;
}

static Form form_of_bfloat16(const Layer *layer, int64_t num_tokens) {
    int64_t in = layer->in;
    if (layer->panels && !takes_pairs()) return PANELS_OF_WIDE;
    if (layer->panels)
        return in % INPUTS_pairs || contend(in, sizeof(bfloat16), num_tokens) ? PANELS_OF_COPIES : PANELS;
    if (takes_tiles() && num_tokens > MOST_IN_PAIRS) return TILES;
    if (!takes_pairs()) return WIDE;
    return is_worth_packing(in, num_tokens) ? PACKED_PAIRS : PAIRS;
}

/* Few tokens are brought into it by each thread for itself: what another writes would have to come from its cache. */
static int is_few(int64_t num_tokens) { return num_tokens <= FEW; }

/* Bytes that they take then, in whole lines, where a number takes `size`. */
static int64_t prepared_size(Form form, int64_t in, int64_t num_tokens, int64_t size) {
    int64_t bytes = form == TILES              ? packed_size(in, num_tokens) * sizeof(bfloat16)
                    : form == PACKED_PAIRS     ? num_tokens * paired_width(in) * sizeof(bfloat16)
                    : form == PANELS_OF_COPIES ? num_tokens * panels_width(in, size) * size
                    : form == PANELS_OF_WIDE   ? num_tokens * panels_width(in, sizeof(float)) * sizeof(float)
                    : form == WIDE && size < (int64_t)sizeof(float) ? num_tokens * in * sizeof(float)
                                                                    : 0;
    return (bytes + LINE - 1) / LINE * LINE;
}

/* Bytes: prepared tokens, as often as they are, and a widened tile for each thread. */
#define DEFINE_SCRATCH(T)                                                                         \
    int64_t loraplex_linear_scratch_##T(const Layer *layer, int64_t num_tokens, int64_t num_threads) { \
        int64_t size = prepared_size(form_of_##T(layer, num_tokens), layer->in, num_tokens, sizeof(T)); \
        int64_t tiles = sizeof(T) == sizeof(float) ? 0 : num_threads * WIDE_TILE;                 \
        return size * (is_few(num_tokens) ? num_threads : 1) + tiles;                             \
    }

DEFINE_SCRATCH(float)
DEFINE_SCRATCH(bfloat16)

/* One thread's part of rows in float32, `width` numbers apart, of which those behind `in` are zero. */
static void widen_rows(const bfloat16 *x, int64_t in, int64_t num_tokens, float *wide, int64_t width, int me, int all) {
    for (int64_t t = me; t < num_tokens; t += all) {
        for (int64_t i = 0; i < in; i++) wide[t * width + i] = widen_bfloat16(x[t * in + i]);
        for (int64_t i = in; i < width; i++) wide[t * width + i] = 0;
    }
}

/* The same of rows as they are, of numbers of `size` bytes. */
static void space_rows(const char *x, int64_t in, int64_t num_tokens, char *copies, int64_t size, int me, int all) {
    int64_t row = in * size, width = panels_width(in, size) * size;
    for (int64_t t = me; t < num_tokens; t += all) {
        memcpy(copies + t * width, x + t * row, row);
        memset(copies + t * width + row, 0, width - row);
    }
}

/* One thread's part of it. */
static void prepare(Form form, const bfloat16 *x, int64_t in, int64_t num_tokens, void *prepared, int me, int all) {
    if (form == TILES) pack_tokens(x, in, num_tokens, prepared, me, all);
    if (form == PACKED_PAIRS) pack_pairs(x, in, num_tokens, prepared, me, all);
    if (form == WIDE) widen_rows(x, in, num_tokens, prepared, in, me, all);
    if (form == PANELS_OF_COPIES) space_rows((const char *)x, in, num_tokens, prepared, sizeof(bfloat16), me, all);
    if (form == PANELS_OF_WIDE)
        widen_rows(x, in, num_tokens, prepared, panels_width(in, sizeof(float)), me, all);
}

/* `scratch`, here and below: of loraplex_linear_scratch_ bytes, in 64-byte lines. */
void loraplex_linear_float(const Layer *layer, const float *x, float *y, int64_t num_tokens, int num_threads,
                           char *scratch) {
    Form form = form_of_float(layer, num_tokens);
    int64_t in = layer->in, size = prepared_size(form, in, num_tokens, sizeof(float));
    int few = is_few(num_tokens);
    _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)") {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        char *prepared = scratch + (few ? me * size : 0);
        if (size)
            space_rows((const char *)x, in, num_tokens, prepared, sizeof(float), few ? 0 : me, few ? 1 : all);
        if (size && !few) {
            _Pragma("omp barrier")
        }
        if (form == WIDE) some_outputs_float(layer, x, y, num_tokens, 0, NULL, me, all);
        else if (form == PANELS) OUTPUTS_OF_PANELS(layer, float, float)(layer, x, in, y, num_tokens, me, all);
        else
            OUTPUTS_OF_PANELS(layer, float, float)
            (layer, prepared, panels_width(in, sizeof(float)), y, num_tokens, me, all);
    }
}

void loraplex_linear_bfloat16(const Layer *layer, const bfloat16 *x, bfloat16 *y, int64_t num_tokens, int num_threads,
                              char *scratch) {
    Form form = form_of_bfloat16(layer, num_tokens);
    int64_t in = layer->in, size = prepared_size(form, in, num_tokens, sizeof(bfloat16));
    int few = is_few(num_tokens);
    _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)") {
        int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        void *prepared = scratch + (few ? me * size : 0);
        void *wide = scratch + (few ? num_threads : 1) * size + me * WIDE_TILE;
        prepare(form, x, in, num_tokens, prepared, few ? 0 : me, few ? 1 : all);
        if (size && !few) {
            _Pragma("omp barrier")
        }
        if (form == TILES)
            linear_tiles(layer->weight, layer->bias, in, layer->out, prepared, y, num_tokens, me, all);
        else if (form == PANELS)
            OUTPUTS_OF_PANELS(layer, bfloat16, pairs)(layer, x, in, y, num_tokens, me, all);
        else if (form == PANELS_OF_COPIES)
            OUTPUTS_OF_PANELS(layer, bfloat16, pairs)
            (layer, prepared, panels_width(in, sizeof(bfloat16)), y, num_tokens, me, all);
        else if (form == PANELS_OF_WIDE)
            OUTPUTS_OF_PANELS(layer, bfloat16, bfloat16)
            (layer, prepared, panels_width(in, sizeof(float)), y, num_tokens, me, all);
        else
            some_outputs_bfloat16(layer, form == PAIRS ? x : prepared, y, num_tokens, form != WIDE, wide, me, all);
    }
}
