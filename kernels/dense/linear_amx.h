/* A linear layer in tile registers: sixteen outputs by sixteen tokens at a time.

   Weights are the first operand, as they lie; the tokens are packed. */

#include "amx.h"

#if HAS_TILES

/* How much stays in the second cache while it is multiplied. */
#define BLOCK_OUTPUTS 128
#define BLOCK_TOKENS 256
#define BLOCK_INPUTS 2048

/* In numbers of 16 bits. */
static int64_t packed_size(int64_t in, int64_t num_tokens) {
    return tiles_of(num_tokens, SIDE) * tiles_of(in, INPUTS) * PACKED;
}

/* One thread's part of packed[t / SIDE][i / INPUTS]. */
FOR_AMX static void pack_tokens(const bfloat16 *x, int64_t in, int64_t num_tokens, bfloat16 *packed, int me, int all) {
    int64_t across = tiles_of(in, INPUTS), tiles = tiles_of(num_tokens, SIDE) * across;
    for (int64_t n = tiles * me / all; n < tiles * (me + 1) / all; n++) {
        int64_t t = n / across * SIDE, i = n % across * INPUTS;
        pack_tile(x + t * in + i, in, num_tokens - t, in - i, packed + n * PACKED);
    }
}

/* Up to two tiles of outputs: their first rows, how far a row lies from the next, and what is multiplied from the next. */
typedef struct {
    const bfloat16 *tile[2];
    int64_t row, next;
} Rows;

/* Rows that are asked for meanwhile. A single pass over the weights needs none: the CPU foresees it. */
typedef struct {
    const bfloat16 *first;
    int64_t row;
    int count;
} Ahead;

typedef float Sums[2][2][SIDE * SIDE]; /* of two tiles of outputs and two of tokens */

/* sums[a][b] += the tiles `depth` inputs long of rows a and tokens b, for a < num_rows and b < num_tokens, which are
   constants where it is called; `begins`: they are zero before. */
FOR_AMX INLINED void add_tiles(Rows w, const bfloat16 *const x[2], int64_t depth, Sums sums,
                               int begins, Ahead ahead, int num_rows, int num_tokens) {
    const int two_rows = num_rows == 2, two_tokens = num_tokens == 2, line = SIDE * sizeof(float);
    if (begins) {
        _tile_zero(0);
        if (two_tokens) _tile_zero(1);
        if (two_rows) _tile_zero(2);
        if (two_rows && two_tokens) _tile_zero(3);
    } else {
        _tile_loadd(0, sums[0][0], line);
        if (two_tokens) _tile_loadd(1, sums[0][1], line);
        if (two_rows) _tile_loadd(2, sums[1][0], line);
        if (two_rows && two_tokens) _tile_loadd(3, sums[1][1], line);
    }
    for (int64_t i = 0; i < tiles_of(depth, INPUTS); i++) {
        _tile_loadd(6, x[0] + i * PACKED, line);
        if (two_tokens) _tile_loadd(7, x[1] + i * PACKED, line);
        _tile_loadd(4, w.tile[0] + i * w.next, w.row * sizeof(bfloat16));
        if (two_rows) _tile_loadd(5, w.tile[1] + i * w.next, w.row * sizeof(bfloat16));
        for (int r = 0; r < ahead.count; r++) READ_AHEAD(ahead.first + r * ahead.row + i * INPUTS);
        _tile_dpbf16ps(0, 4, 6);
        if (two_tokens) _tile_dpbf16ps(1, 4, 7);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_rows && two_tokens) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], line);
    if (two_tokens) _tile_stored(1, sums[0][1], line);
    if (two_rows) _tile_stored(2, sums[1][0], line);
    if (two_rows && two_tokens) _tile_stored(3, sums[1][1], line);
}

/* Where rows or inputs do not fill tiles: copied beside each other, tile after tile, with zeros beyond. */
FOR_AMX static Rows copy_rows(const bfloat16 *w, int64_t in, int64_t depth, int num_rows, bfloat16 *copy) {
    int64_t across = tiles_of(depth, INPUTS);
    for (int r = 0; r < 2 * SIDE; r++)
        for (int64_t i = 0; i < across; i++)
            _mm512_store_si512(copy + (r / SIDE * across + i) * PACKED + r % SIDE * INPUTS,
                               r < num_rows ? _mm512_maskz_loadu_epi16(first_of(depth - i * INPUTS), w + r * in + i * INPUTS)
                                            : _mm512_setzero_si512());
    WRITTEN;
    return (Rows){{copy, copy + across * PACKED}, INPUTS, PACKED};
}

