/* Attention of single tokens over keys and values that lie scattered in a paged cache. The formula stands in paged.py.

   For each row and each key head, POSITIONS at a time: the scores of the query heads that share the key head, one a
   lane, then a softmax that goes along. Keys and values are read where they lie, once for LANES query heads; all sums
   are float32. What a row gives depends on no other row. */

#include "floats.h"

#include <math.h>

#define POSITIONS 64
#define TOGETHER 4 /* keys that a query meets at a time */
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

/* The softmax goes along from block to block: its highest score and its total so far, by query head. */
typedef struct {
    Lanes most, total;
} Softmax;

/* Turns a block's scores into weights. Result: what the sums so far shrink by. */
INLINED void weigh(Softmax *softmax, Lanes *scores, int count, float cap, Lanes *shrinks) {
    Lanes highest = softmax->most;
    for (int j = 0; j < count; j++) {
        if (cap != 0)
            for (int g = 0; g < LANES; g++) scores[j][g] = cap * tanhf(scores[j][g] / cap);
        highest = CHOOSE(scores[j] > highest, scores[j], highest);
    }
    *shrinks = softmax->most - highest;
    exponential(shrinks);
    softmax->most = highest;
    softmax->total *= *shrinks;
    for (int j = 0; j < count; j++) {
        scores[j] -= highest;
        exponential(&scores[j]);
        softmax->total += scores[j];
    }
}

/* scores[j] = q·keys[j] for `count` keys, at most TOGETHER, one query head a lane. q: [width] of lanes. */
#define DEFINE_SCORE(T)                                                                           \
    INLINED void score_##T(const Lanes *q, int64_t width, const T *const *keys, Lanes *scores,    \
                           int count) {                                                           \
        Lanes sums[TOGETHER];                                                                     \
        UNROLLED for (int j = 0; j < count; j++) sums[j] = (Lanes){0};                            \
        for (int64_t i = 0; i < width; i++)                                                       \
            UNROLLED for (int j = 0; j < count; j++) sums[j] += q[i] * widen_##T(keys[j][i]);     \
        UNROLLED for (int j = 0; j < count; j++) scores[j] = sums[j];                             \
    }

/* sums[g] = shrinks[g] * sums[g] + sum of weights[j][g] * values[j] over j < count, for LANES of a value's numbers. */
#define DEFINE_GATHER(T)                                                                          \
    INLINED void gather_##T(float *sums, int64_t stride, const T *const *values, int64_t first,   \
                            const Lanes *weights, int count, const Lanes *shrinks,           \
                            int members) {                                                        \
        Lanes lanes[LANES] = {{0}};                                                               \
        UNROLLED for (int g = 0; g < members; g++)                                                \
            lanes[g] = LOAD_float(sums + g * stride + first) * (*shrinks)[g];                        \
        for (int j = 0; j < count; j++) {                                                         \
            Lanes numbers = LOAD_##T(values[j] + first);                                          \
            UNROLLED for (int g = 0; g < members; g++) lanes[g] += numbers * weights[j][g];       \
        }                                                                                         \
        UNROLLED for (int g = 0; g < members; g++)                                                \
            *(AnyLanes *)(sums + g * stride + first) = lanes[g];                                  \
    }

