/* Attention of single tokens over keys and values that lie scattered in a paged cache. The formula stands in paged.py.

   For each row and each key head, POSITIONS at a time: the scores of the query heads that share the key head, then a
   softmax that goes along. Keys and values are read where they lie, once for MEMBERS query heads; all sums are float32.
   What a row gives depends on no other row. */

#include "floats.h"

#include <math.h>

#define POSITIONS 64
#define MEMBERS 8  /* query heads of one piece of work */
#define HEADS 4    /* of them, that meet TOGETHER keys at a time, or one strip of values: sums held in registers */
#define TOGETHER 4
#define WIDEST 512 /* numbers of a key or value */

typedef struct {
    int64_t rows, heads, key_heads, width, value_width;
    int64_t longest;        /* numbers in each row of `slots` */
    const int64_t *slots;   /* [rows, longest]: the cache row of each position */
    const int64_t *lengths; /* [rows]: positions, the token's own included; 0: the result is 0 */
    int64_t window;         /* positions, or 0 */
    float scale, cap;       /* cap: or 0 */
    const float *sinks;     /* [heads], or NULL */
    int64_t num_threads;
} Call;

/* e^x for x <= 0 in float32, lane by lane: 2^n times the Taylor series about 0 of what is left of x, at most ln 2 / 2,
   to the 7th power, which leaves out less than 6e-9. Below -87 it is that of -87; NaN stays NaN. */
INLINED void exponential(Lanes *x) {
    Lanes clipped = CHOOSE(*x < -87.0f, (Lanes){0} - 87.0f, *x);
    Integers n = __builtin_convertvector(clipped * 1.44269504f - 0.5f, Integers); /* towards 0 */
    Lanes whole = __builtin_convertvector(n, Lanes);
    Lanes r = clipped - whole * 0.693359375f + whole * 2.12194440e-4f; /* ln 2 in two parts */
    Lanes sum = 1.0f + r * (1.0f / 7);
    UNROLLED for (int k = 6; k > 0; k--) sum = 1.0f + r * sum * (1.0f / k);
    *x = (Lanes)((n + 127) << 23) * sum;
}

/* totals[j] = the sum of vectors[j]. */
INLINED void sum_each(const Lanes *vectors, float *totals) {
    Lanes halves[2];
    UNROLLED for (int k = 0; k < 2; k++) {
        Lanes a = vectors[2 * k], b = vectors[2 * k + 1];
        halves[k] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14)
                  + __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    }
    Lanes quarters = __builtin_shufflevector(halves[0], halves[1], 0, 1, 8, 9, 4, 5, 12, 13)
                   + __builtin_shufflevector(halves[0], halves[1], 2, 3, 10, 11, 6, 7, 14, 15);
    UNROLLED for (int j = 0; j < TOGETHER; j++) totals[j] = quarters[j] + quarters[j + TOGETHER];
}

/* The softmax of one query head, which goes along from block to block: its highest score and its total so far. */
typedef struct {
    float most, total;
} Softmax;

/* Turns a block's scores into weights; those up to the next LANES are overwritten. Result: what the sums so far shrink
   by. */
INLINED float weigh(Softmax *softmax, float *scores, int count, float cap) {
    int j = 0;
    if (cap != 0)
        for (; j < count; j++) scores[j] = cap * tanhf(scores[j] / cap);
    for (j = count; j % LANES; j++) scores[j] = -INFINITY;
    Lanes highest = (Lanes){0} - INFINITY, shrinks, total = {0};
    for (j = 0; j < count; j += LANES) {
        Lanes some = LOAD_float(scores + j);
        highest = CHOOSE(some > highest, some, highest);
    }
    float most = softmax->most;
    for (j = 0; j < LANES; j++) most = highest[j] > most ? highest[j] : most;
    shrinks = (Lanes){0} + (softmax->most - most);
    exponential(&shrinks);
    for (j = 0; j < count; j += LANES) {
        Lanes some = LOAD_float(scores + j) - most;
        exponential(&some);
        *(AnyLanes *)(scores + j) = some;
        total += some;
    }
    softmax->most = most;
    softmax->total = softmax->total * shrinks[0] + SUM(total);
    return shrinks[0];
}

