/* Tile registers (AMX) for CPUs that have none: what their instructions do, in C, and that their operands fit each
   other. To be included before the kernels' sources; tells them that the CPU has such registers. */

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REGISTERS 8
#define REGISTER_ROWS 16
#define REGISTER_BYTES 64

static __thread struct {
    int configured, rows[REGISTERS], bytes[REGISTERS];
    unsigned char data[REGISTERS][REGISTER_ROWS][REGISTER_BYTES];
} registers;

/* As the CPU would, an instruction that is misused ends the process. */
#define DEMAND(fact)                                                                              \
    do {                                                                                          \
        if (!(fact)) {                                                                            \
            fprintf(stderr, "%s:%d: a register is misused: %s\n", __FILE__, __LINE__, #fact);         \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

static inline void emulated_configuration(const void *from) {
    const uint8_t *told = from;
    DEMAND(told[0] == 1);
    memset(&registers, 0, sizeof registers);
    registers.configured = 1;
    for (int t = 0; t < REGISTERS; t++) {
        uint16_t bytes;
        memcpy(&bytes, told + 16 + 2 * t, sizeof bytes);
        registers.bytes[t] = bytes;
        registers.rows[t] = told[48 + t];
        DEMAND(registers.bytes[t] <= REGISTER_BYTES && registers.rows[t] <= REGISTER_ROWS && !registers.bytes[t] == !registers.rows[t]);
    }
}

static inline void emulated_release(void) { registers.configured = 0; }

static inline void emulated_zero(int t) {
    DEMAND(registers.configured);
    memset(registers.data[t], 0, sizeof registers.data[t]);
}

static inline void emulated_load(int t, const void *from, int64_t stride) {
    DEMAND(registers.configured && registers.rows[t]);
    memset(registers.data[t], 0, sizeof registers.data[t]);
    for (int row = 0; row < registers.rows[t]; row++)
        memcpy(registers.data[t][row], (const char *)from + row * stride, registers.bytes[t]);
}

static inline void emulated_store(int t, void *to, int64_t stride) {
    DEMAND(registers.configured && registers.rows[t]);
    for (int row = 0; row < registers.rows[t]; row++)
        memcpy((char *)to + row * stride, registers.data[t][row], registers.bytes[t]);
}

/* The upper or the lower of a word's two bfloat16. */
static inline float half_of(uint32_t word, int upper) {
    word = upper ? word & 0xffff0000u : word << 16;
    float wide;
    memcpy(&wide, &word, sizeof wide);
    return wide;
}

static inline void emulated_products(int sums, int left, int right) {
    int pairs = registers.bytes[left] / 4, columns = registers.bytes[sums] / 4;
    DEMAND(registers.configured && registers.rows[sums] == registers.rows[left]);
    DEMAND(registers.bytes[sums] == registers.bytes[right] && pairs == registers.rows[right]);
    for (int row = 0; row < registers.rows[sums]; row++) {
        float *sum = (float *)registers.data[sums][row];
        const uint32_t *a = (const uint32_t *)registers.data[left][row];
        for (int k = 0; k < pairs; k++) {
            const uint32_t *b = (const uint32_t *)registers.data[right][k];
            for (int upper = 0; upper < 2; upper++)
                for (int n = 0; n < columns; n++) sum[n] += half_of(a[k], upper) * half_of(b[n], upper);
        }
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated_configuration(from)
#define _tile_release() emulated_release()
#define _tile_zero(t) emulated_zero(t)
#define _tile_loadd(t, from, stride) emulated_load(t, from, stride)
#define _tile_stored(t, to, stride) emulated_store(t, to, stride)
#define _tile_dpbf16ps(sums, left, right) emulated_products(sums, left, right)

#define __builtin_cpu_supports(feature) (!strncmp(feature, "amx", 3) || __builtin_cpu_supports(feature))
#define syscall(...) 0 /* which would ask for the registers */
