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

#endif
