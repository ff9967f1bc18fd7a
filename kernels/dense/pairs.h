/* The tile of tile.h where a CPU multiplies bfloat16 by itself: pairs of products are added to sixteen sums at a time,
   and nothing is widened. Included there. */

#if HAS_BROAD

#define FOR_PAIRS __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define PAIRED 32        /* numbers in a register of pairs, which has BROAD sums */
#define PAIRED_OUTPUTS OUTPUTS_Broad
#define PAIRED_TOKENS TOKENS_Broad
#define PAIRED_OUTPUTS_ALONE OUTPUTS_ALONE
#define ASKING 3         /* blocks of tokens that ask for the next rows: the CPU forgets some of what it is asked for */

static int multiplies_pairs(void) {
    return __builtin_cpu_supports("avx512bf16") && has_broad();
}

/* Tokens are multiplied as they lie, or packed: PAIRED numbers of each token of a block of at most PAIRED_TOKENS, then
   the next of each. A token alone is packed as it lies. A row takes `paired_width` numbers. */
static int64_t paired_width(int64_t in) { return (in + PAIRED - 1) / PAIRED * PAIRED; }
static int paired_blocks(int tokens) { return (tokens + PAIRED_TOKENS - 1) / PAIRED_TOKENS; }

/* One thread's part of packing the rows token[k] of x, or the rows k where that is NULL, for `tokens` k from `first`,
   which are one pass. */
static void pack_pass(const bfloat16 *x, int64_t in, const int32_t *token, int64_t first, int tokens,
                      bfloat16 *packed, int me, int all) {
    for (int b = 0, blocks = paired_blocks(tokens); b < blocks; b++) {
        int low = tokens * b / blocks, size = tokens * (b + 1) / blocks - low;
        bfloat16 *block = packed + low * paired_width(in);
        for (int t = 0; t < size; t++) {
            int64_t k = first + low + t, i = 0;
            const bfloat16 *row = x + (token ? token[k] : k) * in;
            if (k % all != me) continue;
            for (; i + PAIRED <= in; i += PAIRED)
                memcpy(block + i * size + t * PAIRED, row + i, PAIRED * sizeof(bfloat16));
            memcpy(block + i * size + t * PAIRED, row + i, (in - i) * sizeof(bfloat16));
        }
    }
}

/* lanes[o][t] += products of PAIRED numbers of w[o] and x[t], or of as many as `inside` has bits. `next`: the rows of
   weights that come next, which are asked for, or NULL. Beside several tokens no register is left for their place: they
   are those that lie next. */
FOR_PAIRS INLINED void add_pairs(__m512 (*lanes)[PAIRED_TOKENS], const bfloat16 *w, int64_t w_stride,
                                 const bfloat16 *x, int64_t x_stride, __mmask32 inside, int outputs, int tokens,
                                 const bfloat16 *next) {
    __m512i weights[PAIRED_OUTPUTS_ALONE];
    UNROLLED for (int o = 0; o < outputs; o++) weights[o] = _mm512_maskz_loadu_epi16(inside, w + o * w_stride);
    if (next) UNROLLED for (int o = 0; o < outputs; o++)
        READ_AHEAD(tokens > 1 ? w + (o + outputs) * w_stride : next + o * w_stride);
    UNROLLED for (int t = 0; t < tokens; t++) {
        __m512bh input = (__m512bh)_mm512_maskz_loadu_epi16(inside, x + t * x_stride);
        UNROLLED for (int o = 0; o < outputs; o++)
            lanes[o][t] = _mm512_dpbf16_ps(lanes[o][t], (__m512bh)weights[o], input);
    }
}

/* As dot there, of tokens that lie as rows of w do, or are packed, for outputs <= PAIRED_OUTPUTS, or
   PAIRED_OUTPUTS_ALONE. */
FOR_PAIRS INLINED void dot_pairs(const bfloat16 *w, int64_t w_stride, const bfloat16 *x, int64_t depth, float *sums,
                                 int outputs, int tokens, const bfloat16 *next, int packed) {
    const int64_t x_stride = packed ? PAIRED : w_stride, x_next = packed ? tokens : 1;
    __m512 lanes[PAIRED_OUTPUTS_ALONE][PAIRED_TOKENS];
    UNROLLED for (int o = 0; o < PAIRED_OUTPUTS_ALONE; o++)
        UNROLLED for (int t = 0; t < tokens; t++) lanes[o][t] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + PAIRED <= depth; i += PAIRED)
        add_pairs(lanes, w + i, w_stride, x + i * x_next, x_stride, ~0u, outputs, tokens, next ? next + i : NULL);
    if (i < depth)
        add_pairs(lanes, w + i, w_stride, x + i * x_next, x_stride, (1u << (depth - i)) - 1, outputs, tokens,
                  next ? next + i : NULL);
    add_lanes_Broad(lanes, sums, outputs, tokens);
}

