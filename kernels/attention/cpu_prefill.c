/* Attention of many tokens of a sequence over keys and values that lie scattered in a paged cache. The formula stands in
   paged.py.

   Keys and values are gathered first, widened, or for tile registers in tiles. Then, for each query head and each block
   of queries, KEYS positions at a time: scores, a softmax that goes along, weighted sums. A query has a lane of the
   vectors to itself all the way, so that lanes are never added up. */

#include "attention/prefill_amx.h"
#include "attention/softmax.h"
#include "width.h"

#define KEYS 96      /* positions at a time: a multiple of INPUTS */
#define VECTORS 2    /* of queries, in a block */
#define ROWS_Lanes 6 /* that meet VECTORS: sums held in registers */
#define ROWS_Broad 12
#define FEW_ROWS 4
#define WIDEST 512 /* numbers of a key or value */

/* Tokens of one sequence: their rows, the position of the first, and where all positions up to the last one lie. */
typedef struct {
    int64_t begin, end, start;
    const int64_t *slots; /* [start + end - begin]: the cache row of each */
} Run;

typedef struct {
    int64_t heads, key_heads, width, value_width;
    int64_t by_token, by_head; /* token t's head h begins in q at number t * by_token + h * by_head */
    int64_t window;            /* positions, or 0 */
    float scale, cap;          /* cap: or 0 */
    const float *sinks;        /* [heads], or NULL */
    const Run *runs;
    int64_t num_runs, num_threads, scratch_bytes;
} Call;

typedef enum { WIDENED, TILES } Form;

/* The first position that is gathered: what nobody looks at is left out. */
static int64_t first_of_run(const Call *c, const Run *run) {
    return c->window && run->start + 1 > c->window ? (run->start + 1 - c->window) / INPUTS * INPUTS : 0;
}

static int64_t positions_of(const Call *c, const Run *run) {
    return run->start + run->end - run->begin - first_of_run(c, run);
}

/* Bytes of one key head's keys and of its values, in whole lines. */
static int64_t key_bytes(const Call *c, Form form, int64_t positions) {
#if HAS_TILES
    if (form == TILES) return tiled_keys(positions, c->width) * sizeof(bfloat16);
#endif
    return (positions * c->width * sizeof(float) + LINE - 1) / LINE * LINE;
}

static int64_t value_bytes(const Call *c, Form form, int64_t positions) {
#if HAS_TILES
    if (form == TILES) return tiled_values(positions, c->value_width) * sizeof(bfloat16);
#endif
    return (positions * c->value_width * sizeof(float) + LINE - 1) / LINE * LINE;
}

static int64_t gathered_bytes(const Call *c, Form form, const Run *run) {
    int64_t positions = positions_of(c, run);
    return c->key_heads * (key_bytes(c, form, positions) + value_bytes(c, form, positions));
}

/* A block of queries of one head: which it is, and what it looks at. */
typedef struct {
    const Call *call;
    int64_t head, count, position; /* how many, and where the first is */
    int64_t first, last;           /* positions: where what is gathered begins, and where what is looked at ends */
    const void *keys, *values;     /* gathered, of its key head */
} Block;

/* sums[v][m] += sum of a[m * row + k * column] * b[v][k] over k < depth, for m < rows, a constant. From one v to the next
   it is `stride` and `b_stride`. `begins`: they are zero before. */