/* y[t][o] = sums[o / SIDE][b][o % SIDE][t] + bias[o], rounded, for t < num_tokens and o < num_outputs <= 2 * SIDE. */
FOR_AMX static void round_sums(Sums sums, int b, const bfloat16 *bias, bfloat16 *y, int64_t y_row, int64_t num_tokens,
                               int64_t num_outputs) {
    __m256i rounded[2][SIDE] = {{{0}}};
    for (int a = 0; a * SIDE < num_outputs; a++) {
        __m512i rows[SIDE];
        _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++) rows[k] = _mm512_load_si512(sums[a][b] + k * SIDE);
        transpose(rows);
        __m512 offset = _mm512_setzero_ps();
        if (bias) {
            __m256i narrow = _mm256_maskz_loadu_epi16(first_of(num_outputs - a * SIDE), bias + a * SIDE);
            offset = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
        }
        _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++)
            rounded[a][k] = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps((__m512)rows[k], offset));
    }
    for (int k = 0; k < SIDE && k < num_tokens; k++) { /* whole lines, where there are */
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(rounded[0][k]), rounded[1][k], 1);
        _mm512_mask_storeu_epi16(y + k * y_row, first_of(num_outputs), both);
    }
}

/* The sums of up to two tiles of outputs with a block of tokens, each of which is packed `across` tiles wide. */
FOR_AMX static void add_block(Rows rows, const bfloat16 *w, int64_t in, int num_rows, const bfloat16 *packed,
                              int64_t across, int64_t num_tokens, int64_t depth, int begins, Sums *sums) {
    int64_t passes = tiles_of(num_tokens, 2 * SIDE);
    for (int64_t n = 0; n < passes; n++) {
        const bfloat16 *x[2] = {packed + 2 * n * across * PACKED, packed + (2 * n + 1) * across * PACKED};
        int64_t asked = 2 * SIDE * n / passes, next = 2 * SIDE * (n + 1) / passes;
        Ahead ahead = {w + (2 * SIDE + asked) * in, in, passes > 1 ? next - asked : 0};
        int two_rows = num_rows > SIDE, two_tokens = num_tokens - n * 2 * SIDE > SIDE;
        if (two_rows && two_tokens) add_tiles(rows, x, depth, sums[n], begins, ahead, 2, 2);
        else if (two_rows) add_tiles(rows, x, depth, sums[n], begins, ahead, 2, 1);
        else if (two_tokens) add_tiles(rows, x, depth, sums[n], begins, ahead, 1, 2);
        else add_tiles(rows, x, depth, sums[n], begins, ahead, 1, 1);
    }
}

/* One thread's outputs, from packed tokens. `bias`: or NULL. */
FOR_AMX static void linear_tiles(const bfloat16 *weight, const bfloat16 *bias, int64_t in, int64_t out,
                                 const bfloat16 *packed, bfloat16 *y, int64_t num_tokens, int me, int all) {
    Sums sums[BLOCK_OUTPUTS / (2 * SIDE)][BLOCK_TOKENS / (2 * SIDE)] __attribute__((aligned(LINE)));
    bfloat16 copy[2 * SIDE * BLOCK_INPUTS] __attribute__((aligned(LINE)));
    int64_t across = tiles_of(in, INPUTS), tiles = tiles_of(out, SIDE);
    int64_t first = tiles * me / all * SIDE, last = tiles * (me + 1) / all * SIDE;
    if (last > out) last = out;
    WRITTEN;
    _tile_loadconfig(&whole_tiles);
    for (int64_t t = 0; t < num_tokens; t += BLOCK_TOKENS)
        for (int64_t o = first; o < last; o += BLOCK_OUTPUTS)
            for (int64_t i = 0; i < in; i += BLOCK_INPUTS)
                for (int64_t p = o; p < last && p < o + BLOCK_OUTPUTS; p += 2 * SIDE) {
                    int64_t depth = in - i < BLOCK_INPUTS ? in - i : BLOCK_INPUTS;
                    int64_t num_block = num_tokens - t < BLOCK_TOKENS ? num_tokens - t : BLOCK_TOKENS;
                    int num_rows = last - p < 2 * SIDE ? last - p : 2 * SIDE;
                    const bfloat16 *w = weight + p * in + i;
                    Rows rows = {{w, w + SIDE * in}, in, INPUTS};
                    if (num_rows % SIDE || depth % INPUTS) rows = copy_rows(w, in, depth, num_rows, copy);
                    Sums *own = sums[(p - o) / (2 * SIDE)];
                    add_block(rows, w, in, num_rows, packed + (t / SIDE * across + i / INPUTS) * PACKED, across,
                              num_block, depth, i == 0, own);
                    for (int64_t k = 0; i + depth == in && k < num_block; k += SIDE)
                        round_sums(own[k / (2 * SIDE)], k / SIDE % 2, bias ? bias + p : NULL, y + (t + k) * out + p,
                                   out, num_block - k, num_rows);
                }
    _tile_release();
}

#else

static int64_t packed_size(int64_t in, int64_t num_tokens) { return 0; }
static void pack_tokens(const bfloat16 *x, int64_t in, int64_t num_tokens, bfloat16 *packed, int me, int all) {}
static void linear_tiles(const bfloat16 *weight, const bfloat16 *bias, int64_t in, int64_t out, const bfloat16 *packed,
                         bfloat16 *y, int64_t num_tokens, int me, int all) {}

#endif