/* scores[h * POSITIONS + j] = q[h]·keys[j] for TOGETHER keys and `heads`, a constant. q: [heads, width], strips as they
   are loaded. */
#define DEFINE_SCORE(T)                                                                           \
    INLINED void score_##T(const float *q, int64_t width, const T *const *keys, float *scores,    \
                           int heads) {                                                           \
        Lanes sums[HEADS][TOGETHER] = {{{0}}};                                                    \
        int64_t even = width / STRIP * STRIP;                                                     \
        for (int64_t i = 0; i < even; i += STRIP) {                                               \
            Lanes numbers[TOGETHER][2];                                                           \
            UNROLLED for (int j = 0; j < TOGETHER; j++) LOAD_STRIP_##T(keys[j] + i, numbers[j]);  \
            UNROLLED for (int s = 0; s < 2; s++)                                                  \
                UNROLLED for (int h = 0; h < heads; h++) {                                        \
                    Lanes query = LOAD_float(q + h * width + i + s * LANES);                      \
                    UNROLLED for (int j = 0; j < TOGETHER; j++) sums[h][j] += query * numbers[j][s]; \
                }                                                                                 \
        }                                                                                         \
        UNROLLED for (int h = 0; h < heads; h++) {                                                \
            float *totals = scores + h * POSITIONS;                                               \
            sum_each(sums[h], totals);                                                            \
            for (int64_t i = even; i < width; i++)                                                \
                for (int j = 0; j < TOGETHER; j++) totals[j] += q[h * width + i] * widen_##T(keys[j][i]); \
        }                                                                                         \
    }                                                                                             \
    INLINED void scores_of_##T(const float *q, int64_t width, const T *const *keys, float *scores, \
                               int count, int heads) {                                            \
        for (int j = 0; j < count; j += TOGETHER) score_##T(q, width, keys + j, scores + j, heads); \
    }                                                                                             \
    INLINED void ask_##T(const T *numbers, int64_t width) {                                       \
        for (int64_t i = 0; i < width; i += LINE / sizeof(T)) READ_AHEAD(numbers + i);            \
    }

/* sums[h][i] = shrinks[h] * sums[h][i] + sum of weights[h * POSITIONS + j] * values[j][i] over j < count, for `heads` in
   the strip from `first` on; `heads` is a constant. sums: [heads, stride], strips as they are loaded. */
#define DEFINE_GATHER(T)                                                                          \
    INLINED void gather_##T(float *sums, int64_t stride, const T *const *values, int64_t first,   \
                            const float *weights, int count, const float *shrinks, int heads) {   \
        Lanes lanes[HEADS][2];                                                                    \
        UNROLLED for (int h = 0; h < heads; h++)                                                  \
            UNROLLED for (int s = 0; s < 2; s++)                                                  \
                lanes[h][s] = LOAD_float(sums + h * stride + first + s * LANES) * shrinks[h];     \
        for (int j = 0; j < count; j++) {                                                         \
            Lanes numbers[2];                                                                     \
            LOAD_STRIP_##T(values[j] + first, numbers);                                           \
            UNROLLED for (int h = 0; h < heads; h++)                                              \
                UNROLLED for (int s = 0; s < 2; s++)                                              \
                    lanes[h][s] += numbers[s] * weights[h * POSITIONS + j];                       \
        }                                                                                         \
        UNROLLED for (int h = 0; h < heads; h++)                                                  \
            UNROLLED for (int s = 0; s < 2; s++)                                                  \
                *(AnyLanes *)(sums + h * stride + first + s * LANES) = lanes[h][s];               \
    }                                                                                             \
    INLINED void gather_all_##T(float *sums, int64_t out, const T *const *values,                 \
                                const float *weights, int count, const float *shrinks,            \
                                int heads) {                                                      \
        int64_t i = 0;                                                                            \
        for (; i + STRIP <= out; i += STRIP)                                                      \
            gather_##T(sums, out, values, i, weights, count, shrinks, heads);                     \
        for (; i < out; i++)                                                                      \
            for (int h = 0; h < heads; h++) {                                                     \
                float sum = sums[h * out + i] * shrinks[h];                                       \
                for (int j = 0; j < count; j++)                                                   \
                    sum += weights[h * POSITIONS + j] * widen_##T(values[j][i]);                  \
                sums[h * out + i] = sum;                                                          \
            }                                                                                     \
    }

