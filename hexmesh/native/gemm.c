/* Products of a few tokens with row-major weights, and the small operations between them, for CPUs.

   A step of few tokens lasts as long as its weights take to read, so weights are read once, where they lie (the mapped
   file's own pages, if need be), at the speed of memory; many tokens are taken in tiles that the registers hold. The
   instruction set is chosen at run time. Addresses come as integers and are the caller's to keep valid; the
   interpreter's lock is released. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "gemm.h"
#include "threads.h"

/* Vectors wider than the processor's pass between functions that are all inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__)
#include <immintrin.h>
#define ON_X86 1
#endif

typedef float floats16 __attribute__((vector_size(64)));
typedef int32_t ints16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));
typedef uint16_t halves16 __attribute__((vector_size(32)));
typedef struct __attribute__((packed, may_alias)) {
    floats16 v;
} floats16_at;
typedef struct __attribute__((packed, may_alias)) {
    halves16 v;
} halves16_at;
typedef struct __attribute__((packed, may_alias)) {
    four_floats v;
} four_floats_at;

/* ---- Plain vectors of four: any processor. */

typedef uint16_t four_halves __attribute__((vector_size(8)));
typedef uint32_t four_words __attribute__((vector_size(16)));
typedef struct __attribute__((packed, may_alias)) {
    four_halves v;
} four_halves_at;

static inline four_floats some_floats(const char *at, long n)
{
    four_floats v = {};
    memcpy(&v, at, 4 * (n < 4 ? n : 4));
    return v;
}

static inline four_floats widened4(const char *at)
{
    return (four_floats)(__builtin_convertvector(((const four_halves_at *)at)->v, four_words) << 16);
}

static inline four_floats some_widened4(const char *at, long n)
{
    four_halves v = {};
    memcpy(&v, at, 2 * (n < 4 ? n : 4));
    return widened4((const char *)&v);
}

static inline four_floats sums_of_4(four_floats a, four_floats b, four_floats c, four_floats d)
{
    return (four_floats){a[0] + a[1] + a[2] + a[3], b[0] + b[1] + b[2] + b[3], c[0] + c[1] + c[2] + c[3],
                         d[0] + d[1] + d[2] + d[3]};
}

#define NAME(x) plain_f32_##x
#define TARGET
#define VECTOR four_floats
#define W_VECTOR four_floats
#define X_VECTOR four_floats
#define W_BYTES 4
#define X_BYTES 4
#define STEP 4
#define LOAD_W(p) (((const four_floats_at *)(p))->v)
#define LOAD_X(p) (((const four_floats_at *)(p))->v)
#define TAIL_W(p, n) some_floats(p, n)
#define ACCUMULATE(sum, w, x) ((sum) + (w) * (x))
#define ZERO ((four_floats){})
#define SUM_OF_4 sums_of_4
#define MOST_TOKENS 3
#include "gemm_tile.h"

#define NAME(x) plain_bf16_##x
#define TARGET
#define VECTOR four_floats
#define W_VECTOR four_floats
#define X_VECTOR four_floats
#define W_BYTES 2
#define X_BYTES 4
#define STEP 4
#define LOAD_W(p) widened4(p)
#define LOAD_X(p) (((const four_floats_at *)(p))->v)
#define TAIL_W(p, n) some_widened4(p, n)
#define ACCUMULATE(sum, w, x) ((sum) + (w) * (x))
#define ZERO ((four_floats){})
#define SUM_OF_4 sums_of_4
#define MOST_TOKENS 3
#include "gemm_tile.h"

#define NAME(x) plain_##x
#define TARGET
#include "gemm_rows.h"

#ifdef ON_X86

/* ---- AVX2 with FMA. */

#define AVX2 __attribute__((target("avx2,fma")))
#define NEW_AVX2 AVX2 static inline __attribute__((always_inline))

NEW_AVX2 __m256i mask8(long n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

NEW_AVX2 __m256 widened8(const char *at)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}

NEW_AVX2 __m256 some_widened8(const char *at, long n)
{
    char some[16] = {0};
    memcpy(some, at, 2 * (n < 8 ? n : 8));
    return widened8(some);
}

