/* Products of weights in panels and rows of inputs: no lanes are to be added up, and all of a panel lies in a row.

   A panel holds PANEL outputs. Each of its lines holds what they weigh one input with, or two inputs in bfloat16, an
   output's two beside each other: as a CPU multiplies pairs, or the halves of a word, each a shift or a mask away from
   its float32. Lines of int8 are as many times shorter, a pair's inputs one after another, and are widened to either,
   which all of them fit; an output's scale waits until its sum is made. What an output or an input lacks of a whole panel
   is zero. Each sum is made in float32, in the same order whatever the tokens beside it: over CHUNK lines in a register,
   then over those sums. */

#ifndef LORAPLEX_PANELS_H
#define LORAPLEX_PANELS_H

#include <math.h>

#include "dense/tile.h"

#define PANEL 16              /* outputs */
#define INPUTS_float 1        /* inputs of a line */
#define INPUTS_bfloat16 2
#define INPUTS_pairs 2
#define INPUTS_int8_float 1
#define INPUTS_int8_pairs 2
#define INPUTS_int8 4         /* of LINE bytes */
#define LINE_float LINE       /* bytes of a line */
#define LINE_bfloat16 LINE
#define LINE_pairs LINE
#define LINE_int8_float PANEL
#define LINE_int8_pairs (2 * PANEL)
#define ROW_float float       /* of what rows of inputs are there */
#define ROW_bfloat16 float
#define ROW_pairs bfloat16
#define ROW_int8_float float
#define ROW_int8_bfloat16 float
#define ROW_int8_pairs bfloat16
#define CHUNK_Lanes 256       /* lines, which stay in the first cache while all tokens of a pass meet them */
#define CHUNK_Broad 64
#define MOST_TOKENS_Lanes 6   /* whose sums are held in registers, sixteen or thirty-two */
#define MOST_TOKENS_Broad 12
#define MOST_PANELS_Lanes 4   /* at a time: of a token alone, beside which there is room for several */
#define MOST_PANELS_Broad 2   /* of any tokens */
#define TOKENS_A_PANEL 96     /* tokens of a pass over the weights */
#define LINES_AHEAD 64        /* that are asked for: a CPU's own guess ends with the page */
#define WAYS 8                /* rows whose numbers a first cache surely holds where they contend for the same sets */
#define PAGE 4096             /* bytes, by which rows lie that do */

int loraplex_panels = -1; /* whether weights are to be packed: -1 not asked yet */

static int64_t num_panels(int64_t out) { return (out + PANEL - 1) / PANEL; }

static int64_t panel_bytes_int8(int64_t in) { return (in + INPUTS_int8 - 1) / INPUTS_int8 * LINE; }

/* Whether rows of inputs, of `size` bytes a number, would push each other out of the first cache. */
static int contend(int64_t in, int64_t size, int64_t num_tokens) { return num_tokens > WAYS && in * size % PAGE == 0; }

/* Numbers from a row of inputs to the next that is brought into what panels are multiplied with: an odd number of
   lines. What is behind `in` has to be zero. */
static int64_t panels_width(int64_t in, int64_t size) { return ((in * size + LINE - 1) / LINE | 1) * LINE / size; }

#if HAS_BROAD

#define FOR_PANELS_Lanes __attribute__((target("arch=x86-64-v3")))
#define FOR_PANELS_Broad FOR_Broad

static int takes_panels(void) {
    if (loraplex_panels < 0)
        loraplex_panels = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("bmi2");
    return loraplex_panels;
}

/* How many panels are computed at a time. */
static int at_once_float(int64_t num_tokens) {
    return takes_broad() ? MOST_PANELS_Broad : num_tokens == 1 ? MOST_PANELS_Lanes : 1;
}
#define at_once_bfloat16 at_once_float
#define at_once_pairs(num_tokens) MOST_PANELS_Broad
#define at_once_int8_float at_once_float
#define at_once_int8_bfloat16 at_once_float
#define at_once_int8_pairs(num_tokens) MOST_PANELS_Broad

/* In memory, as a register that holds it is one too few. */
#define HIDE(variable) __asm__("" : "+m"(variable))