#define DEFINE_MULTIPLY(V)                                                                        \
    FOR_##V INLINED void multiply_rows_##V(const float *a, int64_t row, int64_t column, int64_t depth, const float *b, \
                                           int64_t b_stride, float *sums, int64_t stride, int begins, int rows) { \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        V all[ROWS_##V][VECTORS];                                                                 \
        UNROLLED_16 for (int m = 0; m < rows; m++)                                                \
            UNROLLED for (int v = 0; v < VECTORS; v++)                                            \
                all[m][v] = begins ? (V){0} : LOAD_float_##V(sums + v * stride + m * lanes);      \
        for (int64_t k = 0; k < depth; k++) {                                                     \
            V some[VECTORS];                                                                      \
            UNROLLED for (int v = 0; v < VECTORS; v++) some[v] = LOAD_float_##V(b + v * b_stride + k * lanes); \
            UNROLLED_16 for (int m = 0; m < rows; m++)                                            \
                UNROLLED for (int v = 0; v < VECTORS; v++) all[m][v] += some[v] * a[m * row + k * column]; \
        }                                                                                         \
        UNROLLED_16 for (int m = 0; m < rows; m++)                                                \
            UNROLLED for (int v = 0; v < VECTORS; v++) memcpy(sums + v * stride + m * lanes, &all[m][v], sizeof(V)); \
    }                                                                                             \
    FOR_##V INLINED void multiply_##V(const float *a, int64_t row, int64_t column, int64_t rows, int64_t depth, \
                                      const float *b, int64_t b_stride, float *sums, int64_t stride, int begins) { \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        int64_t m = 0;                                                                            \
        for (; m + ROWS_##V <= rows; m += ROWS_##V)                                               \
            multiply_rows_##V(a + m * row, row, column, depth, b, b_stride, sums + m * lanes, stride, begins, ROWS_##V); \
        for (; m + FEW_ROWS <= rows; m += FEW_ROWS)                                               \
            multiply_rows_##V(a + m * row, row, column, depth, b, b_stride, sums + m * lanes, stride, begins, FEW_ROWS); \
        for (; m < rows; m++)                                                                     \
            multiply_rows_##V(a + m * row, row, column, depth, b, b_stride, sums + m * lanes, stride, begins, 1); \
    }

DEFINE_MULTIPLY(Lanes)
#if HAS_BROAD
DEFINE_MULTIPLY(Broad)
#endif

/* What a form does: `query` of a block, scores and sums for positions from `at` on, and what the block gives. */
#define DEFINE_WIDENED(T, V)                                                                      \
    FOR_##V INLINED void pack_##T##_##V(const Block *b, const T *q, float *query) {               \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        int64_t width = b->call->width;                                                           \
        for (int t = 0; t < VECTORS * lanes; t++)                                                 \
            for (int64_t i = 0; i < width; i++)                                                   \
                query[(t / lanes * width + i) * lanes + t % lanes] =                              \
                    t < b->count ? widen_##T(q[t * b->call->by_token + i]) : 0;                   \
    }                                                                                             \
    FOR_##V INLINED void score_##T##_##V(const Block *b, const float *query, int64_t at, int count, float *scores) { \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        int64_t width = b->call->width;                                                           \
        const float *keys = (const float *)b->keys + (at - b->first) * width;                     \
        multiply_##V(keys, width, 1, count, width, query, width * lanes, scores, KEYS * lanes, 1); \
    }                                                                                             \
    FOR_##V INLINED void gather_##T##_##V(const Block *b, const void *weights, int64_t at, int count, float *sums, \
                                          int64_t stride) {                                       \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        int64_t width = b->call->value_width;                                                     \
        const float *values = (const float *)b->values + (at - b->first) * width;                 \
        multiply_##V(values, 1, width, width, count, weights, KEYS * lanes, sums, stride, 0);     \
    }                                                                                             \
    FOR_##V INLINED void divide_##T##_##V(const Block *b, const float *sums, int64_t stride, const float *total, \
                                          T *y, int64_t row) {                                    \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        for (int t = 0; t < b->count; t++)                                                        \
            for (int64_t i = 0; i < b->call->value_width; i++)                                    \
                y[t * row + i] = narrow_##T(sums[t / lanes * stride + i * lanes + t % lanes] / total[t]); \
    }

DEFINE_WIDENED(float, Lanes) DEFINE_WIDENED(bfloat16, Lanes)
#if HAS_BROAD
DEFINE_WIDENED(float, Broad) DEFINE_WIDENED(bfloat16, Broad)
#endif