NEW_AVX2 four_floats sums_of_4x8(__m256 a, __m256 b, __m256 c, __m256 d)
{
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return (four_floats)_mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

#define NAME(x) avx2_f32_##x
#define TARGET AVX2
#define VECTOR __m256
#define W_VECTOR __m256
#define X_VECTOR __m256
#define W_BYTES 4
#define X_BYTES 4
#define STEP 8
#define LOAD_W(p) _mm256_loadu_ps((const float *)(p))
#define LOAD_X(p) _mm256_loadu_ps((const float *)(p))
#define TAIL_W(p, n) _mm256_maskload_ps((const float *)(p), mask8(n))
#define ACCUMULATE(sum, w, x) _mm256_fmadd_ps(w, x, sum)
#define ZERO _mm256_setzero_ps()
#define SUM_OF_4 sums_of_4x8
#define MOST_TOKENS 3
#include "gemm_tile.h"

#define NAME(x) avx2_bf16_##x
#define TARGET AVX2
#define VECTOR __m256
#define W_VECTOR __m256
#define X_VECTOR __m256
#define W_BYTES 2
#define X_BYTES 4
#define STEP 8
#define LOAD_W(p) widened8(p)
#define LOAD_X(p) _mm256_loadu_ps((const float *)(p))
#define TAIL_W(p, n) some_widened8(p, n)
#define ACCUMULATE(sum, w, x) _mm256_fmadd_ps(w, x, sum)
#define ZERO _mm256_setzero_ps()
#define SUM_OF_4 sums_of_4x8
#define MOST_TOKENS 3
#include "gemm_tile.h"

#define NAME(x) avx2_##x
#define TARGET AVX2
#include "gemm_rows.h"

/* ---- AVX-512. */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define NEW_AVX512 AVX512 static inline __attribute__((always_inline))

NEW_AVX512 four_floats sums_of_4x16(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 four =
        _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee)); /* in each quarter */
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return (four_floats)_mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

#define NAME(x) avx512_f32_##x
#define TARGET AVX512
#define VECTOR __m512
#define W_VECTOR __m512
#define X_VECTOR __m512
#define W_BYTES 4
#define X_BYTES 4
#define STEP 16
#define LOAD_W(p) _mm512_loadu_ps(p)
#define LOAD_X(p) _mm512_loadu_ps(p)
#define TAIL_W(p, n) _mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p)
#define ACCUMULATE(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#define ZERO _mm512_setzero_ps()
#define SUM_OF_4 sums_of_4x16
#define MOST_TOKENS 6
#include "gemm_tile.h"

NEW_AVX512 __m512 widened16(__m256i bits)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#define NAME(x) avx512_bf16_##x
#define TARGET AVX512
#define VECTOR __m512
#define W_VECTOR __m512
#define X_VECTOR __m512
#define W_BYTES 2
#define X_BYTES 4
#define STEP 16
#define LOAD_W(p) widened16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD_X(p) _mm512_loadu_ps(p)
#define TAIL_W(p, n) widened16(_mm256_maskz_loadu_epi16((__mmask16)((1u << (n)) - 1), p))
#define ACCUMULATE(sum, w, x) _mm512_fmadd_ps(w, x, sum)
#define ZERO _mm512_setzero_ps()
#define SUM_OF_4 sums_of_4x16
#define MOST_TOKENS 6
#include "gemm_tile.h"

#define NAME(x) avx512_##x
#define TARGET AVX512
#include "gemm_rows.h"

/* ---- AVX-512 with products of bfloat16, which it sums in float32: what oneDNN uses too. */

#define DOT __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define NAME(x) dot_bf16_##x
#define TARGET DOT
#define VECTOR __m512
#define W_VECTOR __m512i
#define X_VECTOR __m512i
#define W_BYTES 2
#define X_BYTES 2
#define STEP 32
#define LOAD_W(p) _mm512_loadu_si512(p)
#define LOAD_X(p) _mm512_loadu_si512(p)
#define TAIL_W(p, n) _mm512_maskz_loadu_epi16((__mmask32)((1ull << (n)) - 1), p)
#define ACCUMULATE(sum, w, x) _mm512_dpbf16_ps(sum, (__m512bh)(w), (__m512bh)(x))
#define ZERO _mm512_setzero_ps()
#define SUM_OF_4 sums_of_4x16
#define MOST_TOKENS 6
#include "gemm_tile.h"

#endif

/* ---- Choosing. */

typedef struct {
    const char *name;
    const Tiles *f32, *bf16;
    const RowKernels *rows;
} InstructionSet;

static const InstructionSet SETS[] = {
    {"generic", &plain_f32_tiles, &plain_bf16_tiles, &plain_rows},
#ifdef ON_X86
    {"avx2", &avx2_f32_tiles, &avx2_bf16_tiles, &avx2_rows},
    {"avx512", &avx512_f32_tiles, &avx512_bf16_tiles, &avx512_rows},
    {"avx512_bf16", &avx512_f32_tiles, &dot_bf16_tiles, &avx512_rows},
#endif
};
enum { N_SETS = sizeof SETS / sizeof *SETS };

