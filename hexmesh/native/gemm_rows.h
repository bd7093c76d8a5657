/* Operations on rows for one instruction set; included once for each, with NAME(x) and TARGET. The vectors are the
   compiler's own, sixteen floats whatever the registers hold. Values that torch rounds to bfloat16 on their way are
   rounded here too. */

TARGET static inline __attribute__((always_inline)) floats16 NAME(load)(const char *at, long i, const bool is_bf16)
{
    if (!is_bf16) return ((const floats16_at *)(at + 4 * i))->v;
    const words16 bits = __builtin_convertvector(((const halves16_at *)(at + 2 * i))->v, words16) << 16;
    return (floats16)bits;
}

/* To bfloat16 and back, to the nearest, ties to even; what is no number stays none. */
TARGET static inline __attribute__((always_inline)) words16 NAME(rounded)(floats16 value)
{
    const words16 bits = (words16)value;
    const words16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const words16 is_nan = (words16)((bits & 0x7fffffff) > 0x7f800000);
    return (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
}

TARGET static inline __attribute__((always_inline)) floats16 NAME(through)(floats16 value, const bool is_bf16)
{
    return is_bf16 ? (floats16)(NAME(rounded)(value) << 16) : value;
}

TARGET static inline __attribute__((always_inline)) void NAME(store)(char *at, long i, floats16 value,
                                                                     const bool is_bf16)
{
    if (is_bf16)
        ((halves16_at *)(at + 2 * i))->v = __builtin_convertvector(NAME(rounded)(value), halves16);
    else
        ((floats16_at *)(at + 4 * i))->v = value;
}

/* The first n < 16 elements, then zeros. */
TARGET static inline __attribute__((always_inline)) floats16 NAME(load_some)(const char *at, long i, long n,
                                                                            const bool is_bf16)
{
    char some[64] = {0};
    const size_t bytes = is_bf16 ? 2 : 4;
    memcpy(some, at + bytes * i, bytes * n);
    return NAME(load)(some, 0, is_bf16);
}

TARGET static inline __attribute__((always_inline)) void NAME(store_some)(char *at, long i, long n, floats16 value,
                                                                         const bool is_bf16)
{
    char some[64];
    const size_t bytes = is_bf16 ? 2 : 4;
    NAME(store)(some, 0, value, is_bf16);
    memcpy(at + bytes * i, some, bytes * n);
}

/* e to the x, within two units in the last place; infinity from 88 on. */
TARGET static inline __attribute__((always_inline)) floats16 NAME(exp)(floats16 x)
{
    const floats16 least = (floats16){} - 87.0f, infinite = (floats16){} + __builtin_inff();
    const ints16 is_high = x > 88.0f, is_low = x < least;
    x = (floats16)(((ints16)least & is_low) | ((ints16)x & ~is_low & ~is_high));
    const float shifter = 0x1.8p23f; /* adding it rounds to whole numbers */
    const floats16 whole = (x * 0x1.715476p+0f + shifter) - shifter;
    const floats16 rest = (x - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f; /* ln 2 in two parts */
    floats16 p = rest * 0x1.a01a02p-13f + 0x1.6c16c2p-10f;
    p = p * rest + 0x1.111112p-7f;
    p = p * rest + 0x1.555556p-5f;
    p = p * rest + 0x1.555556p-3f;
    p = p * rest + 0x1p-1f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    const ints16 answer = (ints16)p + (__builtin_convertvector(whole, ints16) << 23);
    return (floats16)((answer & ~is_high) | ((ints16)infinite & is_high));
}

/* As torch has them: x / (1 + exp(-x)), and x / 2 (1 + tanh(u)), which is x / (1 + exp(-2 u)). */
TARGET static inline __attribute__((always_inline)) floats16 NAME(activated)(floats16 x, const enum gate kind)
{
    if (kind == GATE_SILU) return x / (1.0f + NAME(exp)(-x));
    return x / (1.0f + NAME(exp)(-0x1.988454p+0f * (x + 0x1.6e4e26p-5f * x * x * x)));
}

TARGET static void NAME(widen)(const uint16_t *from, float *to, long n)
{
    long i = 0;
    for (; i + 16 <= n; i += 16) NAME(store)((char *)to, i, NAME(load)((const char *)from, i, true), false);
    for (; i < n; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

TARGET static inline __attribute__((always_inline)) float NAME(sum_of)(floats16 v)
{
    float lanes[16];
    memcpy(lanes, &v, sizeof lanes);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

TARGET static inline __attribute__((always_inline)) void NAME(rms_norm_as)(const char *x, const char *weight, char *y,
                                                                          long n, float eps, const enum norm_end end,
                                                                          const bool is_bf16)
{
    floats16 squares = {};
    const long whole = n - n % 16;
    for (long i = 0; i < whole; i += 16) {
        const floats16 v = NAME(load)(x, i, is_bf16);
        squares += v * v;
    }
    if (whole < n) {
        const floats16 v = NAME(load_some)(x, whole, n - whole, is_bf16);
        squares += v * v;
    }
    const float scale = 1.0f / __builtin_sqrtf(NAME(sum_of)(squares) / (float)n + eps);
    for (long i = 0; i < n; i += 16) {
        const bool is_part = i + 16 > n;
        floats16 v = (is_part ? NAME(load_some)(x, i, n - i, is_bf16) : NAME(load)(x, i, is_bf16)) * scale;
        floats16 by = is_part ? NAME(load_some)(weight, i, n - i, is_bf16) : NAME(load)(weight, i, is_bf16);
        if (end == ROUND_THEN_SCALE) v = NAME(through)(v, is_bf16);
        if (end == SCALE_BY_ONE_PLUS) by += 1.0f;
        v *= by;
        if (is_part)
            NAME(store_some)(y, i, n - i, v, is_bf16);
        else
            NAME(store)(y, i, v, is_bf16);
    }
}

TARGET static void NAME(rms_norm)(const char *x, const char *weight, char *y, long n, float eps, enum norm_end end,
                                  bool is_bf16)
{
    if (is_bf16)
        NAME(rms_norm_as)(x, weight, y, n, eps, end, true);
    else
        NAME(rms_norm_as)(x, weight, y, n, eps, end, false);
}

TARGET static inline __attribute__((always_inline)) floats16 NAME(gated)(floats16 gate, floats16 up,
                                                                        const enum gate kind, const bool is_bf16)
{
    return NAME(through)(NAME(activated)(gate, kind), is_bf16) * up;
}

TARGET static inline __attribute__((always_inline)) void NAME(gate_as)(char *gate, const char *up, long n,
                                                                      const enum gate kind, const bool is_bf16)
{
    long i = 0;
    for (; i + 16 <= n; i += 16)
        NAME(store)(gate, i, NAME(gated)(NAME(load)(gate, i, is_bf16), NAME(load)(up, i, is_bf16), kind, is_bf16),
                    is_bf16);
    if (i < n)
        NAME(store_some)(gate, i, n - i,
                         NAME(gated)(NAME(load_some)(gate, i, n - i, is_bf16), NAME(load_some)(up, i, n - i, is_bf16),
                                     kind, is_bf16),
                         is_bf16);
}

TARGET static void NAME(gate)(char *gate, const char *up, long n, enum gate kind, bool is_bf16)
{
    if (kind == GATE_SILU) {
        if (is_bf16)
            NAME(gate_as)(gate, up, n, GATE_SILU, true);
        else
            NAME(gate_as)(gate, up, n, GATE_SILU, false);
    } else {
        if (is_bf16)
            NAME(gate_as)(gate, up, n, GATE_GELU_TANH, true);
        else
            NAME(gate_as)(gate, up, n, GATE_GELU_TANH, false);
    }
}

/* In place: the first half of a head turns against the second, as far as cos and sin say. */
TARGET static inline __attribute__((always_inline)) void NAME(rotate_as)(char *head, const char *cos, const char *sin,
                                                                        long dim, const bool is_bf16)
{
    const long half = dim / 2;
    for (long i = 0; i < half; i += 16) {
        const long n = half - i;
        floats16 at[2], by_cos[2], by_sin[2];
        for (int side = 0; side < 2; side++) {
            const long from = i + side * half;
            at[side] = n < 16 ? NAME(load_some)(head, from, n, is_bf16) : NAME(load)(head, from, is_bf16);
            by_cos[side] = n < 16 ? NAME(load_some)(cos, from, n, is_bf16) : NAME(load)(cos, from, is_bf16);
            by_sin[side] = n < 16 ? NAME(load_some)(sin, from, n, is_bf16) : NAME(load)(sin, from, is_bf16);
        }
        for (int side = 0; side < 2; side++) {
            const floats16 other = side ? at[0] : -at[1];
            const floats16 turned =
                NAME(through)(at[side] * by_cos[side], is_bf16) + NAME(through)(other * by_sin[side], is_bf16);
            if (n < 16)
                NAME(store_some)(head, i + side * half, n, turned, is_bf16);
            else
                NAME(store)(head, i + side * half, turned, is_bf16);
        }
    }
}

TARGET static void NAME(rotate)(char *head, const char *cos, const char *sin, long dim, bool is_bf16)
{
    if (is_bf16)
        NAME(rotate_as)(head, cos, sin, dim, true);
    else
        NAME(rotate_as)(head, cos, sin, dim, false);
}

static const RowKernels NAME(rows) = {
    .widen = NAME(widen), .rms_norm = NAME(rms_norm), .gate = NAME(gate), .rotate = NAME(rotate)};

#undef NAME
#undef TARGET