/* One block of positions for `heads`, a constant. */
#define DEFINE_BLOCK(T)                                                                           \
    INLINED void block_##T(const Call *c, const float *q, const T *const *keys,                   \
                           const T *const *values, int count, Softmax *softmax, float *sums,      \
                           int heads) {                                                           \
        float scores[HEADS * POSITIONS], shrinks[HEADS];                                          \
        scores_of_##T(q, c->width, keys, scores, count, heads);                                   \
        for (int h = 0; h < heads; h++)                                                           \
            shrinks[h] = weigh(&softmax[h], scores + h * POSITIONS, count, c->cap);               \
        gather_all_##T(sums, c->value_width, values, scores, count, shrinks, heads);              \
    }

/* Strips as they are loaded, and back. */
#define DEFINE_ENDS(T)                                                                            \
    INLINED void scale_query_##T(const T *q, int64_t width, float scale, float *query) {          \
        Lanes lanes[2];                                                                           \
        int64_t i = 0;                                                                            \
        for (; i + STRIP <= width; i += STRIP) {                                                  \
            LOAD_STRIP_##T(q + i, lanes);                                                         \
            UNROLLED for (int s = 0; s < 2; s++)                                                  \
                *(AnyLanes *)(query + i + s * LANES) = lanes[s] * scale;                          \
        }                                                                                         \
        for (; i < width; i++) query[i] = scale * widen_##T(q[i]);                                \
    }                                                                                             \
    INLINED void divide_##T(const float *sums, int64_t out, float total, T *y) {                  \
        Lanes lanes[2];                                                                           \
        int64_t i = 0;                                                                            \
        for (; i + STRIP <= out; i += STRIP) {                                                    \
            UNROLLED for (int s = 0; s < 2; s++) lanes[s] = LOAD_float(sums + i + s * LANES) / total; \
            STORE_STRIP_##T(y + i, lanes);                                                        \
        }                                                                                         \
        for (; i < out; i++) y[i] = narrow_##T(sums[i] / total);                                  \
    }

