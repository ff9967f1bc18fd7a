/* Adds many adapters' LoRA to one linear layer's output, for steps of few tokens, and of many where a CPU has tiles for
   them (decode_amx.h). The formula stands in grouped.py.

   Each adapter's bytes are read where they lie, once for all of its tokens; sums are made in float32 and rounded once.
   What a token gets does not depend on the others. */

#include "dense/tile.h"

#define SHARING 4    /* tokens of one adapter that share a pass over a strip of its B */
#define COLUMNS 1024 /* of a strip: long stretches of memory, which the CPU foresees, and sums that its first cache keeps */
#define FREE 4       /* tokens whose products take as long as reading what they are multiplied with */
#define ALIGNED 32   /* columns: the border between two threads' shares */

/* What the active adapters do to every module: entry [module * num_adapters + adapter]; rank 0: nothing. */
typedef struct {
    int64_t num_adapters;
    const int64_t *in, *out; /* by module */
    const uint64_t *a, *b;   /* addresses: A is [rank, in], B transposed [rank, out] */
    const int32_t *rank;
    const float *scale;
} Table;

/* Whose tokens a step has: group g are the rows token[begin[g]] ... token[begin[g + 1] - 1] of x and y. */
typedef struct {
    int32_t num_groups, num_threads, max_rank, in_tiles;
    const int32_t *adapter, *begin, *token;
    const float *weight; /* by place in `token`: multiplies the adapter's scale */
    float *x, *h;        /* scratch: TOKENS_A_PASS tokens for each thread, in tiles all tokens; and [tokens, max_rank] */
    int64_t x_size;      /* bytes that each thread has in x */
    void *own;           /* in tiles: loraplex_lora_decode_own bytes for each thread */
} Step;

/* sums[k][c] += sum_j h[k * stride + j] * b[j * out + c] for c < width <= COLUMNS, `rows` of b and `tokens`, which are
   constants where it is called. Sums lie as strips are loaded, in vectors of type V. */
#define DEFINE_STRIP(T, V, FOR_CPU)                                                               \
    FOR_##V INLINED void strip_##T##_##V(const T *restrict b, int64_t out, int64_t width,         \
                                         const float *restrict h, int64_t stride, int ahead,      \
                                         float (*restrict sums)[COLUMNS], int rows, int tokens) { \
        const int size = sizeof(V) / sizeof(float);                                               \
        for (int64_t c = 0; c < width; c += LINE / sizeof(T))                                     \
            for (int next = 0; next < ahead; next++) READ_AHEAD(b + (rows + next) * out + c);     \
        int64_t c = 0;                                                                            \
        for (; c + 2 * size <= width; c += 2 * size) {                                            \
            V numbers[4][2];                                                                      \
            UNROLLED for (int i = 0; i < rows; i++) LOAD_STRIP_##T(b + i * out + c, numbers[i]);  \
            UNROLLED for (int k = 0; k < tokens; k++) UNROLLED for (int n = 0; n < 2; n++) {      \
                V lanes;                                                                          \
                memcpy(&lanes, sums[k] + c + n * size, sizeof lanes);                             \
                UNROLLED for (int i = 0; i < rows; i++) lanes += h[k * stride + i] * numbers[i][n]; \
                memcpy(sums[k] + c + n * size, &lanes, sizeof lanes);                             \
            }                                                                                     \
        }                                                                                         \
        for (; c < width; c++)                                                                    \
            UNROLLED for (int k = 0; k < tokens; k++)                                             \
                for (int i = 0; i < rows; i++) sums[k][c] += h[k * stride + i] * widen_##T(b[i * out + c]); \
    }                                                                                             \
    FOR_##V INLINED void all_strips_##T##_##V(const T *b, int64_t out, int64_t width, const float *h, \
                                              int64_t stride, int rank, float (*sums)[COLUMNS], int tokens) { \
        int j = 0;                                                                                \
        for (; j + 4 <= rank; j += 4) {                                                           \
            int ahead = rank - j - 4 < 4 ? rank - j - 4 : 4;                                      \
            strip_##T##_##V(b + j * out, out, width, h + j, stride, ahead, sums, 4, tokens);      \
        }                                                                                         \
        for (; j < rank; j++)                                                                     \
            strip_##T##_##V(b + j * out, out, width, h + j, stride, 0, sums, 1, tokens);          \
    }                                                                                             \
    FOR_CPU static void strips_##T##_##V(const T *b, int64_t out, int64_t width, const float *h,  \
                                         int64_t stride, int rank, float (*sums)[COLUMNS], int tokens) { \
        if (tokens == 4) all_strips_##T##_##V(b, out, width, h, stride, rank, sums, 4);           \
        else if (tokens == 3) all_strips_##T##_##V(b, out, width, h, stride, rank, sums, 3);      \
        else if (tokens == 2) all_strips_##T##_##V(b, out, width, h, stride, rank, sums, 2);      \
        else all_strips_##T##_##V(b, out, width, h, stride, rank, sums, 1);                       \
    }                                                                                             \
    FOR_CPU static void add_strips_##T##_##V(T *y, const float *sums, float scale, int64_t width) { \
        const int size = sizeof(V) / sizeof(float);                                               \
        int64_t c = 0;                                                                            \
        for (; c + 2 * size <= width; c += 2 * size) {                                            \
            V lanes[2], some;                                                                     \
            LOAD_STRIP_##T(y + c, lanes);                                                         \
            UNROLLED for (int n = 0; n < 2; n++) {                                                \
                memcpy(&some, sums + c + n * size, sizeof some);                                  \
                lanes[n] += scale * some;                                                         \
            }                                                                                     \
            STORE_STRIP_##T(y + c, lanes);                                                        \
        }                                                                                         \
        for (; c < width; c++) y[c] = narrow_##T(widen_##T(y[c]) + scale * sums[c]);              \
    }