static int best_set; /* the last that this processor has; they are in rising order */
static int used_set; /* less than that only in tests */

static void find_best_set(void)
{
#ifdef ON_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        best_set = 1;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            best_set = __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    }
#endif
    used_set = best_set;
}

/* ---- Products. */

typedef struct {
    const char *w, *bias, *residual; /* the last two may be NULL */
    char *y;
    long n_outputs;
} Matrix;

enum {
    MOST_MATRICES = 4,
    MOST_PANEL_TOKENS = 96, /* that pass by while a group of rows stays in the first cache; a multiple of 6 and 3 */
    PART_BYTES = 1 << 16,   /* of weights that a thread takes at a time */
    MOST_GROUPS = 32,
    FIRST_CACHE_BYTES = 24 << 10, /* of rows at a time beside a tile's tokens, where the rows are one block long */
    SECOND_CACHE_BYTES = 1 << 18, /* where they are longer */
    BLOCK_BYTES = 3072,     /* of a row at a time: four rows and six tokens then stay in the first cache */
};

typedef struct {
    const InstructionSet *set;
    bool is_bf16;
    long n_tokens, k;
    const char *x; /* (n_tokens, k), in the weights' type */
    Matrix matrices[MOST_MATRICES];
    int n_matrices;
    const Tiles *tiles;
    const char *packed;     /* x as the tiles want it, one tile after the other */
    size_t packed_stride;   /* bytes of one token in it */
    long block;             /* elements of k at a time */
    long part_rows;         /* outputs of one part of the work, a multiple of 2 * ROWS */
    long parts_before[MOST_MATRICES + 1];
    atomic_bool is_short; /* of memory: the answer is not whole */
} Product;

static inline four_floats rounded4(four_floats value)
{
    const four_words bits = (four_words)value;
    const four_words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    const four_words is_nan = (four_words)((bits & 0x7fffffff) > 0x7f800000);
    return (four_floats)((rounded & ~is_nan) | ((bits | 0x400000) & is_nan));
}

/* The bias joins the sums before they are rounded, the residual afterwards, as in torch. */
static inline __attribute__((always_inline)) void put4(const Matrix *matrix, const bool is_bf16, long token, long row,
                                                       four_floats sums)
{
    const long at = token * matrix->n_outputs + row;
    if (is_bf16) {
        if (matrix->bias) sums += widened4(matrix->bias + 2 * row);
        if (matrix->residual) sums = rounded4(sums) + widened4(matrix->residual + 2 * at);
        ((four_halves_at *)(matrix->y + 2 * at))->v =
            __builtin_convertvector((four_words)rounded4(sums) >> 16, four_halves);
    } else {
        if (matrix->bias) sums += ((const four_floats_at *)(matrix->bias + 4 * row))->v;
        if (matrix->residual) sums += ((const four_floats_at *)(matrix->residual + 4 * at))->v;
        ((four_floats_at *)(matrix->y + 4 * at))->v = sums;
    }
}

static void put1(const Matrix *matrix, bool is_bf16, long token, long row, float sum)
{
    const long at = token * matrix->n_outputs + row;
    const long bytes = is_bf16 ? 2 : 4;
    char bias[16] = {0}, residual[16] = {0}, y[16];
    if (matrix->bias) memcpy(bias, matrix->bias + bytes * row, bytes);
    if (matrix->residual) memcpy(residual, matrix->residual + bytes * at, bytes);
    const Matrix one = {.bias = matrix->bias ? bias : NULL, .residual = matrix->residual ? residual : NULL, .y = y};
    put4(&one, is_bf16, 0, 0, (four_floats){sum});
    memcpy(matrix->y + bytes * at, y, bytes);
}

/* How many tokens the tile takes that begins at `token` of n, when n_tiles are left: as even as can be. */
static inline long tile_tokens(long n, long token, long n_tiles)
{
    return (n - token + n_tiles - 1) / n_tiles;
}

static inline long tile_count(const Tiles *tiles, long n)
{
    return (n + tiles->most_tokens - 1) / tiles->most_tokens;
}