#if HAS_TILES
FOR_AMX INLINED void pack_bfloat16_tiles(const Block *b, const bfloat16 *q, float *query) {
    pack_queries(q, b->call->by_token, b->count, b->call->width, (bfloat16 *)query);
    WRITTEN;
}
FOR_AMX INLINED void score_bfloat16_tiles(const Block *b, const float *query, int64_t at, int count, float *scores) {
    const bfloat16 *keys = (const bfloat16 *)b->keys + tiled_keys(at - b->first, b->call->width);
    score_in_tiles((const bfloat16 *)query, keys, b->call->width, count, scores, KEYS * SIDE);
}
FOR_AMX INLINED void gather_bfloat16_tiles(const Block *b, const void *weights, int64_t at, int count, float *sums,
                                           int64_t stride) {
    const bfloat16 *values = (const bfloat16 *)b->values + tiled_values(at - b->first, b->call->value_width);
    gather_in_tiles(weights, KEYS * SIDE, values, b->call->value_width, count, sums, stride);
}
FOR_AMX INLINED void divide_bfloat16_tiles(const Block *b, const float *sums, int64_t stride, const float *total,
                                           bfloat16 *y, int64_t row) {
    divide_tiles(sums, stride, total, b->count, b->call->value_width, y, row);
}
#endif

/* A block in a form: whose vectors are V, and that wants `STEP` positions at a time and its weights in PAIRS, or not. */
#define DEFINE_ATTEND(T, FORM, V, FOR_CPU, STEP, PAIRS)                                           \
    FOR_CPU static void attend_##T##_##FORM(const Block *b, const T *q, T *y) {                   \
        const Call *c = b->call;                                                                  \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        float query[VECTORS * WIDEST * sizeof(V) / sizeof(float)] __attribute__((aligned(LINE))); \
        float sums[VECTORS * WIDEST * sizeof(V) / sizeof(float)] __attribute__((aligned(LINE)));  \
        float scores[VECTORS * KEYS * sizeof(V) / sizeof(float)] __attribute__((aligned(LINE)));  \
        bfloat16 pairs[VECTORS * KEYS * sizeof(V) / sizeof(float)] __attribute__((aligned(LINE))); \
        V most[VECTORS], total[VECTORS], shrinks;                                                 \
        float factor = c->cap ? LOG2_E : c->scale * LOG2_E;                                       \
        int64_t stride = (c->value_width + INPUTS - 1) / INPUTS * INPUTS * lanes;                 \
        int64_t oldest = c->window && b->position + 1 > c->window ? b->position + 1 - c->window : 0; \
        UNROLLED for (int v = 0; v < VECTORS; v++) {                                              \
            most[v] = (V){0} + (c->sinks ? c->sinks[b->head] * LOG2_E / factor : LOWEST);         \
            total[v] = (V){0} + (c->sinks ? 1.0f : 0.0f);                                         \
        }                                                                                         \
        memset(sums, 0, VECTORS * stride * sizeof(float));                                        \
        pack_##T##_##FORM(b, q, query);                                                           \
        for (int64_t at = oldest / INPUTS * INPUTS; at < b->last; at += KEYS) {                   \
            int there = b->last - at < KEYS ? b->last - at : KEYS, count = (there + STEP - 1) / STEP * STEP; \
            score_##T##_##FORM(b, query, at, PAIRS ? count : there, scores);                      \
            UNROLLED for (int v = 0; v < VECTORS; v++) {                                          \
                float *own = scores + v * KEYS * lanes;                                           \
                int ahead = at - b->position - v * lanes, window = c->window;                     \
                if (c->cap) cap_##V(own, count, c->scale, c->cap);                                \
                if (ahead + count > 1 || (window && ahead <= lanes - window)) mask_##V(own, count, ahead, window); \
                weigh_##V(own, count, factor, &most[v], &total[v], &shrinks, PAIRS ? pairs + v * KEYS * lanes : NULL); \
                int is_less = 0;                                                                  \
                for (int t = 0; t < lanes; t++) is_less |= !(shrinks[t] >= 1);                    \
                for (int64_t i = 0; is_less && i < stride; i += lanes) {                          \
                    V some = LOAD_float_##V(sums + v * stride + i) * shrinks;                     \
                    memcpy(sums + v * stride + i, &some, sizeof some);                            \
                }                                                                                 \
            }                                                                                     \
            gather_##T##_##FORM(b, PAIRS ? (void *)pairs : scores, at, PAIRS ? count : there, sums, stride); \
        }                                                                                         \
        divide_##T##_##FORM(b, sums, stride, (float *)total, y, c->heads * c->value_width);       \
    }

