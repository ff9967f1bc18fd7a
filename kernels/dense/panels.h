/* Products of weights in panels and rows of inputs, in float32, where a CPU has vectors of eight numbers and nothing
   better: no lanes are to be added up, and all of a panel lies in a row.

   A panel holds PANEL outputs. Each of its lines holds what they weigh one input with, or two inputs in bfloat16, an
   output's two beside each other: the halves of a word, each a shift or a mask away from its float32. What an output or
   an input lacks of a whole line is zero. Each sum is made in the same order whatever the tokens beside it: over CHUNK
   lines in a register, then over those sums. */

#ifndef LORAPLEX_PANELS_H
#define LORAPLEX_PANELS_H

#include "floats.h"

#define PANEL 16            /* outputs: two vectors of sums */
#define INPUTS_float 1      /* inputs of a line */
#define INPUTS_bfloat16 2
#define CHUNK 256           /* lines: half the first cache, where all tokens of a pass meet them */
#define PANEL_TOKENS 6      /* whose sums are held in registers */
#define TOKENS_A_PANEL 96   /* tokens of a pass over the weights */
#define MOST_PANELS 4       /* at a time, where a token alone leaves room for the sums of several */
#define LINES_AHEAD 64      /* that are asked for: a CPU's own guess ends with the page */

int loraplex_panels = -1; /* whether weights are to be packed: -1 not asked yet */

/* Numbers of a row of inputs that is widened for panels; what is behind `in` has to be zero. */
static int64_t even(int64_t in) { return in + (in & 1); }

#if HAS_BROAD

#define FOR_PANELS __attribute__((target("arch=x86-64-v3")))

static int takes_panels(void) {
    if (loraplex_panels < 0)
        loraplex_panels = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2") && !has_broad();
    return loraplex_panels;
}

/* In memory, as a register that holds it is one too few. */
static const Words UPPER_HALVES = {~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu, ~0xffffu};
#define HIDE(variable) __asm__("" : "+m"(variable))

#define WEIGHTS_float(from, input, mask) (*(const AnyLanes *)(from))
#define WEIGHTS_bfloat16(from, input, mask)                                                       \
    ((Lanes)((input) ? *(const Words *)(from) & (mask) : *(const Words *)(from) << 16))

/* sums[p * sums_next + t * PANEL + o] += products over `lines` lines of panel p, which lie `next` bytes times p behind
   `w`, for p < panels and t < tokens, which are constants where it is called. */