/* A buffer of the calling thread's own that stays: fresh ones cost page faults. Each kind has one user at once. */
static void *kept_buffer(int kind, size_t bytes)
{
    static _Thread_local struct {
        void *at;
        size_t bytes;
    } kept[4];
    if (kept[kind].bytes < bytes) {
        free(kept[kind].at);
        kept[kind].bytes = bytes + bytes / 4;
        kept[kind].at = aligned_alloc(64, (kept[kind].bytes + 63) / 64 * 64);
        if (!kept[kind].at) kept[kind].bytes = 0;
    }
    return kept[kind].at;
}

/* A single token's outputs [row, stop). */
static void multiply_one(const Product *product, const Matrix *matrix, long row, long stop, long token, const char *x)
{
    const size_t w_stride = product->k * (product->is_bf16 ? 2 : 4);
    for (; row + ROWS <= stop; row += ROWS)
        put4(matrix, product->is_bf16, token, row,
             product->tiles->four_singles(matrix->w + row * w_stride, w_stride, x, product->k, product->block));
    for (; row < stop; row++)
        put1(matrix, product->is_bf16, token, row,
             product->tiles->single(matrix->w + row * w_stride, x, product->k, product->block));
}

/* Groups of ROWS outputs from `row` on, for one tile of tokens: a block of x stays in the first cache for all of them.
   Meanwhile lines from `ahead` on are fetched. */
static void multiply_groups(const Product *product, const Matrix *matrix, long row, long n_groups, long token,
                            long size, const char *x, const char *ahead, long lines_ahead)
{
    const Tiles *tiles = product->tiles;
    const tile_of tile = tiles->tiles[size - 1];
    const size_t w_bytes = product->is_bf16 ? 2 : 4, w_stride = product->k * w_bytes;
    four_floats sums[MOST_GROUPS][MOST_TILE_TOKENS];
    memset(sums, 0, sizeof *sums * n_groups);
    for (long at = 0; at < product->k; at += product->block) {
        const long k = at + product->block < product->k ? product->block : product->k - at;
        const long fetched = (k + 4 * tiles->step - 1) / (4 * tiles->step) * lines_ahead * 64;
        const char *w = matrix->w + row * w_stride + at * w_bytes;
        const char *x_block = x + at * size * tiles->x_bytes;
        for (long group = 0; group < n_groups; group++, w += ROWS * w_stride, ahead += fetched)
            tile(w, w_stride, x_block, k, sums[group], ahead, lines_ahead);
    }
    for (long group = 0; group < n_groups; group++)
        for (long t = 0; t < size; t++) put4(matrix, product->is_bf16, token + t, row + group * ROWS, sums[group][t]);
}

/* Outputs from `row` on in whole groups of ROWS, of n tokens from `first` on; where they end. Rows are taken so many at
   a time that they stay in a cache for all tiles, which share the fetching of the next ones. */
static long multiply_several(const Product *product, const Matrix *matrix, long row, long stop, long first, long n,
                             const char *x)
{
    const Tiles *tiles = product->tiles;
    const long n_tiles = tile_count(tiles, n);
    const long group_bytes = product->k * (product->is_bf16 ? 2 : 4) * ROWS + 1;
    const long lines_ahead = (4 * ROWS * tiles->step_bytes / 64 + n_tiles - 1) / n_tiles;
    const long held_bytes = product->k <= product->block ? FIRST_CACHE_BYTES : SECOND_CACHE_BYTES;
    long most_groups = n_tiles == 1 ? 1 : held_bytes / group_bytes;
    most_groups = most_groups < 1 ? 1 : most_groups > MOST_GROUPS ? MOST_GROUPS : most_groups;
    while (row + ROWS <= stop) {
        const long n_groups = (stop - row) / ROWS < most_groups ? (stop - row) / ROWS : most_groups;
        const char *next = matrix->w + (row + n_groups * ROWS) / ROWS * (group_bytes - 1);
        for (long tile = 0, token = 0; tile < n_tiles; tile++) {
            const long size = tile_tokens(n, token, n_tiles - tile);
            multiply_groups(product, matrix, row, n_groups, first + token, size, x + token * product->packed_stride,
                            next + n_groups * group_bytes / n_tiles * tile, lines_ahead);
            token += size;
        }
        row += n_groups * ROWS;
    }
    return row;
}

