/* What an attention call is about, for all instruction sets. Every count is in elements, never bytes. */

#ifndef HEXMESH_ATTENTION_H
#define HEXMESH_ATTENTION_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    TILE_TOKENS = 64,     /* scores of so many positions are held at a time */
    PART_TOKENS = 1024,   /* a long context is split in parts of so many, for few rows of scores */
    FEW_ROWS = 16,        /* rows of scores up to which a context is split */
    MOST_ROWS = 128,      /* queries times heads that one item takes, if they are several tokens */
    DOT_ROWS = 4,         /* rows of scores up to which keys are read where they lie, not transposed */
    ALIGNMENT = 64,
};

#define LOG2_E 1.4426950408889634f

/* One sequence's tokens of this step. */
struct row {
    int32_t first_token; /* in the batch */
    int32_t n_tokens;
    int32_t position; /* of the first token */
    int32_t table_at; /* where its block table begins */
    int32_t n_blocks; /* length of that table */
};

/* A tensor (n_heads, n_tokens, dim) whose last dimension is dense. */
struct heads {
    const void *at;
    ptrdiff_t head_stride, token_stride;
};

struct call {
    void *k_pool, *v_pool; /* (n_blocks, n_kv_heads, block_tokens, dim) */
    int n_blocks, n_kv_heads, block_tokens, k_dim, v_dim;
    bool is_bf16; /* else float32: pool, queries, keys, values and output */
    const struct row *rows;
    int n_rows;
    const int32_t *tables;
    int n_table;
    struct heads query, key, value;
    void *out; /* (n_tokens, n_heads, v_dim) */
    int n_heads;
    float scaling;
    int window;    /* 0: none */
    float softcap; /* 0: none */
    const float *sinks; /* (n_heads,) or NULL */
    int n_threads;
    float *partial; /* results of parts of contexts */
};

/* Some consecutive tokens of a row, with the heads that share a KV head, over a part of their context. */
struct item {
    int row, kv_head;
    int first, n_queries; /* tokens of the row */
    int start, stop;      /* positions that are read */
    ptrdiff_t partial;    /* where in call->partial the result goes; -1: it is the whole, and goes out */
};

static inline int round_up(int n, int unit)
{
    return (n + unit - 1) / unit * unit;
}

static inline int least(int a, int b)
{
    return a < b ? a : b;
}

static inline int most(int a, int b)
{
    return a > b ? a : b;
}

static inline int heads_per_kv(const struct call *call)
{
    return call->n_heads / call->n_kv_heads;
}

/* First position that a query at `position` sees. */
static inline int first_seen(const struct call *call, int position)
{
    return call->window ? most(0, position - call->window + 1) : 0;
}

/* Which token's place in the pool a position of a row is. */
static inline size_t slot_of(const struct call *call, const struct row *row, int kv_head, int position)
{
    const size_t block = (size_t)call->tables[row->table_at + position / call->block_tokens];
    return (block * call->n_kv_heads + kv_head) * call->block_tokens + position % call->block_tokens;
}

/* Places in the pool of up to TILE_TOKENS consecutive positions. */
struct tile {
    int n;
    size_t slots[TILE_TOKENS];
};

static inline void tile_of(const struct call *call, const struct item *item, int start, struct tile *tile)
{
    const struct row *row = call->rows + item->row;
    tile->n = least(TILE_TOKENS, item->stop - start);
    size_t slot = 0;
    for (int t = 0, left = 0; t < tile->n; t++, slot++, left--) {
        if (left == 0) {
            slot = slot_of(call, row, item->kv_head, start + t);
            left = call->block_tokens - (start + t) % call->block_tokens;
        }
        tile->slots[t] = slot;
    }
}

/* Into the second-level cache. */
static inline void fetch(const char *at, int n_bytes)
{
    for (int i = 0; i < n_bytes; i += 64)
        __builtin_prefetch(at + i, 0, 2);
}

static inline float wide(uint16_t bf16)
{
    const uint32_t bits = (uint32_t)bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even. */
static inline uint16_t narrow(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t not_a_number = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
}

static inline void put_out(const struct call *call, const float *from, float factor, ptrdiff_t at)
{
    if (call->is_bf16)
        for (int i = 0; i < call->v_dim; i++)
            ((uint16_t *)call->out)[at + i] = narrow(from[i] * factor);
    else
        for (int i = 0; i < call->v_dim; i++)
            ((float *)call->out)[at + i] = from[i] * factor;
}

/* Write one token's head, whose weights (as powers of two) sum to `total` over 2 ** `peak`; the sink joins the sum. */
static inline void finish(
    const struct call *call, const float *sum, float peak, float total, int token, int head)
{
    float factor = 1;
    if (call->sinks) {
        const float sink = call->sinks[head] * LOG2_E;
        const float top = sink > peak ? sink : peak;
        factor = exp2f(peak - top);
        total = total * factor + exp2f(sink - top);
    }
    put_out(call, sum, factor / total, ((ptrdiff_t)token * call->n_heads + head) * call->v_dim);
}

#endif
