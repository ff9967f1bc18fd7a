/* The passes of decode.c in tile registers, for any number of an adapter's tokens. Included there.

   Tokens are the first operand. A is packed as it is read; two rows of B become a row of pairs. What A gives is split
   into two numbers of 16 bits, the second what the first leaves over, so that h keeps 16 bits of its 24. */

#include "amx.h"

#if HAS_TILES

#define INPUTS_A_PASS 1024    /* of A, packed */
#define COLUMNS_A_PASS 256    /* of B, made pairs; fewer for ranks that would not stay in the cache */
#define RANKS_OF_COLUMNS 64   /* that are as many */
#define COLUMNS_OF_TILES 32   /* that two tiles have */
#define MANY 32               /* tokens, whose shrinking threads share among them, instead of the ranks */

/* What each thread has to itself: the split h of a group, and B's pairs. In numbers of 16 bits. */
static int64_t own_size(int64_t num_tokens, int64_t max_rank) {
    int64_t parts = tiles_of(max_rank, SIDE), most = 2 * RANKS_OF_COLUMNS / SIDE * COLUMNS_A_PASS / COLUMNS_OF_TILES;
    return num_tokens * parts * INPUTS + (2 * parts > most ? 2 * parts : most) * PACKED;
}

/* Registers: 0 and 1 sums of so many tokens and columns, 4 tokens, 6 and 7 what they are multiplied with. */
FOR_AMX static void shape_tiles(int num_tokens, int columns) {
    Shapes shapes = whole_tiles;
    for (int n = 0; n < 8; n++) {
        shapes.rows[n] = n < 6 ? num_tokens : SIDE;
        shapes.bytes[n] = n == 4 ? LINE : columns * sizeof(float);
    }
    WRITTEN;
    _tile_loadconfig(&shapes);
}

/* A group's inputs where they are: side by side, or gathered into scratch, row by row of whole tiles. */
typedef struct {
    const bfloat16 *first;
    int64_t row;
} Inputs;

static int64_t gathered_row(int64_t in) { return tiles_of(in, INPUTS) * INPUTS; }

static int is_gathered(const Step *s, int g, int64_t in) {
    int begin = s->begin[g], last = s->begin[g + 1] - 1;
    return in % INPUTS || s->token[last] - s->token[begin] != last - begin;
}

static Inputs inputs_of(const Step *s, int g, const bfloat16 *x, int64_t in) {
    int begin = s->begin[g];
    if (!is_gathered(s, g, in)) return (Inputs){x + s->token[begin] * in, in};
    return (Inputs){(const bfloat16 *)s->x + begin * gathered_row(in), gathered_row(in)};
}

/* One thread's part of what is gathered. */
static void gather_inputs(const Step *s, const bfloat16 *x, int64_t in, int me, int all) {
    int64_t wide = gathered_row(in);
    for (int g = 0; g < s->num_groups; g++) {
        if (!is_gathered(s, g, in)) continue;
        for (int k = s->begin[g] + me; k < s->begin[g + 1]; k += all) {
            bfloat16 *row = (bfloat16 *)s->x + k * wide;
            memcpy(row, x + s->token[k] * in, in * sizeof(bfloat16));
            memset(row + in, 0, (wide - in) * sizeof(bfloat16));
        }
    }
}

/* h of some tokens and ranks, at most SIDE of these. */
FOR_AMX static void shrink_part(const bfloat16 *a, int64_t in, int ranks, Inputs x, int64_t tokens, float *h,
                                int64_t stride) {
    bfloat16 packed[INPUTS_A_PASS * SIDE] __attribute__((aligned(LINE)));
    for (int64_t i = 0; i < in; i += INPUTS_A_PASS) {
        int64_t depth = in - i < INPUTS_A_PASS ? in - i : INPUTS_A_PASS;
        for (int64_t n = 0; n < depth; n += INPUTS) pack_tile(a + i + n, in, ranks, depth - n, packed + n * SIDE);
        for (int64_t k = 0; k < tokens; k += SIDE) {
            shape_tiles(tokens - k < SIDE ? tokens - k : SIDE, ranks);
            if (i) _tile_loadd(0, h + k * stride, stride * sizeof(float));
            else _tile_zero(0);
            for (int64_t n = 0; n < depth; n += INPUTS) {
                _tile_loadd(4, x.first + k * x.row + i + n, x.row * sizeof(bfloat16));
                _tile_loadd(6, packed + n * SIDE, LINE);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, h + k * stride, stride * sizeof(float));
        }
    }
}