/* One output of several tokens, each taken out of its tile again. */
static void multiply_single(Product *product, const Matrix *matrix, long row, long first, long n, const char *x)
{
    const Tiles *tiles = product->tiles;
    const size_t step_bytes = tiles->step * tiles->x_bytes;
    const long n_steps = (product->k + tiles->step - 1) / tiles->step, n_tiles = tile_count(tiles, n);
    char *alone = kept_buffer(1, product->packed_stride);
    if (!alone) {
        product->is_short = true;
        return;
    }
    for (long tile = 0, token = 0; tile < n_tiles; tile++) {
        const long size = tile_tokens(n, token, n_tiles - tile);
        for (long t = 0; t < size; t++) {
            for (long step = 0; step < n_steps; step++)
                memcpy(alone + step * step_bytes, x + token * product->packed_stride + (step * size + t) * step_bytes,
                       step_bytes);
            put1(matrix, product->is_bf16, first + token + t, row,
                 tiles->single(matrix->w + row * product->k * (product->is_bf16 ? 2 : 4), alone, product->k,
                               product->block));
        }
        token += size;
    }
}

static void multiply_part(void *context, int index)
{
    Product *product = context;
    int m = 0;
    while (index >= product->parts_before[m + 1]) m++;
    const Matrix *matrix = &product->matrices[m];
    const long start = (index - product->parts_before[m]) * product->part_rows;
    const long stop = start + product->part_rows < matrix->n_outputs ? start + product->part_rows : matrix->n_outputs;
    for (long first = 0; first < product->n_tokens; first += MOST_PANEL_TOKENS) {
        const long n = first + MOST_PANEL_TOKENS < product->n_tokens ? MOST_PANEL_TOKENS : product->n_tokens - first;
        const char *x = product->packed + first * product->packed_stride;
        if (n == 1) {
            multiply_one(product, matrix, start, stop, first, x);
            continue;
        }
        for (long row = multiply_several(product, matrix, start, stop, first, n, x); row < stop; row++)
            multiply_single(product, matrix, row, first, n, x);
    }
}

/* One token's x into its tile of `size`, the end of the last step filled with zeros. */
static void pack_token(const Product *product, const char *x, char *to, long size)
{
    const Tiles *tiles = product->tiles;
    const bool is_widened = product->is_bf16 && tiles->x_bytes == 4;
    const size_t w_bytes = product->is_bf16 ? 2 : 4, step_bytes = tiles->step * tiles->x_bytes;
    for (long at = 0; at < product->k; at += tiles->step, to += size * step_bytes) {
        const long n = at + tiles->step < product->k ? tiles->step : product->k - at;
        if (is_widened)
            product->set->rows->widen((const uint16_t *)(x + at * w_bytes), (float *)to, n);
        else if (n == tiles->step)
            memcpy(to, x + at * w_bytes, step_bytes);
        else
            memcpy(to, x + at * w_bytes, n * w_bytes);
        if (n < tiles->step) memset(to + n * tiles->x_bytes, 0, step_bytes - n * tiles->x_bytes);
    }
}

/* False when there is no memory. */
static bool pack(Product *product)
{
    const Tiles *tiles = product->tiles;
    const long steps = (product->k + tiles->step - 1) / tiles->step;
    const size_t row_bytes = product->k * (product->is_bf16 ? 2 : 4);
    product->packed_stride = (size_t)steps * tiles->step * tiles->x_bytes;
    char *packed = kept_buffer(0, product->n_tokens * product->packed_stride);
    if (!packed) return false;
    product->packed = packed;
    for (long first = 0; first < product->n_tokens; first += MOST_PANEL_TOKENS) {
        const long n = first + MOST_PANEL_TOKENS < product->n_tokens ? MOST_PANEL_TOKENS : product->n_tokens - first;
        const long n_tiles = tile_count(tiles, n);
        for (long tile = 0, token = 0; tile < n_tiles; tile++) {
            const long size = tile_tokens(n, token, n_tiles - tile);
            char *to = packed + (first + token) * product->packed_stride;
            for (long t = 0; t < size; t++)
                pack_token(product, product->x + (first + token + t) * row_bytes,
                           to + t * tiles->step * tiles->x_bytes, size);
            token += size;
        }
    }
    return true;
}

