/* Attention of one item in one instruction set: included by attention.c once per set, with LANES (floats in a vector),
   ROWS x COLUMNS (vectors of sums that fit the registers beside their factors), EACH_LANE and NAME defined.

   Scores, weights and sums are float32 whatever the pool holds; bf16 is widened a tile at a time. Rows of scores are
   ordered (token, head). Softmax is online over tiles, in powers of two. A dimension that LANES does not divide is
   covered by a last vector that overlaps the one before: nothing is read outside a token's own elements, which is why
   dimensions must be LANES or more. */

typedef float NAME(f32) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(i32) __attribute__((vector_size(4 * LANES)));
typedef float NAME(f32_at) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t NAME(u16_at) __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t NAME(u32) __attribute__((vector_size(4 * LANES)));

#define vec NAME(f32)
#define ivec NAME(i32)
#define ALWAYS static inline __attribute__((always_inline))

ALWAYS vec NAME(load)(const float *from)
{
    return *(const NAME(f32_at) *)from;
}

ALWAYS void NAME(store)(float *to, vec value)
{
    *(NAME(f32_at) *)to = value;
}

ALWAYS vec NAME(widen)(const uint16_t *from)
{
    return (vec)(__builtin_convertvector(*(const NAME(u16_at) *)from, NAME(u32)) << 16);
}

ALWAYS vec NAME(larger)(vec a, vec b)
{
    const ivec is_larger = a > b;
    return (vec)(((ivec)a & is_larger) | ((ivec)b & ~is_larger));
}

/* 2 ** x for x up to 0, to 2e-9 before rounding; exactly 0 below -126; a NaN stays one. */
ALWAYS vec NAME(exp2)(vec x)
{
    const ivec is_kept = ~(x < -126.0f);
    const float shifter = 0x1.8p23f; /* adding it rounds to whole numbers */
    const vec whole = (x + shifter) - shifter;
    const vec rest = x - whole;
    vec p = rest * 0x1.41a6fep-13f + 0x1.5f44f0p-10f;
    p = p * rest + 0x1.3b2dfep-7f;
    p = p * rest + 0x1.c6aed6p-5f;
    p = p * rest + 0x1.ebfbdap-3f;
    p = p * rest + 0x1.62e430p-1f;
    p = p * rest + 1.0f;
    const ivec scaled = (ivec)p + (__builtin_convertvector(whole, ivec) << 23);
    return (vec)(scaled & is_kept);
}

/* Of lane i: a's where i has the bit not set, b's where it has. */
#define OWN(w, i) (((i) & (w)) ? LANES + (i) : (i))
#define OTHER(w, i) (((i) & (w)) ? LANES + ((i) ^ (w)) : ((i) ^ (w)))
#define TOP(w, i) (((i) & (w)) ? LANES + ((i) ^ (w)) : (i))
#define LOW(w, i) (((i) & (w)) ? LANES + (i) : ((i) ^ (w)))
#define SWAPPED(w, i) ((i) ^ (w))
#define PICK(which, w, a, b) __builtin_shuffle(a, b, (ivec){EACH_LANE(which, w)})

#define FOLD(w)                                                                                                        \
    if (w < LANES)                                                                                                     \
        for (int i = 0; i < (w); i++)                                                                                  \
            rows[i] = PICK(OWN, w, rows[i], rows[i + (w)]) + PICK(OTHER, w, rows[i], rows[i + (w)]);

/* Lane i of the answer is the sum over the lanes of rows[i]. */
ALWAYS vec NAME(sums)(vec *rows)
{
#if LANES > 8
    FOLD(8)
#endif
#if LANES > 4
    FOLD(4)
#endif
    FOLD(2)
    FOLD(1)
    return rows[0];
}

/* A vector and itself with lanes moved by w, joined: done for every w, each lane holds the result of all. */
#define ACROSS(w, join)                                                                                                \
    if (w < LANES) {                                                                                                   \
        const vec moved = __builtin_shuffle(x, (ivec){EACH_LANE(SWAPPED, (w) % LANES)});                               \
        x = join;                                                                                                      \
    }

ALWAYS float NAME(sum_across)(vec x)
{
    ACROSS(8, x + moved)
    ACROSS(4, x + moved)
    ACROSS(2, x + moved)
    ACROSS(1, x + moved)
    return x[0];
}

