/* Rotary position embedding of queries and keys. The formula stands in cpu_rotary.py.

   To be compiled without contracting a product and a sum into one instruction: each is rounded by itself, as torch's
   operations are, so the results are equal to the last bit. */

#include "floats.h"

#define WORTH_THREADS 65536 /* numbers */

/* Heads of tokens, `width` numbers each: where token t's head h begins, in numbers, is t * by_token + h * by_head. */
typedef struct {
    int64_t heads, by_token, by_head;
} Heads;

typedef struct {
    int64_t tokens, width;
    Heads q, k;
    int64_t num_threads;
} Call;

/* The results lie as [tokens, heads, width]. */
#define DEFINE(T)                                                                                 \
    FOR_EACH_CPU static void rotate_##T(const T *restrict x, const T *restrict cosine,            \
                                        const T *restrict sine, T *restrict y, int64_t half) {    \
        _Pragma("omp simd") for (int64_t i = 0; i < half; i++) {                                  \
            float low = widen_##T(x[i]), high = widen_##T(x[half + i]);                           \
            float straight = widen_##T(narrow_##T(low * widen_##T(cosine[i])));                   \
            float turned = widen_##T(narrow_##T(-high * widen_##T(sine[i])));                     \
            y[i] = narrow_##T(straight + turned);                                                 \
            straight = widen_##T(narrow_##T(high * widen_##T(cosine[half + i])));                 \
            turned = widen_##T(narrow_##T(low * widen_##T(sine[half + i])));                      \
            y[half + i] = narrow_##T(straight + turned);                                          \
        }                                                                                         \
    }                                                                                             \
    static void rotate_heads_##T(const Call *c, const Heads *heads, int64_t token, const T *x,    \
                                 const T *cosine, const T *sine, T *y) {                          \
        for (int64_t head = 0; head < heads->heads; head++)                                       \
            rotate_##T(x + token * heads->by_token + head * heads->by_head,                       \
                       cosine + token * c->width, sine + token * c->width,                        \
                       y + (token * heads->heads + head) * c->width, c->width / 2);               \
    }                                                                                             \
    void loraplex_rotary_##T(const Call *c, const T *q, const T *k, const T *cosine, const T *sine, \
                             T *rotated_q, T *rotated_k) {                                        \
        int64_t work = c->tokens * c->width * (c->q.heads + c->k.heads);                          \
        _Pragma("omp parallel num_threads(c->num_threads) if (c->num_threads > 1 && work >= WORTH_THREADS)") { \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            for (int64_t token = c->tokens * me / all; token < c->tokens * (me + 1) / all; token++) { \
                rotate_heads_##T(c, &c->q, token, q, cosine, sine, rotated_q);                    \
                rotate_heads_##T(c, &c->k, token, k, cosine, sine, rotated_k);                    \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE(float)
DEFINE(bfloat16)
