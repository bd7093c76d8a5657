"""Attention by torch's own operations, for devices and types that have no kernels of ours.

One-token rows are answered together from gathered blocks, chunks row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hexmesh.runtime.kv_pool import LayerKv
from hexmesh.runtime.ragged import Chunk, DecodeGroup, RaggedBatch
from hexmesh.runtime.shaping import Shaping


class Scratch:
    """Buffers that survive from layer to layer and step to step: fresh large temporaries cost page faults."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; the same memory for the same name, so one user at a time."""
        n_elements = 1
        for size in shape:
            n_elements *= size
        key = (name, dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < n_elements:
            buffer = torch.empty(n_elements + n_elements // 4, dtype=dtype, device=like.device)
            self._buffers[key] = buffer
        return buffer[:n_elements].view(shape)


def attend(
    layer: LayerKv,
    batch: RaggedBatch,
    query: torch.Tensor,  # (n_heads, n_tokens, k_dim)
    key: torch.Tensor,  # (n_kv_heads, n_tokens, k_dim)
    value: torch.Tensor,  # (n_kv_heads, n_tokens, v_dim)
    shaping: Shaping,
    window: int | None,
    scratch: Scratch,
) -> torch.Tensor:
    """Stores K and V; (n_tokens, n_heads, v_dim)."""
    _store(layer, batch, key, value)
    reads = batch.reads(layer.n_kv_heads, window)
    if len(reads.groups) == 1 and not reads.chunks:
        return _attend_group(layer, reads.groups[0], query, shaping, scratch)
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    for group in reads.groups:
        picked = query.index_select(1, group.tokens)
        out.index_copy_(0, group.tokens, _attend_group(layer, group, picked, shaping, scratch))
    for chunk in reads.chunks:
        own = slice(chunk.start, chunk.stop)
        out[own] = _attend_chunk(layer, chunk, query[:, own], key[:, own], value[:, own], shaping, scratch)
    return out


def _store(layer: LayerKv, batch: RaggedBatch, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write (n_kv_heads, n_tokens, dim) to the tokens' slots."""
    slots = batch.slots(layer.n_kv_heads)
    for pool, new in ((layer.k, key), (layer.v, value)):
        width = pool.shape[-1]
        # One sequence's overflow must not reach others: a masked-out NaN or infinity would still poison a
        # sum.
        finite = torch.nan_to_num(new, nan=0.0, posinf=0.0, neginf=0.0)
        pool.view(-1, width).index_copy_(0, slots, finite.transpose(0, 1).reshape(-1, width))


def _gather(
    pool: torch.Tensor, rows: torch.Tensor, shape: tuple[int, ...], name: str, scratch: Scratch
) -> torch.Tensor:
    """Whole head-parts of blocks, in the order of `rows`, as `shape`."""
    n_blocks, n_heads, block_tokens, width = pool.shape
    flat = pool.view(n_blocks * n_heads, block_tokens * width)
    out = scratch.take(name, (rows.numel(), block_tokens * width), pool, pool.dtype)
    torch.index_select(flat, 0, rows, out=out)
    return out.view(shape)


def _attend_group(
    layer: LayerKv, group: DecodeGroup, query: torch.Tensor, shaping: Shaping, scratch: Scratch
) -> torch.Tensor:
    """(n_rows, n_heads, v_dim) for queries (n_heads, n_rows, k_dim) of one-token rows."""
    n_heads, n_rows, k_dim = query.shape
    n_kv_heads, block_tokens = layer.k.shape[1], layer.k.shape[2]
    length = group.n_blocks * block_tokens
    shape = (n_rows, n_kv_heads, length, -1)
    key = _computable(_gather(layer.k, group.gather, shape, "k", scratch), "k", scratch)
    value = _computable(_gather(layer.v, group.gather, shape, "v", scratch), "v", scratch)
    # The heads that share a KV head are the rows of one small matrix: (n_rows, n_kv_heads, group, k_dim).
    grouped = query.transpose(0, 1).reshape(n_rows, n_kv_heads, n_heads // n_kv_heads, k_dim).to(key.dtype)
    visible = group.visible[:, None, None, :]
    if shaping.is_plain:
        answer = F.scaled_dot_product_attention(grouped, key, value, visible, scale=shaping.scaling)
    else:
        answer = _shaped_attention(grouped, key, value, visible, shaping)
    return answer.reshape(n_rows, n_heads, -1).to(query.dtype)


def _attend_chunk(
    layer: LayerKv,
    chunk: Chunk,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shaping: Shaping,
    scratch: Scratch,
) -> torch.Tensor:
    """(n_tokens, n_heads, v_dim) for one row's queries (n_heads, n_tokens, k_dim)."""
    n_heads, n_tokens, k_dim = query.shape
    n_kv_heads = layer.n_kv_heads
    if chunk.gather is not None:
        key = _gather(layer.k, chunk.gather, (n_kv_heads, -1, layer.k.shape[-1]), "k", scratch)
        value = _gather(layer.v, chunk.gather, (n_kv_heads, -1, layer.v.shape[-1]), "v", scratch)
    if shaping.is_plain:
        answer = F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=chunk.visible,
            is_causal=chunk.visible is None,
            scale=shaping.scaling,
            enable_gqa=n_kv_heads != n_heads,
        )
        return answer[0].transpose(0, 1)
    visible = chunk.visible
    if visible is None:
        visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=query.device).tril()
    grouped = query.reshape(1, n_kv_heads, -1, k_dim)
    repeated = visible.repeat(n_heads // n_kv_heads, 1)[None, None]
    answer = _shaped_attention(grouped, key[None], value[None], repeated, shaping)
    return answer.reshape(n_heads, n_tokens, -1).transpose(0, 1).to(query.dtype)


def _computable(gathered: torch.Tensor, name: str, scratch: Scratch) -> torch.Tensor:
    """In float32 on the CPU, where attention of single queries in half precision is several times slower."""
    if gathered.device.type != "cpu" or gathered.dtype == torch.float32:
        return gathered
    wide = scratch.take(name, tuple(gathered.shape), gathered, torch.float32)
    return wide.copy_(gathered)


def _shaped_attention(
    query: torch.Tensor,  # (n_rows, n_kv_heads, group * n_queries, k_dim)
    key: torch.Tensor,  # (n_rows, n_kv_heads, length, k_dim)
    value: torch.Tensor,
    visible: torch.Tensor,  # broadcastable to the scores
    shaping: Shaping,
) -> torch.Tensor:
    """Attention in plain operations, for scores with a soft cap or sinks; softmax in float32."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * shaping.scaling
    if shaping.softcap is not None:
        scores = torch.tanh(scores / shaping.softcap) * shaping.softcap
    scores = scores.float().masked_fill(~visible, float("-inf"))
    if shaping.sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        n_rows, n_kv_heads, n_queries = scores.shape[:3]
        per_head = shaping.sinks.float().reshape(1, n_kv_heads, -1, 1)
        repeats = n_queries // per_head.shape[2]
        column = per_head.repeat_interleave(repeats, dim=2).expand(n_rows, -1, -1, -1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)