ALWAYS float NAME(largest_across)(vec x)
{
    ACROSS(8, NAME(larger)(x, moved))
    ACROSS(4, NAME(larger)(x, moved))
    ACROSS(2, NAME(larger)(x, moved))
    ACROSS(1, NAME(larger)(x, moved))
    return x[0];
}

#define EXCHANGE(w)                                                                                                    \
    for (int i = 0; i < LANES; i++)                                                                                    \
        if (!(i & (w))) {                                                                                              \
            const vec top = PICK(TOP, w, rows[i], rows[i + (w)]);                                                      \
            rows[i + (w)] = PICK(LOW, w, rows[i], rows[i + (w)]);                                                      \
            rows[i] = top;                                                                                             \
        }

ALWAYS void NAME(transpose)(vec *rows)
{
#if LANES > 8
    EXCHANGE(8)
#endif
#if LANES > 4
    EXCHANGE(4)
#endif
    EXCHANGE(2)
    EXCHANGE(1)
}

/* out (n_rows x n_columns vectors) = [out +] left (n_rows, depth) x right, whose line k begins at right[k] + at. Where
   `ahead` is given, the same of its lines is fetched. */
ALWAYS void NAME(panel)(
    const int n_rows, const int n_columns, const float *left, ptrdiff_t left_stride, const float *const *right,
    const float *const *ahead, ptrdiff_t at, int depth, float *out, ptrdiff_t out_stride, bool adds)
{
    vec sums[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < n_columns; c++)
            sums[r][c] = adds ? NAME(load)(out + r * out_stride + c * LANES) : (vec){0};
    for (int k = 0; k < depth; k++) {
        const float *line = right[k] + at;
        vec factors[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < n_columns; c++)
            factors[c] = NAME(load)(line + c * LANES);
        if (ahead)
#pragma GCC unroll 8
            for (int c = 0; c < n_columns; c++)
                __builtin_prefetch(ahead[k] + at + c * LANES, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; r++) {
            const float factor = left[r * left_stride + k];
#pragma GCC unroll 8
            for (int c = 0; c < n_columns; c++)
                sums[r][c] += factors[c] * factor;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < n_rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < n_columns; c++)
            NAME(store)(out + r * out_stride + c * LANES, sums[r][c]);
}

#define PANEL(r, c, ahead)                                                                                             \
    case r:                                                                                                            \
        NAME(panel)(r, c, left, left_stride, right, ahead, at, depth, out, out_stride, adds);                          \
        break;

/* Any number of rows, c vectors wide; fetching ahead goes with few rows. */
#if ROWS > 4
#define PANELS_OF_MOST_ROWS(c) PANEL(5, c, NULL) PANEL(6, c, NULL)
#else
#define PANELS_OF_MOST_ROWS(c)
#endif
#define PANELS(c)                                                                                                      \
    static __attribute__((noinline)) void NAME(panels_##c)(                                                            \
        int n_rows, const float *left, ptrdiff_t left_stride, const float *const *right, const float *const *ahead,    \
        ptrdiff_t at, int depth, float *out, ptrdiff_t out_stride, bool adds)                                          \
    {                                                                                                                  \
        if (ahead && n_rows <= DOT_ROWS)                                                                               \
            switch (n_rows) {                                                                                          \
                PANEL(1, c, ahead)                                                                                     \
                PANEL(2, c, ahead)                                                                                     \
                PANEL(3, c, ahead)                                                                                     \
                PANEL(4, c, ahead)                                                                                     \
            }                                                                                                          \
        else                                                                                                           \
            for (; n_rows > 0; n_rows -= ROWS, left += ROWS * left_stride, out += ROWS * out_stride)                   \
                switch (least(n_rows, ROWS)) {                                                                         \
                    PANEL(1, c, NULL)                                                                                  \
                    PANEL(2, c, NULL)                                                                                  \
                    PANEL(3, c, NULL)                                                                                  \
                    PANEL(4, c, NULL)                                                                                  \
                    PANELS_OF_MOST_ROWS(c)                                                                             \
                }                                                                                                      \
    }

PANELS(1)
PANELS(2)
#if COLUMNS > 2
PANELS(4)
#endif

/* out (n_rows, width) = [out +] left x right, `width` elements wide. The last vector of an undivided width reads from
   width - LANES on; what it gives has its own place in out, behind the others. */
static void NAME(multiply)(
    int n_rows, int width, const float *left, ptrdiff_t left_stride, const float *const *right,
    const float *const *ahead, int depth, float *out, ptrdiff_t out_stride, bool adds)
{
    const int n_full = width / LANES;
    int c = 0;
#if COLUMNS > 2
    for (; c + 4 <= n_full; c += 4)
        NAME(panels_4)(n_rows, left, left_stride, right, ahead, c * LANES, depth, out + c * LANES, out_stride, adds);
#endif
    for (; c + 2 <= n_full; c += 2)
        NAME(panels_2)(n_rows, left, left_stride, right, ahead, c * LANES, depth, out + c * LANES, out_stride, adds);
    for (; c < n_full; c++)
        NAME(panels_1)(n_rows, left, left_stride, right, ahead, c * LANES, depth, out + c * LANES, out_stride, adds);
    if (width % LANES)
        NAME(panels_1)(n_rows, left, left_stride, right, ahead, width - LANES, depth, out + c * LANES, out_stride, adds);
}

/* Where the vector that begins at element c of a token's elements really begins. */
ALWAYS int NAME(begin)(int c, int dim)
{
    return least(c, dim - LANES);
}

/* Products of a query with LANES / 2 keys: as many addresses as registers hold. */
ALWAYS void NAME(dot_some)(
    const float *query, const float *const *keys, const float *const *ahead, int k_dim, vec *sums)
{
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++)
        sums[i] = (vec){0};
    for (int c = 0; c < k_dim; c += LANES) {
        const vec q = NAME(load)(query + c);
        const int at = NAME(begin)(c, k_dim);
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++)
            sums[i] += q * NAME(load)(keys[i] + at);
        if (ahead)
#pragma GCC unroll 8
            for (int i = 0; i < LANES / 2; i++)
                __builtin_prefetch(ahead[i] + at, 0, 2);
    }
}

