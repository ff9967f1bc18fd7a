/* The products of cpu_prefill.c in tile registers, of bfloat16. Included there.

   Keys, and values by their columns, are the first operand; queries and weights are packed. Two tiles of queries are a
   block, so that sums are [2][...][SIDE]. */

#include "amx.h"

#if HAS_TILES

/* In numbers of 16 bits, of one key head: positions in whole tiles, two of them and two of a value's columns at a time. */
static int64_t tiled_positions(int64_t positions) { return tiles_of(positions, INPUTS) * INPUTS; }
static int64_t tiled_keys(int64_t positions, int64_t width) {
    return tiled_positions(positions) * tiles_of(width, INPUTS) * INPUTS;
}
static int64_t tiled_values(int64_t positions, int64_t width) {
    return tiled_positions(positions) * tiles_of(width, 2 * SIDE) * 2 * SIDE;
}

/* INPUTS positions of one key head, of which `count` are there: tiles of SIDE keys each, zeros beyond. */
FOR_AMX static void tile_keys(const bfloat16 *const *keys, int count, int64_t width, bfloat16 *tiles) {
    for (int half = 0; half < 2; half++)
        for (int64_t i = 0; i < width; i += INPUTS, tiles += PACKED)
            for (int k = 0; k < SIDE; k++) {
                int n = half * SIDE + k;
                _mm512_store_si512(tiles + k * INPUTS,
                                   n < count ? _mm512_maskz_loadu_epi16(first_of(width - i), keys[n] + i)
                                             : _mm512_setzero_si512());
            }
}

/* The same of values: tiles of SIDE columns each, an even number of them. */
FOR_AMX static void tile_values(const bfloat16 *const *values, int count, int64_t width, bfloat16 *tiles) {
    for (int64_t i = 0; i < tiles_of(width, 2 * SIDE) * 2 * SIDE; i += SIDE, tiles += PACKED) {
        __mmask16 inside = i < width ? first_of(width - i) : 0;
        __m512i rows[SIDE];
        _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++) {
            __m256i even = _mm256_setzero_si256(), odd = even;
            if (2 * k < count) even = _mm256_maskz_loadu_epi16(inside, values[2 * k] + i);
            if (2 * k + 1 < count) odd = _mm256_maskz_loadu_epi16(inside, values[2 * k + 1] + i);
            rows[k] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
        }
        transpose(rows);
        _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++) _mm512_store_si512(tiles + k * INPUTS, rows[k]);
    }
}

/* packed[half][i / INPUTS]: a block of queries, of which `count` are there. */
FOR_AMX static void pack_queries(const bfloat16 *q, int64_t row, int64_t count, int64_t width, bfloat16 *packed) {
    for (int half = 0; half < 2; half++)
        for (int64_t i = 0; i < width; i += INPUTS, packed += PACKED)
            pack_tile(q + half * SIDE * row + i, row, count - half * SIDE, width - i, packed);
}

/* Registers 0 to 3 += two tiles by two packed ones; each second one lies `next` behind the first. */
FOR_AMX INLINED void add_four(const bfloat16 *tiles, int64_t next, const bfloat16 *packed, int64_t next_packed) {
    const int line = SIDE * sizeof(float);
    _tile_loadd(4, tiles, line);
    _tile_loadd(5, tiles + next, line);
    _tile_loadd(6, packed, line);
    _tile_loadd(7, packed + next_packed, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* scores[half] of a block of queries begin `stride` after each other; `count`: a multiple of INPUTS. */
FOR_AMX INLINED void score_in_tiles(const bfloat16 *packed, const bfloat16 *tiles, int64_t width, int count,
                                    float *scores, int64_t stride) {
    const int line = SIDE * sizeof(float);
    int64_t across = tiles_of(width, INPUTS);
    for (int j = 0; j < count; j += INPUTS, tiles += 2 * across * PACKED, scores += INPUTS * SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < across; i++)
            add_four(tiles + i * PACKED, across * PACKED, packed + i * PACKED, across * PACKED);
        _tile_stored(0, scores, line);
        _tile_stored(1, scores + stride, line);
        _tile_stored(2, scores + SIDE * SIDE, line);
        _tile_stored(3, scores + stride + SIDE * SIDE, line);
    }
}

/* sums[half][i] += the weights' pairs [half] times values; both begin `stride` and `sums_stride` after each other. */
FOR_AMX INLINED void gather_in_tiles(const bfloat16 *pairs, int64_t stride, const bfloat16 *tiles, int64_t width,
                                     int count, float *sums, int64_t sums_stride) {
    const int line = SIDE * sizeof(float);
    int64_t across = tiles_of(width, 2 * SIDE) * 2;
    WRITTEN;
    for (int64_t i = 0; i < across; i += 2, sums += 2 * SIDE * SIDE) {
        _tile_loadd(0, sums, line);
        _tile_loadd(1, sums + sums_stride, line);
        _tile_loadd(2, sums + SIDE * SIDE, line);
        _tile_loadd(3, sums + sums_stride + SIDE * SIDE, line);
        for (int j = 0; j < count; j += INPUTS)
            add_four(tiles + (j / INPUTS * across + i) * PACKED, PACKED, pairs + j * SIDE, stride);
        _tile_stored(0, sums, line);
        _tile_stored(1, sums + sums_stride, line);
        _tile_stored(2, sums + SIDE * SIDE, line);
        _tile_stored(3, sums + sums_stride + SIDE * SIDE, line);
    }
}

/* y[t] = sums[half][.][t] / total[half][t], rounded, for t < count. */
FOR_AMX static void divide_tiles(const float *sums, int64_t stride, const float *total, int64_t count, int64_t width,
                                 bfloat16 *y, int64_t row) {
    for (int half = 0; half * SIDE < count; half++, y += SIDE * row) {
        __m512 whole = _mm512_loadu_ps(total + half * SIDE);
        for (int64_t i = 0; i < width; i += SIDE) {
            __m512i rows[SIDE];
            _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++)
                rows[k] = (__m512i)_mm512_div_ps(_mm512_loadu_ps(sums + half * stride + (i + k) * SIDE), whole);
            transpose(rows);
            _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++)
                if (half * SIDE + k < count)
                    _mm256_mask_storeu_epi16(y + k * row + i, first_of(width - i),
                                             (__m256i)_mm512_cvtneps_pbh((__m512)rows[k]));
        }
    }
}

FOR_AMX static void begin_tiles(void) {
    WRITTEN;
    _tile_loadconfig(&whole_tiles);
}
FOR_AMX static void end_tiles(void) { _tile_release(); }

#else

static void begin_tiles(void) {}
static void end_tiles(void) {}

#endif
