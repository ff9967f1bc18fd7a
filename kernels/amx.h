/* A CPU's tile registers (AMX): sixteen by sixteen sums, each of thirty-two products, in one instruction.

   Of its two operands the first has rows of thirty-two numbers as they lie in memory. The second has pairs of them, the
   rows side by side: packed. A sum is made in the order of its numbers, whatever is beside it. */

#ifndef LORAPLEX_AMX_H
#define LORAPLEX_AMX_H

#include "floats.h"

#define SIDE 16                /* rows of a tile; columns of one of sums */
#define INPUTS 32              /* numbers in a row of an operand */
#define PACKED (SIDE * INPUTS) /* numbers in a tile of them */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12

#define HAS_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FOR_AMX __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))
#define WRITTEN __asm__ volatile("" ::: "memory") /* before tiles are loaded: the compiler does not know what they read */

#define ARCH_REQ_XCOMP_PERM 0x1023 /* of Linux: tile registers are had by asking */
#define XFEATURE_XTILEDATA 18

static int multiplies_tiles(void) {
    return __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") &&
           has_broad() && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* The shapes of the eight registers, as the instruction wants them told; all of them whole here. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Shapes;

static const Shapes whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* Sixteen rows of sixteen words become columns. */
FOR_AMX INLINED void transpose(__m512i rows[SIDE]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    UNROLLED for (int half = SIDE / 2; half; half /= 2) {
        /* Two rows exchange the halves of each stretch of 2 * half lanes; from 16 on, lanes are the second row's. */
        __mmask16 later = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(half));
        __m512i upper = _mm512_mask_add_epi32(lane, later, lane, _mm512_set1_epi32(SIDE - half));
        __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(half)), later, lane,
                                              _mm512_set1_epi32(SIDE));
        _Pragma("GCC unroll 16") for (int i = 0; i < SIDE; i++) {
            if (i & half) continue;
            __m512i one = rows[i], other = rows[i + half];
            rows[i] = _mm512_permutex2var_epi32(one, upper, other);
            rows[i + half] = _mm512_permutex2var_epi32(one, lower, other);
        }
    }
}

static int64_t tiles_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

FOR_AMX INLINED __mmask32 first_of(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }

/* A tile of pairs of inputs from the first rows of up to sixteen, and the first inputs of each; zeros beyond both. */
FOR_AMX INLINED void pack_tile(const bfloat16 *row, int64_t stride, int64_t num_rows, int64_t num_inputs,
                               bfloat16 *packed) {
    __m512i rows[SIDE];
    _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++)
        rows[k] = k < num_rows ? _mm512_maskz_loadu_epi16(first_of(num_inputs), row + k * stride)
                               : _mm512_setzero_si512();
    transpose(rows);
    _Pragma("GCC unroll 16") for (int k = 0; k < SIDE; k++) _mm512_store_si512(packed + k * INPUTS, rows[k]);
}

#else

#define HAS_TILES 0

static int multiplies_tiles(void) { return 0; }

#endif

int loraplex_tiles = -1; /* whether tile registers are used: -1 not asked yet */

static int takes_tiles(void) {
    if (loraplex_tiles < 0) loraplex_tiles = multiplies_tiles();
    return loraplex_tiles;
}

#endif
