/* Sums of vectors' lanes, added to the sums of a tile (tile.h, which includes this).

   sums[t * TILE + o] += the lanes of lanes[o][t], for o < outputs and t < tokens, which are constants where it is called.
   Broad vectors are added up sixteen at a time; what is beyond `outputs`, up to a multiple of OUTPUTS_Broad, is zero and
   its sum is written as it was. */

INLINED void add_lanes_Lanes(Lanes (*lanes)[TOKENS_Lanes], float *sums, int outputs, int tokens) {
    UNROLLED for (int o = 0; o < outputs; o++)
        UNROLLED for (int t = 0; t < tokens; t++) sums[t * TILE + o] += SUM(lanes[o][t]);
}

#if HAS_BROAD

#define FOLD(shuffle, one, other, low, high) _mm512_add_ps(shuffle(one, other, low), shuffle(one, other, high))

/* Lane q of the result is the sum of the lanes of of[q], for q < count, a constant where it is called. Halves are added
   first, then their halves, of several at a time, whatever the count. */
FOR_Broad INLINED __m512 fold(__m512 of[BROAD], int count) {
    UNROLLED_16 for (int q = 0; q < count; q++)
        if (!(q & 4)) of[q] = FOLD(_mm512_shuffle_f32x4, of[q], of[q + 4 < count ? q + 4 : q], 0x44, 0xee);
    UNROLLED_16 for (int q = 0; q < count; q++)
        if (!(q & 12)) of[q] = FOLD(_mm512_shuffle_f32x4, of[q], of[q + 8 < count ? q + 8 : q], 0x88, 0xdd);
    UNROLLED_16 for (int q = 0; q < count; q += 2)
        if (!(q & 12)) of[q] = FOLD(_mm512_shuffle_ps, of[q], of[q + 1 < count ? q + 1 : q], 0x44, 0xee);
    return FOLD(_mm512_shuffle_ps, of[0], of[2 < count ? 2 : 0], 0x88, 0xdd);
}

/* sums[k * TILE + o] += folded[k * width + o], all of them constants where it is called. */
FOR_Broad INLINED void add_folded(float *sums, __m512 folded, int width, int tokens) {
    UNROLLED for (int q = 0; q < tokens * width; q += 4) {
        float *some = sums + q / width * TILE + q % width;
        _mm_storeu_ps(some, _mm_add_ps(_mm_loadu_ps(some), ((const __m128 *)&folded)[q / 4]));
    }
}

FOR_Broad INLINED void add_lanes_Broad(__m512 (*lanes)[TOKENS_Broad], float *sums, int outputs, int tokens) {
    const int width = outputs > OUTPUTS_Broad ? OUTPUTS_ALONE : OUTPUTS_Broad, at_once = BROAD / width;
    UNROLLED for (int t = 0; t < tokens; t += at_once) {
        const int some = tokens - t < at_once ? tokens - t : at_once;
        __m512 of[BROAD];
        UNROLLED_16 for (int q = 0; q < some * width; q++) of[q] = lanes[q % width][t + q / width];
        add_folded(sums + t * TILE, fold(of, some * width), width, some);
    }
}

#endif