#define VECTORS(V) (PANEL * (int)sizeof(float) / (int)sizeof(V)) /* of a line */
#define ANY_Lanes AnyLanes
#define ANY_Broad __m512_u
#define WORDS_Lanes Words
typedef uint32_t WORDS_Broad __attribute__((vector_size(4 * BROAD)));
#define WEIGHTS_float(V, line, v, input, mask) (((const V *)(line))[v])
#define WEIGHTS_bfloat16(V, line, v, input, mask)                                                 \
    ((V)((input) ? ((const WORDS_##V *)(line))[v] & (mask) : ((const WORDS_##V *)(line))[v] << 16))
#define WEIGHTS_int8_float(V, line, v, input, mask) WIDEN_##V((line) + (v) * sizeof(V) / sizeof(float))
/* GCC's conversions of vectors take bytes apart one by one. */
#define WIDEN_Lanes(from) \
    ((Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from)))))
#define WIDEN_Broad(from) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from))))

/* sums[p * sums_next + t * PANEL + o] += products over `lines` lines of panel p, which lie `next` bytes times p behind
   `w`, for p < panels and t < tokens, which are constants where it is called, in vectors of type V. */
#define DEFINE_DOT_PANELS(T, V)                                                                   \
    FOR_PANELS_##V INLINED void dot_panels_##T##_##V(const char *w, int64_t next, const float *x, int64_t x_stride, \
                                                     int64_t lines, float *sums, int64_t sums_next, int panels, \
                                                     int tokens) {                                \
        V lanes[MOST_PANELS_##V][MOST_TOKENS_##V][VECTORS(V)];                                    \
        WORDS_##V mask = (WORDS_##V){0} | 0xffff0000u;                                  \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED_16 for (int t = 0; t < tokens; t++)                                          \
                UNROLLED for (int v = 0; v < VECTORS(V); v++) lanes[p][t][v] = (V){0};            \
        for (int64_t line = 0; line < lines; line++, w += LINE_##T, x += INPUTS_##T) {            \
            HIDE(mask);                                                                           \
            UNROLLED for (int p = 0; p < panels; p++) READ_AHEAD(w + p * next + LINES_AHEAD * LINE); \
            UNROLLED for (int i = 0; i < INPUTS_##T; i++) {                                       \
                V weights[MOST_PANELS_##V][VECTORS(V)];                                           \
                UNROLLED for (int p = 0; p < panels; p++)                                         \
                    UNROLLED for (int v = 0; v < VECTORS(V); v++)                                 \
                        weights[p][v] = WEIGHTS_##T(V, w + p * next, v, i, mask);                 \
                UNROLLED_16 for (int t = 0; t < tokens; t++) {                                    \
                    V input = x[t * x_stride + i] - (V){0};                                       \
                    UNROLLED for (int p = 0; p < panels; p++)                                     \
                        UNROLLED for (int v = 0; v < VECTORS(V); v++) lanes[p][t][v] += weights[p][v] * input; \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED_16 for (int t = 0; t < tokens; t++)                                          \
                UNROLLED for (int v = 0; v < VECTORS(V); v++)                                     \
                    *(ANY_##V *)(sums + p * sums_next + t * PANEL + v * sizeof(V) / sizeof(float)) += lanes[p][t][v]; \
    }

/* A line of pairs, and one of int8 as a line of pairs: numbers so small have zeros in the lower halves of float32. */
INLINED FOR_PAIRS __m512i load_line_pairs(const char *line) { return _mm512_load_si512(line); }

INLINED FOR_PAIRS __m512i load_line_int8_pairs(const char *line) {
    __m512i halves[2];
    UNROLLED for (int i = 0; i < 2; i++) halves[i] = _mm512_castps_si512(WIDEN_Broad(line + i * PANEL));
    return _mm512_or_si512(_mm512_srli_epi32(halves[0], 16), _mm512_and_si512(halves[1], _mm512_set1_epi32(~0xffff)));
}

/* The same in pairs, of rows of bfloat16. */
#define DEFINE_DOT_PAIRS(T)                                                                       \
    FOR_PAIRS INLINED void dot_panels_##T##_Broad(const char *w, int64_t next, const bfloat16 *x, int64_t x_stride, \
                                                  int64_t lines, float *sums, int64_t sums_next, int panels, \
                                                  int tokens) {                                   \
        __m512 lanes[MOST_PANELS_Broad][MOST_TOKENS_Broad];                                       \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED_16 for (int t = 0; t < tokens; t++) lanes[p][t] = _mm512_setzero_ps();       \
        for (int64_t line = 0; line < lines; line++, w += LINE_##T, x += INPUTS_##T) {            \
            __m512i weights[MOST_PANELS_Broad];                                                   \
            UNROLLED for (int p = 0; p < panels; p++) {                                           \
                READ_AHEAD(w + p * next + LINES_AHEAD * LINE);                                    \
                weights[p] = load_line_##T(w + p * next);                                         \
            }                                                                                     \
            UNROLLED_16 for (int t = 0; t < tokens; t++) {                                        \
                int32_t pair;                                                                     \
                memcpy(&pair, x + t * x_stride, sizeof pair);                                     \
                __m512bh input = (__m512bh)_mm512_set1_epi32(pair);                               \
                UNROLLED for (int p = 0; p < panels; p++)                                         \
                    lanes[p][t] = _mm512_dpbf16_ps(lanes[p][t], (__m512bh)weights[p], input);     \
            }                                                                                     \
        }                                                                                         \
        UNROLLED for (int p = 0; p < panels; p++)                                                 \
            UNROLLED_16 for (int t = 0; t < tokens; t++)                                          \
                *(__m512_u *)(sums + p * sums_next + t * PANEL) += lanes[p][t];                   \
    }

/* Lines of int8 as lines of T: whole lines of memory, which panels and chunks have. */
#define DEFINE_WIDEN_LINES(V)                                                                     \
    FOR_PANELS_##V INLINED void widen_lines_float_##V(const char *from, int64_t lines, char *to) { \
        for (; lines > 0; lines -= INPUTS_int8, from += LINE) {                                   \
            READ_AHEAD(from + LINES_AHEAD * LINE);                                                \
            for (int k = 0; k < LINE; k += sizeof(V) / sizeof(float), to += sizeof(V))            \
                *(V *)to = WIDEN_##V(from + k);                                                   \
        }                                                                                         \
    }

FOR_PAIRS INLINED void widen_lines_pairs_Broad(const char *from, int64_t lines, char *to) {
    for (int64_t line = 0; line < lines; line++, from += LINE_int8_pairs, to += LINE) {
        READ_AHEAD(from + LINES_AHEAD * LINE);
        _mm512_store_si512(to, load_line_int8_pairs(from));
    }
}

/* Some lines of one panel or `at_once` of them, and all of the tokens, of which there are at most TOKENS_A_PANEL. */
#define SHAPE(T, V, p, t)                                                                         \
    if (panels == p && size == t) {                                                               \
        dot_panels_##T##_##V(w, next, x + low * x_stride, x_stride, lines, own, tokens * PANEL, p, t); \
        continue;                                                                                 \
    }
#define SHAPES_OF_6(T, V, p)                                                                      \
    SHAPE(T, V, p, 1) SHAPE(T, V, p, 2) SHAPE(T, V, p, 3) SHAPE(T, V, p, 4) SHAPE(T, V, p, 5) SHAPE(T, V, p, 6)
#define SHAPES_OF_12(T, V, p)                                                                     \
    SHAPES_OF_6(T, V, p) SHAPE(T, V, p, 7) SHAPE(T, V, p, 8) SHAPE(T, V, p, 9) SHAPE(T, V, p, 10) \
    SHAPE(T, V, p, 11) SHAPE(T, V, p, 12)
#define SHAPES_Lanes(T) SHAPES_OF_6(T, Lanes, 1) SHAPE(T, Lanes, MOST_PANELS_Lanes, 1)
#define SHAPES_Broad(T) SHAPES_OF_12(T, Broad, MOST_PANELS_Broad) SHAPES_OF_12(T, Broad, 1)
#define DEFINE_SOME_LINES(T, V, FOR_CPU)                                                          \
    FOR_CPU static void some_lines_##T##_##V(const char *w, int64_t next, const ROW_##T *x, int64_t x_stride, \
                                             int64_t lines, float *sums, int panels, int tokens) { \
        int groups = (tokens + MOST_TOKENS_##V - 1) / MOST_TOKENS_##V;                            \
        for (int g = 0; g < groups; g++) {                                                        \
            int low = tokens * g / groups, size = tokens * (g + 1) / groups - low;                \
            float *own = sums + low * PANEL;                                                      \
            SHAPES_##V(T)                                                                         \
        }                                                                                         \
    }

/* sums[p * tokens * PANEL + t * PANEL + o] += all of their products. */
#define DEFINE_SOME_PANELS(T, V, FOR_CPU)                                                         \
    FOR_CPU static void some_panels_##T##_##V(const char *w, int64_t in, const ROW_##T *x, int64_t x_stride, \
                                              float *sums, int panels, int tokens) {              \
        int64_t lines = (in + INPUTS_##T - 1) / INPUTS_##T;                                       \
        for (int64_t first = 0; first < lines; first += CHUNK_##V) {                              \
            int64_t some = lines - first < CHUNK_##V ? lines - first : CHUNK_##V;                 \
            some_lines_##T##_##V(w + first * LINE, lines * LINE, x + first * INPUTS_##T, x_stride, some, sums, panels, \
                                 tokens);                                                         \
        }                                                                                         \
    }

/* The same of weights in int8. More tokens than registers hold the sums of meet lines that were widened once. */
#define DEFINE_SOME_INT8(T, V, FOR_CPU)                                                           \
    FOR_CPU static void some_panels_int8_##T##_##V(const char *w, int64_t in, const ROW_##T *x, int64_t x_stride, \
                                                   float *sums, int panels, int tokens) {         \
        int64_t lines = (in + INPUTS_##T - 1) / INPUTS_##T, next = panel_bytes_int8(in);          \
        char wide[MOST_PANELS_Broad][CHUNK_##V * LINE] __attribute__((aligned(LINE)));            \
        for (int64_t first = 0; first < lines; first += CHUNK_##V) {                              \
            int64_t some = lines - first < CHUNK_##V ? lines - first : CHUNK_##V;                 \
            const char *from = w + first * LINE_int8_##T;                                         \
            const ROW_##T *own = x + first * INPUTS_##T;                                          \
            if (tokens <= MOST_TOKENS_##V) {                                                      \
                some_lines_int8_##T##_##V(from, next, own, x_stride, some, sums, panels, tokens); \
                continue;                                                                         \
            }                                                                                     \
            for (int p = 0; p < panels; p++) widen_lines_##T##_##V(from + p * next, some, wide[p]); \
            some_lines_##T##_##V(wide[0], sizeof wide[0], own, x_stride, some, sums, panels, tokens); \
        }                                                                                         \
    }

#define DEFINE_LINES(T, V, FOR_CPU) DEFINE_DOT_PANELS(T, V) DEFINE_SOME_LINES(T, V, FOR_CPU)
#define DEFINE_PANELS(V)                                                                          \
    DEFINE_LINES(float, V, FOR_PANELS_##V) DEFINE_SOME_PANELS(float, V, FOR_PANELS_##V)           \
    DEFINE_LINES(bfloat16, V, FOR_PANELS_##V) DEFINE_SOME_PANELS(bfloat16, V, FOR_PANELS_##V)     \
    DEFINE_LINES(int8_float, V, FOR_PANELS_##V) DEFINE_WIDEN_LINES(V) DEFINE_SOME_INT8(float, V, FOR_PANELS_##V)

DEFINE_PANELS(Lanes)
DEFINE_PANELS(Broad)
DEFINE_DOT_PAIRS(pairs) DEFINE_SOME_LINES(pairs, Broad, FOR_PAIRS) DEFINE_SOME_PANELS(pairs, Broad, FOR_PAIRS)
DEFINE_DOT_PAIRS(int8_pairs) DEFINE_SOME_LINES(int8_pairs, Broad, FOR_PAIRS)
DEFINE_SOME_INT8(pairs, Broad, FOR_PAIRS)

#define some_panels_float BY_WIDTH(some_panels_float)
#define some_panels_bfloat16 BY_WIDTH(some_panels_bfloat16)
#define some_panels_pairs some_panels_pairs_Broad
#define some_panels_int8_float BY_WIDTH(some_panels_int8_float)
#define some_panels_int8_bfloat16 some_panels_int8_float
#define some_panels_int8_pairs some_panels_int8_pairs_Broad

#else

static int takes_panels(void) { return loraplex_panels = 0; }
#define at_once_float(num_tokens) 1
#define at_once_bfloat16(num_tokens) 1
#define at_once_pairs(num_tokens) 1
#define at_once_int8_float(num_tokens) 1
#define at_once_int8_bfloat16(num_tokens) 1
#define at_once_int8_pairs(num_tokens) 1

#define some_panels_float(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_bfloat16(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_pairs(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_int8_float(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_int8_bfloat16(w, in, x, x_stride, sums, panels, tokens) ((void)0)
#define some_panels_int8_pairs(w, in, x, x_stride, sums, panels, tokens) ((void)0)

#endif

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

/* The same of weights that become int8: each the nearest of 127 steps either way to its output's largest, which `scales`
   tells the width of (LLM.int8()'s vectors: Dettmers et al., 2022). NaN where a weight of the output is not finite. */
#define DEFINE_PACK_INT8(T)                                                                       \
    FOR_EACH_CPU static void pack_int8_##T(const T *weight, int64_t in, int64_t out, int8_t *to, float *scales, int me, \
                                           int all) {                                             \
        int64_t size = panel_bytes_int8(in);                                                      \
        for (int64_t p = num_panels(out) * me / all; p < num_panels(out) * (me + 1) / all; p++) { \
            int8_t *panel = to + p * size;                                                        \
            memset(panel, 0, size);                                                               \
            for (int64_t o = p * PANEL; o < out && o < (p + 1) * PANEL; o++) {                    \
                const T *from = weight + o * in;                                                  \
                float largest = 0, nothing = 0;                                                   \
                for (int64_t i = 0; i < in; i++) {                                                \
                    float value = widen_##T(from[i]);                                             \
                    largest = fabsf(value) > largest ? fabsf(value) : largest;                    \
                    nothing += value * 0;                                                         \
                }                                                                                 \
                float steps = largest > 0 ? INT8_MAX / largest : 0;                               \
                for (int64_t i = 0; i < in && nothing == 0; i++)                                  \
                    panel[i * PANEL + o % PANEL] = (int8_t)rintf(widen_##T(from[i]) * steps);     \
                scales[o] = largest / INT8_MAX + nothing;                                         \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_PACK_INT8(float)
DEFINE_PACK_INT8(bfloat16)

#endif
