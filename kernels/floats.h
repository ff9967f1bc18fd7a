/* Numbers of the types that weights come in, and float32: one at a time, and LANES at a time. */

#ifndef LORAPLEX_FLOATS_H
#define LORAPLEX_FLOATS_H

#include <stdint.h>
#include <string.h>

/* The two OpenMP functions are those of the process that loads us (torch's own), so that there is one pool of threads. */
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef uint16_t bfloat16;

static inline float widen_float(float value) { return value; }
static inline float narrow_float(float value) { return value; }

static inline float widen_bfloat16(bfloat16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

static inline bfloat16 narrow_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* NaN, which rounding could make infinite */
    return (bfloat16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define LANES 8
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float AnyLanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t AnyWords __attribute__((vector_size(4 * LANES), aligned(2)));
typedef uint16_t AnyHalves __attribute__((vector_size(2 * LANES), aligned(2)));

#define INLINED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8")

#define LINE 64 /* bytes that memory is read by */
#define READ_AHEAD(from) __builtin_prefetch(from, 0, 2) /* into the second cache; any address may be asked for */

/* Macros, because a function that returns vectors has no ABI of its own without AVX. */
#define LOAD_float(from) (*(const AnyLanes *)(from))
#define LOAD_bfloat16(from) ((Lanes)(__builtin_convertvector(*(const AnyHalves *)(from), Words) << 16))
#define CHOOSE(mask, one, other) ((Lanes)(((mask) & (Integers)(one)) | (~(mask) & (Integers)(other))))
#define SUM(v) (((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))

#define STRIP 16 /* numbers: two of LANES */

/* Two of LANES from a strip. Of bfloat16 the even numbers come first, then the odd ones: that is cheapest to widen. */
#define LOAD_STRIP_float(from, lanes) (lanes)[0] = LOAD_float(from), (lanes)[1] = LOAD_float((from) + LANES)
#define LOAD_STRIP_bfloat16(from, lanes)                                                          \
    do {                                                                                          \
        Words words = *(const AnyWords *)(from);                                                  \
        (lanes)[0] = (Lanes)(words << 16), (lanes)[1] = (Lanes)(words & 0xffff0000);              \
    } while (0)

/* Rounds as narrow_bfloat16 does, in the upper halves. */
INLINED void round_halves(const Lanes *lanes, Words *words) {
    Words bits = (Words)*lanes, is_nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    *words = ((bits + 0x7fff + (bits >> 16 & 1)) & ~is_nan) | (is_nan & 0x7fc00000);
}

/* The same back. */
#define STORE_STRIP_float(to, lanes) *(AnyLanes *)(to) = (lanes)[0], *(AnyLanes *)((to) + LANES) = (lanes)[1]
#define STORE_STRIP_bfloat16(to, lanes)                                                           \
    do {                                                                                          \
        Words even, odd;                                                                          \
        round_halves(&(lanes)[0], &even);                                                         \
        round_halves(&(lanes)[1], &odd);                                                          \
        *(AnyWords *)(to) = even >> 16 | (odd & 0xffff0000);                                      \
    } while (0)

#endif
