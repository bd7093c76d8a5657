/* Tiles of x times w transposed, for one instruction set and one kind of weight. Included once for each, with

     NAME(x)                  x with the set's suffix
     TARGET                   the function attribute that allows the set
     VECTOR, LANES            a register of floats
     W_BYTES, X_BYTES         bytes of one weight and of one x
     STEP                     elements that one ACCUMULATE takes
     LOAD_W(p), LOAD_X(p)     STEP elements
     TAIL_W(p, n)             the first n elements, then zeros
     ACCUMULATE(sum, w, x), ZERO
     SUM_OF_4(a, b, c, d)     a vector of four floats: the sums over each one's lanes
     MOST_TOKENS              what the registers hold beside ROWS

   Weights lie as in the checkpoint, one row per output; x lies packed, for each step along k the tile's tokens one
   after the other. A tile keeps ROWS x tokens sums in registers and adds up along k; each sum's order of additions
   is the same whatever the tile's size, so that an output depends neither on its neighbours in the batch nor on the
   number of threads. What the next tiles need of w is fetched ahead: the processor itself stops at each row's end. */

#define KEEP_UNROLLED _Pragma("GCC unroll 16")

TARGET static inline __attribute__((always_inline)) void NAME(sums)(
    const int tokens, VECTOR sums[ROWS][MOST_TOKENS], const char *w, size_t w_stride, const char *x, long k,
    const char *ahead, long lines_ahead)
{
    KEEP_UNROLLED for (int r = 0; r < ROWS; r++)
        KEEP_UNROLLED for (int t = 0; t < tokens; t++) sums[r][t] = ZERO;
    long at = 0;
    while (at + STEP <= k) {
        for (long line = 0; line < lines_ahead; line++, ahead += 64) __builtin_prefetch(ahead);
        const long stop = at + 4 * STEP <= k ? at + 4 * STEP : k - k % STEP;
        for (; at < stop; at += STEP, x += tokens * STEP * X_BYTES) {
            W_VECTOR weights[ROWS];
            KEEP_UNROLLED for (int r = 0; r < ROWS; r++) weights[r] = LOAD_W(w + r * w_stride + at * W_BYTES);
            KEEP_UNROLLED for (int t = 0; t < tokens; t++) {
                const X_VECTOR inputs = LOAD_X(x + t * STEP * X_BYTES);
                KEEP_UNROLLED for (int r = 0; r < ROWS; r++) sums[r][t] = ACCUMULATE(sums[r][t], weights[r], inputs);
            }
        }
    }
    if (at < k) {
        W_VECTOR weights[ROWS];
        KEEP_UNROLLED for (int r = 0; r < ROWS; r++) weights[r] = TAIL_W(w + r * w_stride + at * W_BYTES, k - at);
        KEEP_UNROLLED for (int t = 0; t < tokens; t++) {
            const X_VECTOR inputs = LOAD_X(x + t * STEP * X_BYTES);
            KEEP_UNROLLED for (int r = 0; r < ROWS; r++) sums[r][t] = ACCUMULATE(sums[r][t], weights[r], inputs);
        }
    }
}

TARGET static inline __attribute__((always_inline)) void NAME(rows_times)(
    const int tokens, const char *w, size_t w_stride, const char *x, long k, four_floats *out,
    const char *ahead, long lines_ahead)
{
    VECTOR sums[ROWS][MOST_TOKENS];
    NAME(sums)(tokens, sums, w, w_stride, x, k, ahead, lines_ahead);
    KEEP_UNROLLED for (int t = 0; t < tokens; t++)
        out[t] += SUM_OF_4(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
}

#define TILE(tokens)                                                                                                   \
    TARGET static void NAME(tile_##tokens)(const char *w, size_t w_stride, const char *x, long k, four_floats *out,    \
                                           const char *ahead, long lines_ahead)                                         \
    {                                                                                                                  \
        NAME(rows_times)(tokens, w, w_stride, x, k, out, ahead, lines_ahead);                                     \
    }
TILE(1)
TILE(2)
TILE(3)
#if MOST_TOKENS > 3
TILE(4)
TILE(5)
TILE(6)
#endif
#undef TILE

/* One output of the single token x, where it lies one step after the other. For a single token rows are read one by one,
   straight through memory, which is what the processor foresees best. */
TARGET static inline __attribute__((always_inline)) VECTOR NAME(row_sum)(const char *w, const char *x, long k)
{
    VECTOR sum = ZERO;
    long at = 0;
    for (; at + STEP <= k; at += STEP) {
        __builtin_prefetch(w + at * W_BYTES + AHEAD_BYTES);
        sum = ACCUMULATE(sum, LOAD_W(w + at * W_BYTES), LOAD_X(x + at * X_BYTES));
    }
    if (at < k) sum = ACCUMULATE(sum, TAIL_W(w + at * W_BYTES, k - at), LOAD_X(x + at * X_BYTES));
    return sum;
}

TARGET static float NAME(single)(const char *w, const char *x, long k, long block)
{
    float sum = 0;
    for (long at = 0; at < k; at += block)
        sum += SUM_OF_4(NAME(row_sum)(w + at * W_BYTES, x + at * X_BYTES, at + block < k ? block : k - at), ZERO, ZERO,
                        ZERO)[0];
    return sum;
}

TARGET static four_floats NAME(four_singles)(const char *w, size_t w_stride, const char *x, long k, long block)
{
    if (block < k)
        return (four_floats){NAME(single)(w, x, k, block), NAME(single)(w + w_stride, x, k, block),
                             NAME(single)(w + 2 * w_stride, x, k, block), NAME(single)(w + 3 * w_stride, x, k, block)};
    const VECTOR first = NAME(row_sum)(w, x, k), second = NAME(row_sum)(w + w_stride, x, k);
    const VECTOR third = NAME(row_sum)(w + 2 * w_stride, x, k), fourth = NAME(row_sum)(w + 3 * w_stride, x, k);
    return SUM_OF_4(first, second, third, fourth);
}

static const Tiles NAME(tiles) = {
    .most_tokens = MOST_TOKENS,
    .tiles = {NAME(tile_1), NAME(tile_2), NAME(tile_3),
#if MOST_TOKENS > 3
              NAME(tile_4), NAME(tile_5), NAME(tile_6),
#endif
    },
    .four_singles = NAME(four_singles),
    .single = NAME(single),
    .step = STEP,
    .step_bytes = STEP * W_BYTES,
    .x_bytes = X_BYTES,
};

#undef NAME
#undef TARGET
#undef VECTOR
#undef W_VECTOR
#undef X_VECTOR
#undef W_BYTES
#undef X_BYTES
#undef STEP
#undef LOAD_W
#undef LOAD_X
#undef TAIL_W
#undef ACCUMULATE
#undef ZERO
#undef SUM_OF_4
#undef MOST_TOKENS