FOR_AMX static void shrink_in_tiles(const Table *t, int64_t entry, const Step *s, const bfloat16 *x, int64_t in, int me,
                                    int all) {
    int64_t whole = all_work(t, entry, s), done = 0;
    for (int g = 0; g < s->num_groups; g++) {
        const bfloat16 *a = (const bfloat16 *)(uintptr_t)t->a[entry + s->adapter[g]];
        int rank = t->rank[entry + s->adapter[g]], tokens = s->begin[g + 1] - s->begin[g];
        int64_t own = work(rank, tokens), size = tokens < MANY ? rank : tokens, aligned = tokens < MANY ? 1 : SIDE;
        int64_t first = share(whole, done, own, size, aligned, me, all);
        int64_t last = share(whole, done, own, size, aligned, me + 1, all);
        done += own;
        if (!rank || first >= last) continue;
        Inputs inputs = inputs_of(s, g, x, in);
        float *h = s->h + s->begin[g] * (int64_t)s->max_rank;
        int64_t from = tokens < MANY ? first : 0, end = tokens < MANY ? last : rank;
        if (tokens >= MANY) {
            inputs.first += first * inputs.row;
            h += first * s->max_rank;
            tokens = last - first;
        }
        for (int64_t j = from; j < end; j += SIDE)
            shrink_part(a + j * in, in, end - j < SIDE ? end - j : SIDE, inputs, tokens, h + j, s->max_rank);
    }
}

/* split[k][part]: sixteen of h's numbers by their token's scale, then what is left over of each. */
FOR_AMX static void split_h(const float *h, int64_t stride, int rank, const float *weight, float scale, int tokens,
                            bfloat16 *split) {
    for (int k = 0; k < tokens; k++)
        for (int j = 0; j < rank; j += SIDE, split += INPUTS) {
            __m512 whole = _mm512_maskz_loadu_ps(first_of(rank - j), h + k * stride + j);
            whole = _mm512_mul_ps(whole, _mm512_set1_ps(scale * weight[k]));
            __m256i narrow = (__m256i)_mm512_cvtneps_pbh(whole);
            __m512 taken = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
            _mm256_storeu_si256((__m256i *)split, narrow);
            _mm256_storeu_si256((__m256i *)(split + SIDE), (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(whole, taken)));
        }
}

/* Two tiles of pairs for each sixteen ranks and each 32 columns, which have the same rows twice: for both parts of h.
   The first has columns 0-3, 8-11, 16-19 and 24-27, as the instructions give them. */
FOR_AMX static void pair_columns(const bfloat16 *b, int64_t out, int rank, int64_t width, bfloat16 *pairs) {
    int64_t parts = tiles_of(rank, SIDE);
    for (int j = 0; j < parts * SIDE; j += 2) {
        const bfloat16 *row = b + j * out;
        bfloat16 *to = pairs + j / SIDE * 2 * PACKED + j % SIDE / 2 * INPUTS;
        for (int64_t c = 0; c < width; c += COLUMNS_OF_TILES, to += parts * 2 * PACKED) {
            __mmask32 inside = first_of(width - c);
            __m512i even = _mm512_maskz_loadu_epi16(j < rank ? inside : 0, row + c);
            __m512i odd = _mm512_maskz_loadu_epi16(j + 1 < rank ? inside : 0, row + out + c);
            if (j + 4 < rank) READ_AHEAD(row + 4 * out + c), READ_AHEAD(row + 5 * out + c);
            __m512i first = _mm512_unpacklo_epi16(even, odd), second = _mm512_unpackhi_epi16(even, odd);
            for (int twice = 0; twice < 2; twice++) {
                _mm512_store_si512(to + twice * SIDE / 2 * INPUTS, first);
                _mm512_store_si512(to + PACKED + twice * SIDE / 2 * INPUTS, second);
            }
        }
    }
}

