/* The tile of tile.h where a CPU multiplies bfloat16 by itself: pairs of products are added to sixteen sums at a time,
   and nothing is widened. Included there. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#define FOR_PAIRS __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define PAIRED 32          /* numbers in a register of pairs */
#define PAIRED_OUTPUTS 4   /* by PAIRED_TOKENS: sums held in registers, which are 32 here */
#define PAIRED_TOKENS 6
#define PAIRED_OUTPUTS_ALONE 8

static int multiplies_pairs(void) { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

/* lanes[o][t] += products of PAIRED numbers of w[o] and x[t], or of as many as `inside` has bits. */
FOR_PAIRS INLINED void add_pairs(__m512 (*lanes)[PAIRED_TOKENS], const bfloat16 *w, int64_t w_stride,
                                 const bfloat16 *x, int64_t x_stride, __mmask32 inside, int outputs, int tokens) {
    __m512i weights[PAIRED_OUTPUTS_ALONE];
    UNROLLED for (int o = 0; o < outputs; o++) {
        weights[o] = _mm512_maskz_loadu_epi16(inside, w + o * w_stride);
        READ_AHEAD(w + (o + outputs) * w_stride);
    }
    UNROLLED for (int t = 0; t < tokens; t++) {
        __m512bh input = (__m512bh)_mm512_maskz_loadu_epi16(inside, x + t * x_stride);
        UNROLLED for (int o = 0; o < outputs; o++)
            lanes[o][t] = _mm512_dpbf16_ps(lanes[o][t], (__m512bh)weights[o], input);
    }
}

/* As dot there. */
FOR_PAIRS INLINED void dot_pairs(const bfloat16 *w, int64_t w_stride, const bfloat16 *x, int64_t x_stride,
                                 int64_t depth, float *sums, int outputs, int tokens) {
    __m512 lanes[PAIRED_OUTPUTS_ALONE][PAIRED_TOKENS];
    UNROLLED for (int o = 0; o < outputs; o++)
        UNROLLED for (int t = 0; t < tokens; t++) lanes[o][t] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + PAIRED <= depth; i += PAIRED) add_pairs(lanes, w + i, w_stride, x + i, x_stride, ~0u, outputs, tokens);
    if (i < depth)
        add_pairs(lanes, w + i, w_stride, x + i, x_stride, (1u << (depth - i)) - 1, outputs, tokens);
    UNROLLED for (int o = 0; o < outputs; o++)
        UNROLLED for (int t = 0; t < tokens; t++) sums[t * TILE + o] += _mm512_reduce_add_ps(lanes[o][t]);
}

/* As dots there. */
FOR_PAIRS INLINED void dots_of_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                     int outputs, int tokens) {
    if (tokens == 6) dot_pairs(w, in, x, in, depth, sums, outputs, 6);
    else if (tokens == 5) dot_pairs(w, in, x, in, depth, sums, outputs, 5);
    else if (tokens == 4) dot_pairs(w, in, x, in, depth, sums, outputs, 4);
    else if (tokens == 3) dot_pairs(w, in, x, in, depth, sums, outputs, 3);
    else if (tokens == 2) dot_pairs(w, in, x, in, depth, sums, outputs, 2);
    else dot_pairs(w, in, x, in, depth, sums, outputs, 1);
}

FOR_PAIRS static void dots_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                 int outputs, int tokens) {
    if (outputs == 4) dots_of_pairs(w, in, x, depth, sums, 4, tokens);
    else if (outputs == 3) dots_of_pairs(w, in, x, depth, sums, 3, tokens);
    else if (outputs == 2) dots_of_pairs(w, in, x, depth, sums, 2, tokens);
    else dots_of_pairs(w, in, x, depth, sums, 1, tokens);
}

FOR_PAIRS static void alone_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                  int outputs) {
    int o = 0;
    for (; o + PAIRED_OUTPUTS_ALONE <= outputs; o += PAIRED_OUTPUTS_ALONE)
        dot_pairs(w + o * in, in, x, in, depth, sums + o, PAIRED_OUTPUTS_ALONE, 1);
    for (; o < outputs; o++) dot_pairs(w + o * in, in, x, in, depth, sums + o, 1, 1);
}

/* As tile there, of tokens as they are. */
static void tile_pairs(const bfloat16 *w, const bfloat16 *x, int64_t in, int outputs, int tokens, float *sums) {
    int blocks = (tokens + PAIRED_TOKENS - 1) / PAIRED_TOKENS;
    for (int64_t begin = 0; begin < in; begin += DEPTH, w += DEPTH, x += DEPTH) {
        int64_t depth = in - begin < DEPTH ? in - begin : DEPTH;
        if (tokens == 1) {
            alone_pairs(w, in, x, depth, sums, outputs);
            continue;
        }
        for (int o = 0; o < outputs; o += PAIRED_OUTPUTS)
            for (int b = 0; b < blocks; b++) {
                int first = tokens * b / blocks, last = tokens * (b + 1) / blocks;
                int m = outputs - o < PAIRED_OUTPUTS ? outputs - o : PAIRED_OUTPUTS;
                dots_pairs(w + o * in, in, x + first * in, depth, sums + first * TILE + o, m, last - first);
            }
    }
}

#else

static int multiplies_pairs(void) { return 0; }
static void tile_pairs(const bfloat16 *w, const bfloat16 *x, int64_t in, int outputs, int tokens, float *sums) {}

#endif