/* Scores of a few rows with keys where they lie, LANES keys at a time; `ahead` (or NULL) is fetched meanwhile. */
static void NAME(dots)(
    int n_rows, const float *query, int q_stride, const float *const *keys, const float *const *ahead, int n_keys,
    int k_dim, float *scores)
{
    for (int t = 0; t < n_keys; t += LANES)
        for (int r = 0; r < n_rows; r++) {
            vec sums[LANES];
            const float *q = query + r * q_stride;
            const int half = LANES / 2;
            if (ahead && r == 0) {
                NAME(dot_some)(q, keys + t, ahead + t, k_dim, sums);
                NAME(dot_some)(q, keys + t + half, ahead + t + half, k_dim, sums + half);
            } else {
                NAME(dot_some)(q, keys + t, NULL, k_dim, sums);
                NAME(dot_some)(q, keys + t + half, NULL, k_dim, sums + half);
            }
            NAME(store)(scores + r * TILE_TOKENS + t, NAME(sums)(sums));
        }
}

/* keys (n_keys lines of k_dim) as (k_dim, TILE_TOKENS). */
static void NAME(transpose_keys)(const float *const *keys, int n_keys, int k_dim, float *turned)
{
    for (int t = 0; t < n_keys; t += LANES)
        for (int c = 0; c < k_dim; c += LANES) {
            const int at = NAME(begin)(c, k_dim);
            vec square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                square[i] = NAME(load)(keys[t + i] + at);
            NAME(transpose)(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                NAME(store)(turned + (size_t)(at + i) * TILE_TOKENS + t, square[i]);
        }
}

/* Queries as floats, times `scale`; for dot products the last vector of an undivided width lies at its end, after zeros. */
static void NAME(load_queries)(const struct call *call, const struct item *item, float scale, bool for_dots, float *query)
{
    const int group = heads_per_kv(call), k_dim = call->k_dim, width = round_up(k_dim, LANES);
    const int first_token = call->rows[item->row].first_token + item->first;
    for (int r = 0; r < item->n_queries * group; r++) {
        const ptrdiff_t from = (ptrdiff_t)(first_token + r / group) * call->query.token_stride +
                               (ptrdiff_t)(item->kv_head * group + r % group) * call->query.head_stride;
        float *to = query + (size_t)r * width;
        if (call->is_bf16)
            for (int i = 0; i < k_dim; i++)
                to[i] = wide(((const uint16_t *)call->query.at)[from + i]) * scale;
        else
            for (int i = 0; i < k_dim; i++)
                to[i] = ((const float *)call->query.at)[from + i] * scale;
        if (for_dots && width != k_dim) {
            float *last = to + width - LANES;
            memmove(last + width - k_dim, last, sizeof(float) * (size_t)(k_dim - (width - LANES)));
            memset(last, 0, sizeof(float) * (size_t)(width - k_dim));
        }
    }
}

/* A token's elements as floats. */
ALWAYS void NAME(widen_line)(const uint16_t *from, int dim, float *to)
{
    int c = 0;
#pragma GCC unroll 4
    for (; c + LANES <= dim; c += LANES)
        NAME(store)(to + c, NAME(widen)(from + c));
    if (c < dim)
        NAME(store)(to + dim - LANES, NAME(widen)(from + dim - LANES));
}

/* Lines of a tile's tokens as floats: in the pool itself, or widened into `room`. Lines up to a whole vector repeat the
   first one. Widening fetches the tile after it meanwhile; for others, `ahead` is what to fetch, of as many lines. */
static void NAME(lines)(
    const struct call *call, const struct tile *tile, const struct tile *after, const char *pool, int dim, float *room,
    const float **lines, const float **ahead)
{
    const int width = round_up(dim, LANES), line_bytes = dim * (call->is_bf16 ? 2 : 4);
    for (int t = 0; t < tile->n; t++) {
        const char *line = pool + tile->slots[t] * line_bytes;
        const char *next = t < after->n ? pool + after->slots[t] * line_bytes : line;
        if (call->is_bf16) {
            fetch(next, line_bytes);
            lines[t] = room + (size_t)t * width;
            NAME(widen_line)((const uint16_t *)line, dim, room + (size_t)t * width);
        } else {
            lines[t] = (const float *)line;
            ahead[t] = (const float *)next;
        }
    }
    for (int t = tile->n; t < after->n; t++)
        fetch(pool + after->slots[t] * line_bytes, line_bytes);
    for (int t = tile->n; t < round_up(tile->n, LANES); t++)
        ahead[t] = lines[t] = lines[0];
}

/* Scores of a row to weights relative to the new peak: its old sums shrink by what the peak rose. */
ALWAYS void NAME(weigh)(float *scores, int n, float *peak, float *total, float *sum, int width)
{
    vec top = NAME(load)(scores);
    for (int t = LANES; t < n; t += LANES)
        top = NAME(larger)(top, NAME(load)(scores + t));
    const float own_top = NAME(largest_across)(top), highest = own_top > *peak ? own_top : *peak;
    if (highest > *peak) {
        const float shrink = exp2f(*peak - highest);
        *peak = highest;
        *total *= shrink;
        for (int c = 0; c < width; c += LANES)
            NAME(store)(sum + c, NAME(load)(sum + c) * shrink);
    }
    vec sums = {0};
    for (int t = 0; t < n; t += LANES) {
        const vec weights = NAME(exp2)(NAME(load)(scores + t) - highest);
        NAME(store)(scores + t, weights);
        sums += weights;
    }
    *total += NAME(sum_across)(sums);
}

/* cap * tanh(score / cap), in powers of two. */
ALWAYS void NAME(cap)(float *scores, int n, float softcap)
{
    for (int t = 0; t < n; t += LANES) {
        const vec x = NAME(load)(scores + t);
        const ivec sign = (ivec)x & (ivec)((vec){0} - 0.0f);
        const vec size = (vec)((ivec)x ^ sign);
        const vec e = NAME(exp2)(size * (-2.0f * LOG2_E / softcap));
        const vec tanh_size = (1.0f - e) / (1.0f + e);
        NAME(store)(scores + t, (vec)((ivec)(tanh_size * (softcap * LOG2_E)) ^ sign));
    }
}

/* Floats that run_item needs at most, for items of up to n_rows rows. */
static size_t NAME(item_floats)(const struct call *call, int n_rows)
{
    const size_t k_width = round_up(call->k_dim, LANES), v_width = round_up(call->v_dim, LANES);
    const size_t widest = k_width > v_width ? k_width : v_width;
    const size_t pointers = (sizeof(float *) * k_width) / sizeof(float);
    return n_rows * (k_width + v_width + TILE_TOKENS + 2) + TILE_TOKENS * (widest + k_width) + pointers;
}

/* `next` is what this thread will do next; NULL if nothing. */
static void NAME(run_item)(const struct call *call, const struct item *item, const struct item *next, float *room)
{
    const struct row *row = call->rows + item->row;
    const int group = heads_per_kv(call), n_rows = item->n_queries * group, k_dim = call->k_dim, v_dim = call->v_dim;
    const int k_width = round_up(k_dim, LANES), v_width = round_up(v_dim, LANES);
    const int position = row->position + item->first; /* of the first query */
    const bool for_dots = n_rows <= DOT_ROWS;
    const float **by_dim = (const float **)room; /* the lines of `turned` */
    float *widened = (float *)(by_dim + k_width), *turned = widened + TILE_TOKENS * most(k_width, v_width);
    float *query = turned + TILE_TOKENS * k_width, *sum = query + n_rows * k_width;
    float *scores = sum + n_rows * v_width, *peak = scores + n_rows * TILE_TOKENS, *total = peak + n_rows;
    const float *lines[TILE_TOKENS], *ahead_lines[TILE_TOKENS], *const *ahead = call->is_bf16 ? NULL : ahead_lines;
    struct tile tiles[2], *tile = &tiles[0], *after = &tiles[1];

    NAME(load_queries)(call, item, call->softcap ? call->scaling : call->scaling * LOG2_E, for_dots, query);
    memset(sum, 0, sizeof(float) * (size_t)(n_rows * v_width));
    for (int i = 0; i < k_dim; i++)
        by_dim[i] = turned + (size_t)i * TILE_TOKENS;
    for (int r = 0; r < n_rows; r++) {
        peak[r] = -INFINITY;
        total[r] = 0;
    }
    tile_of(call, item, item->start, tile);
    for (int start = item->start; start < item->stop; start += TILE_TOKENS) {
        const int n = tile->n, n_padded = round_up(n, LANES);
        if (start + TILE_TOKENS < item->stop)
            tile_of(call, item, start + TILE_TOKENS, after);
        else if (next)
            tile_of(call, next, next->start, after);
        else
            after->n = 0;
        /* Rows that see any of it: queries before it are over, and later ones' windows may be past it. */
        const int from = most(0, start - position) * group;
        int upto = n_rows;
        if (call->window)
            upto = least(n_rows, (start + n - 1 + call->window - 1 - position + 1) * group);
        const float *q = query + from * k_width;
        float *s = scores + from * TILE_TOKENS;
        NAME(lines)(call, tile, after, call->k_pool, k_dim, widened, lines, ahead_lines);
        if (for_dots)
            NAME(dots)(upto - from, q, k_width, lines, ahead, n_padded, k_dim, s);
        else {
            NAME(transpose_keys)(lines, n_padded, k_dim, turned);
            NAME(multiply)(upto - from, n_padded, q, k_width, by_dim, NULL, k_dim, s, TILE_TOKENS, false);
        }
        for (int r = from; r < upto; r++) {
            const int at = position + r / group;
            const int begin = most(0, first_seen(call, at) - start), end = least(n, at + 1 - start);
            float *own = scores + r * TILE_TOKENS;
            if (call->softcap)
                NAME(cap)(own, n_padded, call->softcap);
            for (int t = 0; t < begin; t++)
                own[t] = -INFINITY;
            for (int t = end; t < n_padded; t++)
                own[t] = -INFINITY;
            NAME(weigh)(own, n_padded, peak + r, total + r, sum + r * v_width, v_width);
        }
        NAME(lines)(call, tile, after, call->v_pool, v_dim, widened, lines, ahead_lines);
        NAME(multiply)(upto - from, v_dim, s, TILE_TOKENS, lines, ahead, n, sum + from * v_width, v_width, true);
        struct tile *const done = tile;
        tile = after;
        after = done;
    }
    for (int r = 0; r < n_rows; r++) {
        float *own = sum + r * v_width;
        if (v_width != v_dim) /* the last vector overlaps the one before */
            memmove(own + v_dim - LANES, own + v_width - LANES, sizeof(float) * LANES);
        if (item->partial < 0)
            finish(call, own, peak[r], total[r], row->first_token + item->first + r / group,
                   item->kv_head * group + r % group);
        else {
            float *to = call->partial + item->partial + (ptrdiff_t)r * (v_dim + 2);
            to[0] = peak[r];
            to[1] = total[r];
            memcpy(to + 2, own, sizeof(float) * (size_t)v_dim);
        }
    }
}

#undef vec
#undef ivec
#undef ALWAYS
#undef OWN
#undef OTHER
#undef TOP
#undef LOW
#undef PICK
#undef SWAPPED
#undef ACROSS
#undef FOLD
#undef EXCHANGE
#undef PANEL
#undef PANELS
#undef PANELS_OF_MOST_ROWS
