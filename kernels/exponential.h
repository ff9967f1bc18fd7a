/* e^x number by number, in a form that compilers make vectors of. */

#ifndef LORAPLEX_EXPONENTIAL_H
#define LORAPLEX_EXPONENTIAL_H

#include "floats.h"

/* e^x to a few units in the last place; x is held to where the result and its inverse are normal numbers.
 *
 * e^x = 2^n · e^r with |r| ≤ ln 2 / 2, where e^r = 1 + r + r²·q(r); q by weighted least squares, true to 3e-9. */
INLINED float exponential(float x) {
    const float round = 12582912; /* 1.5 · 2^23: a sum with it has an integer in its lowest bits */
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + round;
    float n = shifted - round;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f; /* ln 2 in two parts, the first of few bits */
    float q = 0.5f + r * (0.1666652f + r * (0.0416684039f + r * (0.0083688991f + r * 0.00138142216f)));
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (1 + r + r * r * q) * power;
}

#endif