DEFINE_ATTEND(float, Lanes, Lanes, FOR_EACH_CPU, 2, 0)
DEFINE_ATTEND(bfloat16, Lanes, Lanes, FOR_EACH_CPU, 2, 0)
#if HAS_BROAD
DEFINE_ATTEND(float, Broad, Broad, FOR_Broad, 2, 0)
DEFINE_ATTEND(bfloat16, Broad, Broad, FOR_Broad, 2, 0)
#endif
#if HAS_TILES
DEFINE_ATTEND(bfloat16, tiles, Broad, FOR_AMX, INPUTS, 1)
#endif

#define DEFINE_COPY(T)                                                                            \
    FOR_EACH_CPU static void copy_##T(const T *from, int64_t count, float *to) {                  \
        for (int64_t i = 0; i < count; i++) to[i] = widen_##T(from[i]);                           \
    }

DEFINE_COPY(float)
DEFINE_COPY(bfloat16)

#if HAS_TILES
static void gather_tiles(const Call *c, const Run *run, const bfloat16 *keys, const bfloat16 *values, int64_t head,
                         int64_t begin, bfloat16 *own_keys, bfloat16 *own_values) {
    int64_t first = first_of_run(c, run), count = positions_of(c, run) - begin;
    const bfloat16 *k[INPUTS], *v[INPUTS];
    for (int n = 0; n < INPUTS && n < count; n++) {
        int64_t place = run->slots[first + begin + n] * c->key_heads + head;
        k[n] = keys + place * c->width;
        v[n] = values + place * c->value_width;
    }
    tile_keys(k, count < INPUTS ? count : INPUTS, c->width, own_keys + tiled_keys(begin, c->width));
    tile_values(v, count < INPUTS ? count : INPUTS, c->value_width, own_values + tiled_values(begin, c->value_width));
}
#else
static void gather_tiles(const Call *c, const Run *run, const bfloat16 *keys, const bfloat16 *values, int64_t head,
                         int64_t begin, bfloat16 *own_keys, bfloat16 *own_values) {}
#endif

/* One thread's part of a run's keys and values, INPUTS positions of a head at a time. Each head's keys come first, then
   each head's values. */