/* As dots there. */
FOR_PAIRS INLINED void dots_of_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                     int outputs, int tokens, const bfloat16 *next, int packed) {
    if (tokens == 6) dot_pairs(w, in, x, depth, sums, outputs, 6, next, packed);
    else if (tokens == 5) dot_pairs(w, in, x, depth, sums, outputs, 5, next, packed);
    else if (tokens == 4) dot_pairs(w, in, x, depth, sums, outputs, 4, next, packed);
    else if (tokens == 3) dot_pairs(w, in, x, depth, sums, outputs, 3, next, packed);
    else if (tokens == 2) dot_pairs(w, in, x, depth, sums, outputs, 2, next, packed);
    else dot_pairs(w, in, x, depth, sums, outputs, 1, next, packed);
}

FOR_PAIRS INLINED void dots_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                 int outputs, int tokens, const bfloat16 *next, int packed) {
    if (outputs == 4) dots_of_pairs(w, in, x, depth, sums, 4, tokens, next, packed);
    else if (outputs == 3) dots_of_pairs(w, in, x, depth, sums, 3, tokens, next, packed);
    else if (outputs == 2) dots_of_pairs(w, in, x, depth, sums, 2, tokens, next, packed);
    else dots_of_pairs(w, in, x, depth, sums, 1, tokens, next, packed);
}

/* `after`: the rows that come after these. */
FOR_PAIRS static void alone_pairs(const bfloat16 *w, int64_t in, const bfloat16 *x, int64_t depth, float *sums,
                                  int outputs, const bfloat16 *after) {
    int o = 0;
    for (; o + PAIRED_OUTPUTS_ALONE <= outputs; o += PAIRED_OUTPUTS_ALONE) {
        const bfloat16 *next = w + (o + PAIRED_OUTPUTS_ALONE) * in;
        dot_pairs(w + o * in, in, x, depth, sums + o, PAIRED_OUTPUTS_ALONE, 1,
                  o + PAIRED_OUTPUTS_ALONE < outputs ? next : after, 0);
    }
    for (; o < outputs; o += PAIRED_OUTPUTS) {
        int m = outputs - o < PAIRED_OUTPUTS ? outputs - o : PAIRED_OUTPUTS;
        dots_pairs(w + o * in, in, x, depth, sums + o, m, 1, o + m < outputs ? w + (o + m) * in : after, 0);
    }
}

/* As tile there; `packed` is a constant where it is called. */
FOR_PAIRS INLINED void tile_of_pairs(const bfloat16 *w, const bfloat16 *x, int64_t in, int outputs, int tokens,
                                     float *sums, const bfloat16 *after, int packed) {
    int blocks = paired_blocks(tokens);
    for (int64_t begin = 0; begin < in; begin += DEPTH, w += DEPTH, after += DEPTH) {
        int64_t depth = in - begin < DEPTH ? in - begin : DEPTH;
        if (tokens == 1) {
            alone_pairs(w, in, x + begin, depth, sums, outputs, after);
            continue;
        }
        for (int o = 0; o < outputs; o += PAIRED_OUTPUTS)
            for (int b = 0; b < blocks; b++) {
                int low = tokens * b / blocks, size = tokens * (b + 1) / blocks - low;
                int m = outputs - o < PAIRED_OUTPUTS ? outputs - o : PAIRED_OUTPUTS;
                const bfloat16 *block = packed ? x + low * paired_width(in) + begin * size : x + low * in + begin;
                dots_pairs(w + o * in, in, block, depth, sums + low * TILE + o, m, size, b < ASKING ? w : NULL, packed);
            }
    }
}

/* `after`: the rows of weights that a token alone is multiplied with after these. */
FOR_PAIRS static void tile_pairs(const bfloat16 *w, const bfloat16 *x, int64_t in, int outputs, int tokens, float *sums,
                                 const bfloat16 *after, int packed) {
    if (packed) tile_of_pairs(w, x, in, outputs, tokens, sums, after, 1);
    else tile_of_pairs(w, x, in, outputs, tokens, sums, after, 0);
}

#else

static int multiplies_pairs(void) { return 0; }
static int64_t paired_width(int64_t in) { return in; }
static void pack_pass(const bfloat16 *x, int64_t in, const int32_t *token, int64_t first, int tokens,
                      bfloat16 *packed, int me, int all) {}
static void tile_pairs(const bfloat16 *w, const bfloat16 *x, int64_t in, int outputs, int tokens, float *sums,
                       const bfloat16 *after, int packed) {}

#endif