/* False when there is no memory. */
static bool multiply(Product *product, int n_threads)
{
    product->tiles = product->is_bf16 ? product->set->bf16 : product->set->f32;
    if (!pack(product)) return false;
    const long row_bytes = product->k * (product->is_bf16 ? 2 : 4);
    const long n_blocks = (row_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES;
    const long block = (product->k + n_blocks - 1) / n_blocks;
    product->block = (block + 31) / 32 * 32; /* a multiple of every step */
    /* Parts so small that no thread waits long for another's last one. */
    const long rows = PART_BYTES / (row_bytes + 1) / (2 * ROWS) * (2 * ROWS);
    product->part_rows = n_threads == 1 ? 1l << 40 : rows < 2 * ROWS ? 2 * ROWS : rows;
    for (int m = 0; m < product->n_matrices; m++) {
        const long parts = (product->matrices[m].n_outputs + product->part_rows - 1) / product->part_rows;
        product->parts_before[m + 1] = product->parts_before[m] + parts;
    }
    run_loop(multiply_part, product, (int)product->parts_before[product->n_matrices], n_threads);
    return !product->is_short;
}

/* ---- What stands between products. */

typedef struct {
    const RowKernels *rows;
    char *gate;
    const char *up;
    long n, part;
    enum gate kind;
    bool is_bf16;
} Gating;

static void gate_part(void *context, int index)
{
    const Gating *gating = context;
    const long at = index * gating->part;
    const long n = at + gating->part < gating->n ? gating->part : gating->n - at;
    const long bytes = gating->is_bf16 ? 2 : 4;
    gating->rows->gate(gating->gate + at * bytes, gating->up + at * bytes, n, gating->kind, gating->is_bf16);
}

/* What a call has in common for all its products. */
typedef struct {
    bool is_bf16;
    int n_threads;
    long n_tokens;
} Step;

typedef struct {
    const char *w, *bias;
} Weights;

typedef struct {
    const char *weight;
    enum norm_end end;
    float eps;
} Norm;

static bool multiply_by(Step step, const char *x, long k, const Matrix *matrices, int n_matrices)
{
    Product product = {.set = &SETS[used_set],
                       .is_bf16 = step.is_bf16,
                       .n_tokens = step.n_tokens,
                       .k = k,
                       .x = x,
                       .n_matrices = n_matrices};
    memcpy(product.matrices, matrices, sizeof *matrices * n_matrices);
    return multiply(&product, step.n_threads);
}

static void normalise(Step step, Norm norm, const char *x, char *y, long n)
{
    const long row_bytes = n * (step.is_bf16 ? 2 : 4);
    for (long at = 0; at < step.n_tokens * row_bytes; at += row_bytes)
        SETS[used_set].rows->rms_norm(x + at, norm.weight, y + at, n, norm.eps, norm.end, step.is_bf16);
}

static bool gate_between(Step step, const char *x, long k, long inner, enum gate kind, const Weights *gate_up_down,
                         const char *residual, char *y)
{
    const size_t bytes = (size_t)step.n_tokens * inner * (step.is_bf16 ? 2 : 4);
    char *gate = kept_buffer(2, 2 * bytes);
    if (!gate) return false;
    const Matrix in[] = {{gate_up_down[0].w, gate_up_down[0].bias, NULL, gate, inner},
                         {gate_up_down[1].w, gate_up_down[1].bias, NULL, gate + bytes, inner}};
    const Matrix out = {gate_up_down[2].w, gate_up_down[2].bias, residual, y, k};
    if (!multiply_by(step, x, k, in, 2)) return false;
    Gating gating = {SETS[used_set].rows, gate, gate + bytes, step.n_tokens * inner, 1 << 13, kind, step.is_bf16};
    run_loop(gate_part, &gating, (int)((gating.n + gating.part - 1) / gating.part), step.n_threads);
    return multiply_by(step, gate, inner, &out, 1);
}

static void rotate_heads(Step step, char *heads, long n_heads, long dim, const char *cos, const char *sin)
{
    const long bytes = step.is_bf16 ? 2 : 4;
    for (long token = 0; token < step.n_tokens; token++)
        for (long head = 0; head < n_heads; head++)
            SETS[used_set].rows->rotate(heads + (token * n_heads + head) * dim * bytes, cos + token * dim * bytes,
                                        sin + token * dim * bytes, dim, step.is_bf16);
}

/* ---- For Python. */

/* Reads integers, and addresses, which are integers too. */
static bool read_longs(PyObject *const *args, Py_ssize_t n, Py_ssize_t wanted, long long *out)
{
    if (n != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", n, wanted);
        return false;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

static PyObject *done(bool is_well)
{
    return is_well ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

/* So many tokens at a time pass a whole call, which bounds what the kept buffers take. */
enum { PIECE_TOKENS = 4 * MOST_PANEL_TOKENS };

static Step piece_of(Step all, long first)
{
    Step piece = all;
    piece.n_tokens = first + PIECE_TOKENS < all.n_tokens ? PIECE_TOKENS : all.n_tokens - first;
    return piece;
}

/* So many elements past an address; nowhere stays nowhere. */
static char *past(Step step, char *at, long n_elements)
{
    return at ? at + n_elements * (step.is_bf16 ? 2 : 4) : NULL;
}

#define AT(i) ((char *)a[i])
#define STEP_OF(a) ((Step){.is_bf16 = a[0] != 0, .n_threads = (int)a[1], .n_tokens = (long)a[2]})

PyDoc_STRVAR(linear_doc,
             "linear(is_bf16, n_threads, n_tokens, k, x, w, bias, residual, y, n_outputs)\n\n"
             "y = x @ w.T + bias + residual; 0 where there is no bias or residual. All dense: x (n_tokens, k),\n"
             "w (n_outputs, k), y and residual (n_tokens, n_outputs).");

static PyObject *linear(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_args)
{
    long long a[10];
    if (!read_longs(args, n_args, 10, a)) return NULL;
    const Step all = STEP_OF(a);
    const long k = (long)a[3], n_outputs = (long)a[9];
    bool is_well = true;
    Py_BEGIN_ALLOW_THREADS;
    for (long first = 0; is_well && first < all.n_tokens; first += PIECE_TOKENS) {
        const Step step = piece_of(all, first);
        const Matrix matrix = {AT(5), AT(6), past(step, AT(7), first * n_outputs), past(step, AT(8), first * n_outputs),
                               n_outputs};
        is_well = multiply_by(step, past(step, AT(4), first * k), k, &matrix, 1);
    }
    Py_END_ALLOW_THREADS;
    return done(is_well);
}

PyDoc_STRVAR(gated_doc,
             "gated(is_bf16, n_threads, n_tokens, k, x, inner, gate_kind, gate, gate_bias, up, up_bias, down, "
             "down_bias, y)\n\n"
             "y = (act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)) @ down.T + down_bias.");

static PyObject *gated(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_args)
{
    long long a[14];
    if (!read_longs(args, n_args, 14, a)) return NULL;
    const Weights weights[] = {{AT(7), AT(8)}, {AT(9), AT(10)}, {AT(11), AT(12)}};
    const Step all = STEP_OF(a);
    const long k = (long)a[3];
    bool is_well = true;
    Py_BEGIN_ALLOW_THREADS;
    for (long first = 0; is_well && first < all.n_tokens; first += PIECE_TOKENS) {
        const Step step = piece_of(all, first);
        is_well = gate_between(step, past(step, AT(4), first * k), k, (long)a[5], (enum gate)a[6], weights, NULL,
                               past(step, AT(13), first * k));
    }
    Py_END_ALLOW_THREADS;
    return done(is_well);
}

PyDoc_STRVAR(rms_norm_doc,
             "rms_norm(is_bf16, n_rows, n, x, y, weight, norm_end, eps)\n\n"
             "y = x / sqrt(mean(x ** 2) + eps) * weight for dense rows of n; norm_end says how it scales and rounds.");

static PyObject *rms_norm(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_args)
{
    long long a[7];
    if (!read_longs(args, n_args - 1, 7, a)) return NULL;
    const Norm norm = {AT(5), (enum norm_end)a[6], (float)PyFloat_AsDouble(args[7])};
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    normalise((Step){.is_bf16 = a[0] != 0, .n_tokens = (long)a[1]}, norm, AT(3), AT(4), (long)a[2]);
    Py_END_ALLOW_THREADS;
    return done(true);
}

PyDoc_STRVAR(before_attention_doc,
             "before_attention(is_bf16, n_threads, n_tokens, x, q, k, v, cos, sin, width, n_heads, n_kv_heads, dim, "
             "norm, norm_end, q_w, q_bias, k_w, k_bias, v_w, v_bias, eps)\n\n"
             "Normalises x (n_tokens, width), multiplies it into q, k and v (n_tokens, heads, dim), and turns q and k\n"
             "by cos and sin (n_tokens, dim).");

static PyObject *before_attention(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_args)
{
    long long a[21];
    if (!read_longs(args, n_args - 1, 21, a)) return NULL;
    const Norm norm = {AT(13), (enum norm_end)a[14], (float)PyFloat_AsDouble(args[21])};
    if (PyErr_Occurred()) return NULL;
    const Step all = STEP_OF(a);
    const long width = (long)a[9], n_heads = (long)a[10], n_kv_heads = (long)a[11], dim = (long)a[12];
    bool is_well = true;
    Py_BEGIN_ALLOW_THREADS;
    for (long first = 0; is_well && first < all.n_tokens; first += PIECE_TOKENS) {
        const Step step = piece_of(all, first);
        char *normal = kept_buffer(3, step.n_tokens * width * (step.is_bf16 ? 2 : 4));
        char *q = past(step, AT(4), first * n_heads * dim), *k = past(step, AT(5), first * n_kv_heads * dim);
        char *v = past(step, AT(6), first * n_kv_heads * dim);
        const char *cos = past(step, AT(7), first * dim), *sin = past(step, AT(8), first * dim);
        const Matrix matrices[] = {{AT(15), AT(16), NULL, q, n_heads * dim},
                                   {AT(17), AT(18), NULL, k, n_kv_heads * dim},
                                   {AT(19), AT(20), NULL, v, n_kv_heads * dim}};
        is_well = normal != NULL;
        if (is_well) {
            normalise(step, norm, past(step, AT(3), first * width), normal, width);
            is_well = multiply_by(step, normal, width, matrices, 3);
            rotate_heads(step, q, n_heads, dim, cos, sin);
            rotate_heads(step, k, n_kv_heads, dim, cos, sin);
        }
    }
    Py_END_ALLOW_THREADS;
    return done(is_well);
}

PyDoc_STRVAR(after_attention_doc,
             "after_attention(is_bf16, n_threads, n_tokens, x, attended, y, width, attended_width, inner, gate_kind, "
             "o_w, o_bias, norm, norm_end, gate, gate_bias, up, up_bias, down, down_bias, eps)\n\n"
             "h = x + attended @ o.T, y = h + the gated product of h normalised.");

static PyObject *after_attention(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t n_args)
{
    long long a[20];
    if (!read_longs(args, n_args - 1, 20, a)) return NULL;
    const Norm norm = {AT(12), (enum norm_end)a[13], (float)PyFloat_AsDouble(args[20])};
    if (PyErr_Occurred()) return NULL;
    const Step all = STEP_OF(a);
    const long width = (long)a[6], attended_width = (long)a[7];
    const Weights weights[] = {{AT(14), AT(15)}, {AT(16), AT(17)}, {AT(18), AT(19)}};
    bool is_well = true;
    Py_BEGIN_ALLOW_THREADS;
    for (long first = 0; is_well && first < all.n_tokens; first += PIECE_TOKENS) {
        const Step step = piece_of(all, first);
        const size_t bytes = step.n_tokens * width * (step.is_bf16 ? 2 : 4);
        char *normal = kept_buffer(3, 2 * bytes);
        is_well = normal != NULL;
        if (is_well) {
            char *hidden = normal + bytes;
            const Matrix out = {AT(10), AT(11), past(step, AT(3), first * width), hidden, width};
            is_well = multiply_by(step, past(step, AT(4), first * attended_width), attended_width, &out, 1);
            normalise(step, norm, hidden, normal, width);
            is_well = is_well && gate_between(step, normal, width, (long)a[8], (enum gate)a[9], weights, hidden,
                                              past(step, AT(5), first * width));
        }
    }
    Py_END_ALLOW_THREADS;
    return done(is_well);
}

PyDoc_STRVAR(instruction_sets_doc, "instruction_sets()\n\nNames of those that this CPU has kernels for, best first.");

static PyObject *instruction_sets(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(nothing))
{
    PyObject *names = PyTuple_New(best_set + 1);
    for (int i = 0; names && i <= best_set; i++)
        PyTuple_SET_ITEM(names, i, PyUnicode_FromString(SETS[best_set - i].name));
    return names;
}

PyDoc_STRVAR(use_doc, "use(name)\n\nFrom now on that instruction set; ValueError where the CPU lacks it. For tests.");

static PyObject *use(PyObject *Py_UNUSED(module), PyObject *name)
{
    for (int i = 0; i <= best_set; i++)
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, SETS[i].name) == 0) {
            used_set = i;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no instruction set %R here", name);
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, name##_doc}

static PyMethodDef METHODS[] = {
    METHOD(linear),
    METHOD(gated),
    METHOD(rms_norm),
    METHOD(before_attention),
    METHOD(after_attention),
    {"instruction_sets", instruction_sets, METH_NOARGS, instruction_sets_doc},
    {"use", use, METH_O, use_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "hexmesh.native.gemm",
    .m_doc = "Products with row-major weights; see gemm.c.",
    .m_size = -1,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit_gemm(void)
{
    find_best_set();
    if (!prepare_crew()) return PyErr_NoMemory();
    return PyModule_Create(&MODULE);
}