#define DEFINE_GATHER_RUN(T)                                                                      \
    static void gather_run_##T(const Call *c, Form form, const Run *run, const T *keys, const T *values, char *to, \
                               int64_t me, int64_t all) {                                         \
        int64_t first = first_of_run(c, run), positions = positions_of(c, run);                   \
        int64_t own_keys = key_bytes(c, form, positions), own_values = value_bytes(c, form, positions); \
        int64_t parts = (positions + INPUTS - 1) / INPUTS, pieces = parts * c->key_heads;         \
        for (int64_t n = pieces * me / all; n < pieces * (me + 1) / all; n++) {                   \
            int64_t head = n / parts, begin = n % parts * INPUTS;                                 \
            char *k = to + head * own_keys, *v = to + c->key_heads * own_keys + head * own_values; \
            if (form == TILES) {                                                                  \
                gather_tiles(c, run, (const bfloat16 *)keys, (const bfloat16 *)values, head, begin, (bfloat16 *)k, \
                             (bfloat16 *)v);                                                      \
                continue;                                                                         \
            }                                                                                     \
            for (int64_t i = begin; i < positions && i < begin + INPUTS; i++) {                   \
                int64_t place = run->slots[first + i] * c->key_heads + head;                      \
                copy_##T(keys + place * c->width, c->width, (float *)k + i * c->width);           \
                copy_##T(values + place * c->value_width, c->value_width, (float *)v + i * c->value_width); \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_GATHER_RUN(float)
DEFINE_GATHER_RUN(bfloat16)

static Form form_of_float(void) { return WIDENED; }
static Form form_of_bfloat16(void) { return takes_tiles() ? TILES : WIDENED; }

static void attend_in_float(Form form, const Block *b, const float *q, float *y) { BY_WIDTH(attend_float)(b, q, y); }

static void attend_in_bfloat16(Form form, const Block *b, const bfloat16 *q, bfloat16 *y) {
#if HAS_TILES
    if (form == TILES) {
        attend_bfloat16_tiles(b, q, y);
        return;
    }
#endif
    BY_WIDTH(attend_bfloat16)(b, q, y);
}

static int64_t queries_of(Form form) { return VECTORS * (form == TILES || takes_broad() ? SIDE : LANES); }

static int64_t blocks_of(Form form, const Run *run) {
    return (run->end - run->begin + queries_of(form) - 1) / queries_of(form);
}

/* The n-th block of a run: heads one after another, of each what looks at most first. */
#define DEFINE_PIECE(T)                                                                           \
    static void attend_piece_##T(const Call *c, Form form, const Run *run, int64_t n, const T *q, const char *gathered, \
                                 T *y) {                                                          \
        int64_t blocks = blocks_of(form, run), most = queries_of(form), positions = positions_of(c, run); \
        int64_t head = n / blocks, key_head = head / (c->heads / c->key_heads);                   \
        int64_t t = (blocks - 1 - n % blocks) * most, left = run->end - run->begin - t;           \
        int64_t own_keys = key_bytes(c, form, positions), own_values = value_bytes(c, form, positions); \
        Block block = {c, head, left < most ? left : most, run->start + t, first_of_run(c, run)}; \
        block.last = block.position + block.count;                                                \
        block.keys = gathered + key_head * own_keys;                                              \
        block.values = gathered + c->key_heads * own_keys + key_head * own_values;                \
        attend_in_##T(form, &block, q + (run->begin + t) * c->by_token + head * c->by_head,       \
                      y + ((run->begin + t) * c->heads + head) * c->value_width);                 \
    }

DEFINE_PIECE(float)
DEFINE_PIECE(bfloat16)

/* Runs from `first` on are gathered together as far as there is room; there is for one. Result: where they end. */
static int64_t end_of_batch(const Call *c, Form form, int64_t first) {
    int64_t last = first + 1, bytes = gathered_bytes(c, form, c->runs + first);
    while (last < c->num_runs && (bytes += gathered_bytes(c, form, c->runs + last)) <= c->scratch_bytes) last++;
    return last;
}

/* Bytes to gather runs in: all of them at once, but for so many bytes or the longest. */
int64_t loraplex_cpu_prefill_scratch(const Call *c, int is_bfloat16, int64_t most) {
    Form form = is_bfloat16 ? form_of_bfloat16() : form_of_float();
    int64_t all = 0, longest = 0;
    for (int64_t n = 0; n < c->num_runs; n++) {
        int64_t own = gathered_bytes(c, form, c->runs + n);
        all += own;
        longest = own > longest ? own : longest;
    }
    return all <= most ? all : longest > most ? longest : most;
}

/* q: [heads] of each token as `by_token` and `by_head` say. keys: [slots, key_heads, width]. values: [slots, key_heads,
   value_width]. y: [tokens, heads, value_width], of which rows in no run stay as they are. scratch: in 64-byte lines.
   Threads take the next piece of work when they are done with one. */
#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_cpu_prefill_##T(const Call *c, const T *q, const T *keys, const T *values, T *y, char *scratch) { \
        Form form = form_of_##T();                                                                \
        int64_t next = 0;                                                                         \
        _Pragma("omp parallel num_threads(c->num_threads) if (c->num_threads > 1)") {             \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            for (int64_t first = 0, last; first < c->num_runs; first = last) {                    \
                char *gathered = scratch;                                                         \
                last = end_of_batch(c, form, first);                                              \
                for (int64_t r = first; r < last; gathered += gathered_bytes(c, form, c->runs + r++)) \
                    gather_run_##T(c, form, c->runs + r, keys, values, gathered, me, all);        \
                _Pragma("omp barrier")                                                            \
                if (form == TILES) begin_tiles();                                                 \
                int64_t r = first, done = 0, n = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);  \
                for (gathered = scratch; r < last;) {                                             \
                    int64_t own = blocks_of(form, c->runs + r) * c->heads;                        \
                    if (n < done + own) {                                                         \
                        attend_piece_##T(c, form, c->runs + r, n - done, q, gathered, y);         \
                        n = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);                       \
                    } else {                                                                      \
                        done += own;                                                              \
                        gathered += gathered_bytes(c, form, c->runs + r++);                       \
                    }                                                                             \
                }                                                                                 \
                if (form == TILES) end_tiles();                                                   \
                _Pragma("omp barrier")                                                            \
                if (me == 0) next = 0; /* which nobody reads before the next barrier */           \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_ENTRY(float)
DEFINE_ENTRY(bfloat16)