/* One row's query heads `head` ... `head + members - 1`, which share a key head. */
#define DEFINE_ATTEND(T)                                                                          \
    FOR_EACH_CPU static void attend_##T(const Call *c, int64_t row, int64_t head, int members,    \
                                        const T *q, const T *keys, const T *values, T *y) {       \
        int64_t key_head = head / (c->heads / c->key_heads), length = c->lengths[row];            \
        int64_t width = c->width, out = c->value_width;                                           \
        const int64_t *slots = c->slots + row * c->longest;                                       \
        float queries[MEMBERS * WIDEST], sums[MEMBERS * WIDEST];                                  \
        Softmax softmax[MEMBERS];                                                                 \
        q += (row * c->heads + head) * width, y += (row * c->heads + head) * out;                 \
        for (int g = 0; g < members; g++)                                                         \
            scale_query_##T(q + g * width, width, c->scale, queries + g * width);                 \
        memset(sums, 0, members * out * sizeof(float));                                           \
        for (int g = 0; g < members; g++)                                                         \
            softmax[g] = c->sinks ? (Softmax){c->sinks[head + g], 1} : (Softmax){-INFINITY, 0};   \
        int64_t begin = c->window && length > c->window ? length - c->window : 0;                 \
        for (; begin < length; begin += POSITIONS) {                                              \
            int count = length - begin < POSITIONS ? length - begin : POSITIONS;                  \
            const T *k[POSITIONS], *v[POSITIONS];                                                 \
            for (int n = 0; n < count; n++) {                                                     \
                int64_t place = slots[begin + n] * c->key_heads + key_head;                       \
                k[n] = keys + place * width, v[n] = values + place * out;                         \
                ask_##T(v[n], out);                                                               \
                if (begin + POSITIONS + n < length)                                               \
                    ask_##T(keys + (slots[begin + POSITIONS + n] * c->key_heads + key_head) * width, width); \
            }                                                                                     \
            for (int n = count; n % TOGETHER; n++) k[n] = k[0]; /* whose scores are overwritten */ \
            for (int g = 0; g < members; g += HEADS) {                                            \
                const float *own = queries + g * width;                                           \
                if (members - g >= 4) block_##T(c, own, k, v, count, softmax + g, sums + g * out, 4); \
                else if (members - g == 3) block_##T(c, own, k, v, count, softmax + g, sums + g * out, 3); \
                else if (members - g == 2) block_##T(c, own, k, v, count, softmax + g, sums + g * out, 2); \
                else block_##T(c, own, k, v, count, softmax + g, sums + g * out, 1);              \
            }                                                                                     \
        }                                                                                         \
        for (int g = 0; g < members; g++)                                                         \
            divide_##T(sums + g * out, out, length ? softmax[g].total : 1, y + g * out);          \
    }

/* q: [rows, heads, width]. keys: [slots, key_heads, width]. values: [slots, key_heads, value_width], at most WIDEST.
   y: [rows, heads, value_width]. Threads take turns at the pieces of work, since rows differ in length. */
#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_cpu_decode_##T(const Call *c, const T *q, const T *keys, const T *values, T *y) { \
        int64_t group = c->heads / c->key_heads, pieces = (group + MEMBERS - 1) / MEMBERS;    \
        _Pragma("omp parallel num_threads(c->num_threads) if (c->num_threads > 1)") {             \
            int64_t all = omp_get_num_threads();                                                  \
            for (int64_t n = omp_get_thread_num(); n < c->rows * c->key_heads * pieces; n += all) { \
                int64_t row = n / (c->key_heads * pieces), key_head = n / pieces % c->key_heads;  \
                int64_t first = n % pieces * MEMBERS;                                             \
                int members = group - first < MEMBERS ? group - first : MEMBERS;                  \
                attend_##T(c, row, key_head * group + first, members, q, keys, values, y);        \
            }                                                                                     \
        }                                                                                         \
    }

/* What tokens leave in the cache: where token t's head h begins, in numbers, is t * by_token + h * by_head. */
typedef struct {
    int64_t tokens, heads, width, by_token, by_head;
    const int64_t *slots; /* [tokens]: where each goes */
} Written;

/* cache: [slots, heads, width]. */
#define DEFINE_WRITE(T)                                                                           \
    void loraplex_cache_write_##T(const Written *w, const T *numbers, T *cache) {                 \
        for (int64_t t = 0; t < w->tokens; t++)                                                   \
            for (int64_t h = 0; h < w->heads; h++)                                                \
                memcpy(cache + (w->slots[t] * w->heads + h) * w->width,                           \
                       numbers + t * w->by_token + h * w->by_head, w->width * sizeof(T));         \
    }

#define DEFINE(T) DEFINE_SCORE(T) DEFINE_GATHER(T) DEFINE_BLOCK(T) DEFINE_ENDS(T) DEFINE_ATTEND(T) DEFINE_ENTRY(T) DEFINE_WRITE(T)

DEFINE(float)
DEFINE(bfloat16)