#define DEFINE_PANELS(T)                                                                          \
    FOR_PANELS INLINED void dot_panels_##T(const char *w, int64_t next, const float *x, int64_t x_stride, \
                                           int64_t lines, float *sums, int64_t sums_next, int panels, int tokens) { \
        Lanes lanes[MOST_PANELS][PANEL_TOKENS][2];                                                \
        Words mask = UPPER_HALVES;                                                                \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED for (int t = 0; t < tokens; t++) lanes[p][t][0] = lanes[p][t][1] = (Lanes){0}; \
        for (int64_t line = 0; line < lines; line++, w += LINE, x += INPUTS_##T) {                \
            HIDE(mask);                                                                           \
            UNROLLED for (int p = 0; p < panels; p++) READ_AHEAD(w + p * next + LINES_AHEAD * LINE); \
            UNROLLED for (int i = 0; i < INPUTS_##T; i++) {                                       \
                Lanes weights[MOST_PANELS][2];                                                    \
                UNROLLED for (int p = 0; p < panels; p++)                                         \
                    UNROLLED for (int h = 0; h < 2; h++)                                          \
                        weights[p][h] = WEIGHTS_##T(w + p * next + h * sizeof(Lanes), i, mask);   \
                UNROLLED for (int t = 0; t < tokens; t++) {                                       \
                    float one = x[t * x_stride + i];                                              \
                    Lanes input = {one, one, one, one, one, one, one, one};                       \
                    UNROLLED for (int p = 0; p < panels; p++)                                     \
                        UNROLLED for (int h = 0; h < 2; h++) lanes[p][t][h] += weights[p][h] * input; \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED for (int t = 0; t < tokens; t++)                                             \
                UNROLLED for (int h = 0; h < 2; h++)                                              \
                    *(AnyLanes *)(sums + p * sums_next + t * PANEL + h * LANES) += lanes[p][t][h]; \
    }                                                                                             \
                                                                                                  \
    /* The same of any number of tokens <= TOKENS_A_PANEL, one panel or MOST_PANELS. */  \
    FOR_PANELS static void some_panels_##T(const char *w, int64_t in, const float *x, int64_t x_stride, float *sums, \
                                           int panels, int tokens) {                              \
        int64_t lines = (in + INPUTS_##T - 1) / INPUTS_##T, next = lines * LINE, sums_next = tokens * PANEL; \
        int groups = (tokens + PANEL_TOKENS - 1) / PANEL_TOKENS;                                  \
        for (int64_t first = 0; first < lines; first += CHUNK, w += CHUNK * LINE, x += CHUNK * INPUTS_##T) \
            for (int g = 0; g < groups; g++) {                                                    \
                int t = tokens * g / groups, size = tokens * (g + 1) / groups - t;                \
                int64_t some = lines - first < CHUNK ? lines - first : CHUNK;                     \
                const float *inputs = x + t * x_stride;                                           \
                float *own = sums + t * PANEL;                                                    \
                if (size == 6) dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 6); \
                else if (size == 5) dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 5); \
                else if (size == 4) dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 4); \
                else if (size == 3) dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 3); \
                else if (size == 2) dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 2); \
                else if (panels == MOST_PANELS)                                                   \
                    dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, MOST_PANELS, 1); \
                else dot_panels_##T(w, next, inputs, x_stride, some, own, sums_next, 1, 1);       \
            }                                                                                     \
    }

DEFINE_PANELS(float)
DEFINE_PANELS(bfloat16)

#else

static int takes_panels(void) { return loraplex_panels = 0; }

#define some_panels_float(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_bfloat16(w, in, x, x_stride, sums, panels, tokens) ((void)0)

#endif

/* How many panels are computed at a time. */
static int at_once(int64_t num_tokens) { return num_tokens == 1 ? MOST_PANELS : 1; }

static int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }

/* One thread's part of packing rows of weights. */
#define DEFINE_PACK(T)                                                                            \
    static int64_t panel_bytes_##T(int64_t in) { return (in + INPUTS_##T - 1) / INPUTS_##T * LINE; } \
    FOR_EACH_CPU static void pack_panels_##T(const T *weight, int64_t in, int64_t out, T *to, int me, int all) { \
        int64_t size = panel_bytes_##T(in) / sizeof(T);                                           \
        for (int64_t p = num_panels(out) * me / all; p < num_panels(out) * (me + 1) / all; p++) { \
            int64_t outputs = out - p * PANEL < PANEL ? out - p * PANEL : PANEL, line = 0;        \
            const T *from = weight + p * PANEL * in;                                              \
            T *panel = to + p * size;                                                             \
            for (; outputs == PANEL && (line + 1) * INPUTS_##T <= in; line++)                     \
                for (int o = 0; o < PANEL; o++)                                                   \
                    memcpy(panel + (line * PANEL + o) * INPUTS_##T, from + o * in + line * INPUTS_##T, \
                           INPUTS_##T * sizeof(T));                                               \
            memset(panel + line * PANEL * INPUTS_##T, 0, (size - line * PANEL * INPUTS_##T) * sizeof(T)); \
            for (int o = 0; o < outputs; o++)                                                     \
                for (int64_t i = line * INPUTS_##T; i < in; i++)                                  \
                    panel[(i / INPUTS_##T * PANEL + o) * INPUTS_##T + i % INPUTS_##T] = from[o * in + i]; \
        }                                                                                         \
    }

DEFINE_PACK(float)
DEFINE_PACK(bfloat16)

#endif
