/* What the kernels of all instruction sets have in common. */

#ifndef HEXMESH_GEMM_H
#define HEXMESH_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ROWS = 4, MOST_TILE_TOKENS = 6, AHEAD_BYTES = 4096 };

typedef float four_floats __attribute__((vector_size(16)));

/* Adds to `out` the sums of ROWS rows for some tokens, and fetches so many lines from `ahead` on with every four steps. */
typedef void (*tile_of)(const char *w, size_t w_stride, const char *x, long k, four_floats *out, const char *ahead,
                        long lines_ahead);

typedef struct {
    int most_tokens;
    tile_of tiles[MOST_TILE_TOKENS];
    /* For a single token: k in blocks of so many, each summed up by itself. */
    four_floats (*four_singles)(const char *w, size_t w_stride, const char *x, long k, long block);
    float (*single)(const char *w, const char *x, long k, long block);
    int step;       /* elements along k */
    int step_bytes; /* of a row of w */
    int x_bytes;    /* of one x: 4 where it is float32 whatever the weights are */
} Tiles;

/* How a norm ends: in which order it scales and rounds, for each kind of module in use. */
enum norm_end { ROUND_THEN_SCALE, SCALE_THEN_ROUND, SCALE_BY_ONE_PLUS };

enum gate { GATE_SILU, GATE_GELU_TANH };

/* Operations on rows of n elements, in bfloat16 or float32. */
typedef struct {
    void (*widen)(const uint16_t *from, float *to, long n);
    void (*rms_norm)(const char *x, const char *weight, char *y, long n, float eps, enum norm_end end, bool is_bf16);
    void (*gate)(char *gate, const char *up, long n, enum gate kind, bool is_bf16); /* gate = act(gate) * up */
    void (*rotate)(char *head, const char *cos, const char *sin, long dim, bool is_bf16);
} RowKernels;

#endif