/* y += one token's sums of 32 columns, rounded once. */
FOR_AMX INLINED void add_columns(bfloat16 *y, __mmask32 inside, const float *first, const float *second) {
    const __m512i lower = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    __m512 one = _mm512_load_ps(first), other = _mm512_load_ps(second);
    __m512i before = _mm512_maskz_loadu_epi16(inside, y);
    __m512 low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(before)), 16);
    __m512 high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(before, 1)), 16);
    low = _mm512_add_ps(low, _mm512_permutex2var_ps(one, lower, other));
    high = _mm512_add_ps(high, _mm512_permutex2var_ps(one, upper, other));
    _mm512_mask_storeu_epi16(y, inside, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* sums[0] and [1] += h's part for 32 columns, in two registers. */
#define ADD_PART(one, other, h, row, tiles)                     \
    _tile_loadd(4, h, (row) * sizeof(bfloat16));         \
    _tile_loadd(6, tiles, LINE);                         \
    _tile_loadd(7, (tiles) + PACKED, LINE);              \
    _tile_dpbf16ps(one, 4, 6);                           \
    _tile_dpbf16ps(other, 4, 7);

/* Some columns of a group's y. What is multiplied is added a pass later, when it is there. */
FOR_AMX static void expand_part(const Step *s, int g, int rank, const bfloat16 *split, const bfloat16 *pairs,
                                int64_t width, bfloat16 *y, int64_t out) {
    float sums[COLUMNS_A_PASS / COLUMNS_OF_TILES][2][SIDE * SIDE] __attribute__((aligned(LINE)));
    int64_t parts = tiles_of(rank, SIDE), row = parts * INPUTS, next = parts * 2 * PACKED;
    int begin = s->begin[g], tokens = s->begin[g + 1] - begin, blocks = tiles_of(width, COLUMNS_OF_TILES);
    for (int k = 0; k < tokens; k += SIDE) {
        int some = tokens - k < SIDE ? tokens - k : SIDE;
        const bfloat16 *h = split + k * row;
        shape_tiles(some, SIDE);
        for (int c = 0; c < blocks; c += 2) {
            const bfloat16 *tiles = pairs + c * next;
            int both = c + 1 < blocks;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int p = 0; p < parts; p++) {
                ADD_PART(0, 1, h + p * INPUTS, row, tiles + 2 * p * PACKED);
                if (both) { ADD_PART(2, 3, h + p * INPUTS, row, tiles + next + 2 * p * PACKED); }
            }
            _tile_stored(0, sums[c][0], LINE);
            _tile_stored(1, sums[c][1], LINE);
            if (!both) break;
            _tile_stored(2, sums[c + 1][0], LINE);
            _tile_stored(3, sums[c + 1][1], LINE);
        }
        for (int n = 0; n < some; n++)
            for (int c = 0; c < blocks; c++)
                add_columns(y + s->token[begin + k + n] * out + c * COLUMNS_OF_TILES,
                            first_of(width - c * COLUMNS_OF_TILES), sums[c][0] + n * SIDE, sums[c][1] + n * SIDE);
    }
}

FOR_AMX static void expand_in_tiles(const Table *t, int64_t entry, const Step *s, int64_t out, bfloat16 *y, int me,
                                    int all) {
    int64_t whole = all_work(t, entry, s), done = 0, num_tokens = s->begin[s->num_groups];
    bfloat16 *pairs = (bfloat16 *)s->own + me * own_size(num_tokens, s->max_rank);
    for (int g = 0; g < s->num_groups; g++) {
        const bfloat16 *b = (const bfloat16 *)(uintptr_t)t->b[entry + s->adapter[g]];
        int rank = t->rank[entry + s->adapter[g]], begin = s->begin[g], tokens = s->begin[g + 1] - begin;
        int64_t own = work(rank, tokens);
        int64_t first = share(whole, done, own, out, COLUMNS_OF_TILES, me, all);
        int64_t last = share(whole, done, own, out, COLUMNS_OF_TILES, me + 1, all);
        int64_t pass = rank > RANKS_OF_COLUMNS ? COLUMNS_OF_TILES : COLUMNS_A_PASS;
        bfloat16 *split = pairs + own_size(0, s->max_rank);
        done += own;
        if (!rank || first >= last) continue;
        split_h(s->h + begin * (int64_t)s->max_rank, s->max_rank, rank, s->weight + begin,
                t->scale[entry + s->adapter[g]], tokens, split);
        for (int64_t c = first; c < last; c += pass) {
            int64_t width = last - c < pass ? last - c : pass;
            pair_columns(b + c, out, rank, width, pairs);
            WRITTEN;
            expand_part(s, g, rank, split, pairs, width, y + c, out);
        }
    }
}

FOR_AMX static void free_tiles(void) { _tile_release(); }

#else

static int64_t own_size(int64_t num_tokens, int64_t max_rank) { return 0; }
static void gather_inputs(const Step *s, const bfloat16 *x, int64_t in, int me, int all) {}
static void shrink_in_tiles(const Table *t, int64_t entry, const Step *s, const bfloat16 *x, int64_t in, int me, int all) {}
static void expand_in_tiles(const Table *t, int64_t entry, const Step *s, int64_t out, bfloat16 *y, int me, int all) {}
static void free_tiles(void) {}

#endif
