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
typedef uint16_t AnyHalves __attribute__((vector_size(2 * LANES), aligned(2)));

#define INLINED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8")
#define UNROLLED_16 _Pragma("GCC unroll 16")

#define LINE 64 /* bytes that memory is read by */
#define READ_AHEAD(from) __builtin_prefetch(from, 0, 2) /* into the second cache; any address may be asked for */

/* Macros, because a function that returns vectors has no ABI of its own without AVX. */
#define LOAD_float(from) (*(const AnyLanes *)(from))
#define LOAD_bfloat16(from) ((Lanes)(__builtin_convertvector(*(const AnyHalves *)(from), Words) << 16))
#define CHOOSE(mask, one, other) ((Lanes)(((mask) & (Integers)(one)) | (~(mask) & (Integers)(other))))
#define SUM(v) (((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))

/* BROAD at a time, where a CPU has registers as long. What is there for both is named after the vector's type. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#define HAS_BROAD 1

#include <immintrin.h>

#define BROAD 16
typedef __m512 Broad;

#define FOR_Broad __attribute__((target("arch=x86-64-v4")))
#define LOAD_float_Broad(from) _mm512_loadu_ps(from)
#define LOAD_bfloat16_Broad(from)                                                                 \
    ((Broad)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from))), 16))

/* a > b ? a : b */
#define LARGER_Broad(a, b) _mm512_max_ps(a, b)

static inline int has_broad(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
}

#else

#define HAS_BROAD 0

static inline int has_broad(void) { return 0; }

#endif

#define FOR_Lanes
#define LOAD_float_Lanes LOAD_float
#define LOAD_bfloat16_Lanes LOAD_bfloat16
#define LARGER_Lanes(a, b) CHOOSE((a) > (b), a, b)

#define STRIP 16 /* numbers: two of LANES */

/* Two vectors of either length from a strip. Of bfloat16 the even numbers come first, then the odd ones: that is
   cheapest to widen. */
#define WORDS_OF(lanes) __typeof__((lanes) < (lanes))
#define LOAD_STRIP_float(from, lanes)                                                             \
    memcpy(&(lanes)[0], from, sizeof(lanes)[0]),                                                  \
    memcpy(&(lanes)[1], (from) + sizeof(lanes)[0] / sizeof(float), sizeof(lanes)[1])
#define LOAD_STRIP_bfloat16(from, lanes)                                                          \
    do {                                                                                          \
        WORDS_OF((lanes)[0]) words;                                                               \
        memcpy(&words, from, sizeof words);                                                       \
        (lanes)[0] = (__typeof__((lanes)[0]))(words << 16);                                       \
        (lanes)[1] = (__typeof__((lanes)[0]))(words & ~0xffff);                                   \
    } while (0)

/* Rounds as narrow_bfloat16 does, in the upper halves. */
#define ROUND_HALVES(lanes, words)                                                                \
    do {                                                                                          \
        WORDS_OF(lanes) bits = (WORDS_OF(lanes))(lanes), is_nan = (bits & 0x7fffffff) > 0x7f800000; \
        words = ((bits + 0x7fff + (bits >> 16 & 1)) & ~is_nan) | (is_nan & 0x7fc00000);           \
    } while (0)

/* The same back. */
#define STORE_STRIP_float(to, lanes)                                                              \
    memcpy(to, &(lanes)[0], sizeof(lanes)[0]),                                                    \
    memcpy((to) + sizeof(lanes)[0] / sizeof(float), &(lanes)[1], sizeof(lanes)[1])
#define STORE_STRIP_bfloat16(to, lanes)                                                           \
    do {                                                                                          \
        WORDS_OF((lanes)[0]) even, odd;                                                           \
        ROUND_HALVES((lanes)[0], even);                                                           \
        ROUND_HALVES((lanes)[1], odd);                                                            \
        even = (even >> 16 & 0xffff) | (odd & ~0xffff);                                           \
        memcpy(to, &even, sizeof even);                                                           \
    } while (0)

#endif