/* One row's query heads `head` ... `head + members - 1`, which share a key head. */
#define DEFINE_ATTEND(T)                                                                          \
    FOR_EACH_CPU static void attend_##T(const Call *c, int64_t row, int64_t head, int members,    \
                                        const T *q, const T *keys, const T *values, T *y) {       \
        int64_t key_head = head / (c->heads / c->key_heads), length = c->lengths[row];            \
        int64_t width = c->width, out = c->value_width, even = out / LANES * LANES;               \
        const int64_t *slots = c->slots + row * c->longest;                                       \
        Lanes queries[WIDEST], scores[POSITIONS], shrinks;                                        \
        float sums[LANES * WIDEST];                                                               \
        Softmax softmax = {(Lanes){0} - INFINITY, (Lanes){0}};                                    \
        memset(queries, 0, width * sizeof(Lanes));                                                \
        memset(sums, 0, members * out * sizeof(float));                                           \
        for (int g = 0; g < members; g++) {                                                       \
            if (c->sinks) softmax.most[g] = c->sinks[head + g], softmax.total[g] = 1;             \
            for (int64_t i = 0; i < width; i++)                                                   \
                queries[i][g] = c->scale * widen_##T(q[(row * c->heads + head + g) * width + i]); \
        }                                                                                         \
        int64_t begin = c->window && length > c->window ? length - c->window : 0;                 \
        for (; begin < length; begin += POSITIONS) {                                              \
            int count = length - begin < POSITIONS ? length - begin : POSITIONS, j = 0;           \
            const T *k[POSITIONS], *v[POSITIONS];                                                 \
            for (int n = 0; n < count; n++) {                                                     \
                int64_t place = slots[begin + n] * c->key_heads + key_head;                       \
                k[n] = keys + place * width, v[n] = values + place * out;                         \
            }                                                                                     \
            for (; j + TOGETHER <= count; j += TOGETHER)                                          \
                score_##T(queries, width, k + j, scores + j, TOGETHER);                           \
            for (; j < count; j++) score_##T(queries, width, k + j, scores + j, 1);               \
            weigh(&softmax, scores, count, c->cap, &shrinks);                                     \
            for (int64_t i = 0; i < even; i += LANES) {                                           \
                if (members == LANES)                                                             \
                    gather_##T(sums, out, v, i, scores, count, &shrinks, LANES);                   \
                else if (members == 4)                                                            \
                    gather_##T(sums, out, v, i, scores, count, &shrinks, 4);                       \
                else                                                                              \
                    gather_##T(sums, out, v, i, scores, count, &shrinks, members);                 \
            }                                                                                     \
            for (int g = 0; g < members; g++)                                                     \
                for (int64_t i = even; i < out; i++) {                                            \
                    float sum = sums[g * out + i] * shrinks[g];                                   \
                    for (int n = 0; n < count; n++) sum += scores[n][g] * widen_##T(v[n][i]);     \
                    sums[g * out + i] = sum;                                                      \
                }                                                                                 \
        }                                                                                         \
        for (int g = 0; g < members; g++)                                                         \
            for (int64_t i = 0; i < out; i++)                                                     \
                y[(row * c->heads + head + g) * out + i] =                                        \
                    narrow_##T(length ? sums[g * out + i] / softmax.total[g] : 0);                \
    }

/* q: [rows, heads, width]. keys: [slots, key_heads, width]. values: [slots, key_heads, value_width], at most WIDEST.
   y: [rows, heads, value_width]. Threads take turns at the pieces of work, since rows differ in length. */
#define DEFINE_ENTRY(T)                                                                           \
    void loraplex_cpu_decode_##T(const Call *c, const T *q, const T *keys, const T *values, T *y) { \
        int64_t group = c->heads / c->key_heads, pieces = (group + LANES - 1) / LANES;        \
        _Pragma("omp parallel num_threads(c->num_threads) if (c->num_threads > 1)") {             \
            int64_t all = omp_get_num_threads();                                                  \
            for (int64_t n = omp_get_thread_num(); n < c->rows * c->key_heads * pieces; n += all) { \
                int64_t row = n / (c->key_heads * pieces), key_head = n / pieces % c->key_heads;  \
                int64_t first = n % pieces * LANES;                                             \
                int members = group - first < LANES ? group - first : LANES;                  \
                attend_##T(c, row, key_head * group + first, members, q, keys, values, y);        \
            }                                                                                     \
        }                                                                                         \
    }

#define DEFINE(T) DEFINE_SCORE(T) DEFINE_GATHER(T) DEFINE_ATTEND(T) DEFINE_ENTRY(T)

DEFINE(float)
DEFINE(bfloat16)

