/* A softmax that goes along from block to block of positions, of as many queries at once as a vector has lanes.

   Powers are of two: `factor` brings scores to that base. What a query may not look at has the score -infinity. */

#ifndef LORAPLEX_SOFTMAX_H
#define LORAPLEX_SOFTMAX_H

#include "floats.h"

#include <math.h>

#define LOWEST -3e38f /* a highest score that is none yet: finite, since infinity less itself is no number */
#define LOG2_E 1.44269504f

/* 2^x for x <= 0 as 2^n * 2^r with |r| <= 1/2, by polynomials of least greatest relative error in r: 1e-7, or, where it
   is rounded to bfloat16 after, 8e-5. Below -125 it is that of -125; NaN stays NaN. 2^0 is exactly 1 in the former: sums
   are multiplied with it from block to block. */
#define DEFINE_POWER(V)                                                                           \
    FOR_##V INLINED void power_##V(V *x, int is_rounded) {                                        \
        const float round = 12582912; /* 1.5 * 2^23: a sum with it has an integer in its lowest bits */ \
        V clipped = LARGER_##V((V){0} - 125.0f, *x), shifted = clipped + round, r = clipped - (shifted - round), p; \
        if (is_rounded)                                                                           \
            p = 0.999928057f + r * (0.693260968f + r * (0.242611125f + r * 0.0551716685f));       \
        else                                                                                      \
            p = 1.0f + r * (0.693147004f + r * (0.240222424f + r * (0.0555073358f                 \
                     + r * (0.00967151299f + r * 0.00132647273f))));                              \
        *x = (V)((WORDS_OF(p))p + ((WORDS_OF(p))shifted << 23));                                  \
    }

/* Scores [count] become cap * tanh(scale * score / cap). */
#define DEFINE_CAP(V)                                                                             \
    FOR_##V INLINED void cap_##V(float *scores, int count, float scale, float cap) {               \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        for (int j = 0; j < count; j++, scores += lanes) {                                        \
            V x = LOAD_float_##V(scores) * (scale / cap), size = LARGER_##V(x, -x) * (-2 * LOG2_E); \
            power_##V(&size, 0);                                                                  \
            size = (1.0f - size) / (1.0f + size); /* of tanh, whose sign is that of x */          \
            size = cap * (V)((WORDS_OF(x))size | ((WORDS_OF(x))x & (int32_t)0x80000000));         \
            memcpy(scores, &size, sizeof size);                                                   \
        }                                                                                         \
    }

/* Scores [count] of positions, the first `ahead` of the first query's; a query a lane. window: positions, or 0. */
#define DEFINE_MASK(V)                                                                            \
    FOR_##V INLINED void mask_##V(float *scores, int count, int ahead, int window) {              \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        for (int j = 0; j < count; j++, ahead++, scores += lanes)                                 \
            for (int t = 0; t < lanes; t++)                                                       \
                scores[t] = ahead > t || (window && ahead <= t - window) ? -INFINITY : scores[t]; \
    }

/* Scores [count], an even number, become weights: in place, or as rows of pairs in bfloat16 where `pairs` is given.
   shrinks: what the sums so far are to be multiplied with. */
#define DEFINE_WEIGH(V)                                                                           \
    FOR_##V INLINED void weigh_##V(float *scores, int count, float factor, V *most, V *total, V *shrinks, \
                                   bfloat16 *pairs) {                                             \
        const int lanes = sizeof(V) / sizeof(float);                                              \
        V highest[2] = {*most, *most}, sums[2] = {{0}};                                           \
        for (int j = 0; j < count; j += 2)                                                        \
            UNROLLED for (int k = 0; k < 2; k++)                                                  \
                highest[k] = LARGER_##V(highest[k], LOAD_float_##V(scores + (j + k) * lanes));    \
        highest[0] = LARGER_##V(highest[0], highest[1]);                                          \
        *shrinks = (*most - highest[0]) * factor;                                                 \
        power_##V(shrinks, 0);                                                                    \
        *most = highest[0];                                                                       \
        V offset = highest[0] * factor;                                                           \
        for (int j = 0; j < count; j += 2) {                                                      \
            V weights[2];                                                                         \
            WORDS_OF(*most) bits[2];                                                              \
            UNROLLED for (int k = 0; k < 2; k++) {                                                \
                weights[k] = LOAD_float_##V(scores + (j + k) * lanes) * factor - offset;          \
                power_##V(&weights[k], pairs != NULL);                                            \
                sums[k] += weights[k];                                                            \
                bits[k] = (WORDS_OF(*most))weights[k] + 0x8000; /* positive, so this rounds */    \
                if (!pairs) memcpy(scores + (j + k) * lanes, &weights[k], sizeof(V));             \
            }                                                                                     \
            bits[0] = (bits[0] >> 16 & 0xffff) | (bits[1] & ~0xffff);                             \
            if (pairs) memcpy(pairs + j * lanes, &bits[0], sizeof(V));                            \
        }                                                                                         \
        *total = *total * *shrinks + (sums[0] + sums[1]);                                         \
    }

DEFINE_POWER(Lanes) DEFINE_CAP(Lanes) DEFINE_MASK(Lanes) DEFINE_WEIGH(Lanes)

#if HAS_BROAD
DEFINE_POWER(Broad) DEFINE_CAP(Broad) DEFINE_MASK(Broad) DEFINE_WEIGH(Broad)
#endif

#endif