/* Threads share the adapters out, cutting one where they must: what a thread reads lies together.
   A group's work: its adapter is read once, and multiplied with each of its tokens. */
static int64_t work(int rank, int tokens) { return (int64_t)rank * (FREE + tokens); }

static int64_t all_work(const Table *t, int64_t entry, const Step *s) {
    int64_t all = 0;
    for (int g = 0; g < s->num_groups; g++)
        all += work(t->rank[entry + s->adapter[g]], s->begin[g + 1] - s->begin[g]);
    return all;
}

/* Where thread `me` begins in a group of `size` pieces, whose work is `own` of the `whole`, with `done` before it. */
static int64_t share(int64_t whole, int64_t done, int64_t own, int64_t size, int64_t aligned, int me, int all) {
    int64_t begin = whole * me / all - done;
    if (begin <= 0) return 0;
    if (begin >= own) return size;
    int64_t at = (size * begin / own + aligned / 2) / aligned * aligned;
    return at < size ? at : size;
}

#include "decode_amx.h"

/* One thread's part of each of the two passes; the caller keeps them apart. Tokens are gathered by each thread that needs
   them: what another gathers would have to come from its cache. */
#define DEFINE_PASSES(T)                                                                          \
    static void gather_##T(const Step *s, const T *x, int64_t in, int first, int tokens, int widens, \
                           void *gathered) {                                                      \
        if (!widens) {                                                                            \
            pack_pass((const bfloat16 *)x, in, s->token, first, tokens, gathered, 0, 1);          \
            return;                                                                               \
        }                                                                                         \
        for (int k = 0; k < tokens; k++)                                                          \
            for (int64_t i = 0; i < in; i++)                                                      \
                ((float *)gathered)[k * in + i] = widen_##T(x[s->token[first + k] * in + i]);     \
    }                                                                                             \
    static void shrink_tokens_##T(const Table *t, int64_t entry, const Step *s, const T *x,       \
                                  int64_t in, int me, int all) {                                  \
        int widens = sizeof(T) == sizeof(float) || !takes_pairs();                                \
        float sums[TOKENS_A_PASS * TILE];                                                         \
        void *gathered = (char *)s->x + me * s->x_size;                                           \
        int64_t whole = all_work(t, entry, s), done = 0;                                          \
        for (int g = 0; g < s->num_groups; g++) {                                                 \
            const T *a = (const T *)(uintptr_t)t->a[entry + s->adapter[g]];                       \
            const T *next = (const T *)(uintptr_t)t->a[entry + s->adapter[g + 1 < s->num_groups ? g + 1 : g]]; \
            int rank = t->rank[entry + s->adapter[g]], end = s->begin[g + 1];                     \
            int64_t own = work(rank, end - s->begin[g]);                                          \
            int first = share(whole, done, own, rank, 1, me, all);                                \
            int last = share(whole, done, own, rank, 1, me + 1, all);                             \
            done += own;                                                                          \
            for (int k = s->begin[g]; first < last && k < end; k += TOKENS_A_PASS) {              \
                int n = end - k < TOKENS_A_PASS ? end - k : TOKENS_A_PASS;                        \
                gather_##T(s, x, in, k, n, widens, gathered);                                     \
                for (int j = first; j < last; j += TILE) {                                        \
                    int rows = last - j < TILE ? last - j : TILE;                                 \
                    memset(sums, 0, n * TILE * sizeof(float));                                    \
                    if (widens) BY_WIDTH(tile_##T)(a + j * in, gathered, in, rows, n, sums, NULL); \
                    else                                                                          \
                        tile_pairs((const bfloat16 *)(a + j * in), gathered, in, rows, n, sums,   \
                                   (const bfloat16 *)(j + rows < last ? a + (j + rows) * in : next), 1); \
                    for (int i = 0; i < n; i++)                                                   \
                        memcpy(s->h + (int64_t)(k + i) * s->max_rank + j, sums + i * TILE,        \
                               rows * sizeof(float));                                             \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }                                                                                             \
    static void expand_tokens_##T(const Table *t, int64_t entry, const Step *s, int64_t out,      \
                                  T *y, int me, int all) {                                        \
        int64_t whole = all_work(t, entry, s), done = 0;                                          \
        float sums[SHARING][COLUMNS] __attribute__((aligned(LINE)));                              \
        for (int g = 0; g < s->num_groups; g++) {                                                 \
            const T *b = (const T *)(uintptr_t)t->b[entry + s->adapter[g]];                       \
            int rank = t->rank[entry + s->adapter[g]], end = s->begin[g + 1];                     \
            float scale = t->scale[entry + s->adapter[g]];                                        \
            int64_t own = work(rank, end - s->begin[g]);                                          \
            int64_t first = share(whole, done, own, out, ALIGNED, me, all);                       \
            int64_t last = share(whole, done, own, out, ALIGNED, me + 1, all);                    \
            done += own;                                                                          \
            for (int64_t c = first; rank && c < last; c += COLUMNS) {                             \
                int64_t width = last - c < COLUMNS ? last - c : COLUMNS;                          \
                for (int k = s->begin[g]; k < end; k += SHARING) {                                \
                    int n = end - k < SHARING ? end - k : SHARING;                                \
                    for (int i = 0; i < n; i++) memset(sums[i], 0, width * sizeof(float));        \
                    BY_WIDTH(strips_##T)(                                                         \
                        b + c, out, width, s->h + (int64_t)k * s->max_rank, s->max_rank, rank, sums, n); \
                    for (int i = 0; i < n; i++)                                                   \
                        BY_WIDTH(add_strips_##T)(                                                 \
                            y + s->token[k + i] * out + c, sums[i], scale * s->weight[k + i], width); \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }

static int is_touched(const Table *t, int64_t entry, const Step *s) {
    for (int g = 0; g < s->num_groups; g++)
        if (t->rank[entry + s->adapter[g]]) return 1;
    return 0;
}

const int64_t loraplex_lora_decode_pass = TOKENS_A_PASS;

/* 0: there are no tiles. */
int64_t loraplex_lora_decode_own(int64_t num_tokens, int64_t max_rank) {
    return takes_tiles() ? own_size(num_tokens, max_rank) * sizeof(bfloat16) : 0;
}

static void decode_in_tiles(const Table *t, int64_t module, const Step *s, const bfloat16 *x, bfloat16 *y) {
    int64_t entry = module * t->num_adapters, in = t->in[module], out = t->out[module];
    _Pragma("omp parallel num_threads(s->num_threads) if (s->num_threads > 1)") {
        int me = omp_get_thread_num(), all = omp_get_num_threads();
        gather_inputs(s, x, in, me, all);
        _Pragma("omp barrier");
        shrink_in_tiles(t, entry, s, x, in, me, all);
        _Pragma("omp barrier");
        expand_in_tiles(t, entry, s, out, y, me, all);
        free_tiles();
    }
}

#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_lora_decode_##T(const Table *t, int64_t module, const Step *s, const T *x, T *y) { \
        int64_t entry = module * t->num_adapters;                                                 \
        if (!is_touched(t, entry, s)) return;                                                     \
        int64_t in = t->in[module], out = t->out[module];                                         \
        if (sizeof(T) == sizeof(bfloat16) && s->in_tiles) {                                       \
            decode_in_tiles(t, module, s, (const bfloat16 *)x, (bfloat16 *)y);                    \
            return;                                                                               \
        }                                                                                         \
        _Pragma("omp parallel num_threads(s->num_threads) if (s->num_threads > 1)") {             \
            int me = omp_get_thread_num(), all = omp_get_num_threads();                           \
            shrink_tokens_##T(t, entry, s, x, in, me, all);                                       \
            _Pragma("omp barrier");                                                               \
            expand_tokens_##T(t, entry, s, out, y, me, all);                                      \
        }                                                                                         \
    }

#if HAS_BROAD
DEFINE_STRIP(float, Broad, FOR_Broad)
DEFINE_STRIP(bfloat16, Broad, FOR_Broad)
#endif

#define DEFINE(T) DEFINE_STRIP(T, Lanes, FOR_EACH_CPU) DEFINE_PASSES(T) DEFINE_ENTRY(T)

DEFINE(float)
DEFINE(bfloat16)
