"""Attention by the C kernels of hexmesh/native: one call a layer, straight from the pool's blocks."""

from __future__ import annotations

import torch

from hexmesh import native
from hexmesh.runtime.kv_pool import LayerKv
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.runtime.shaping import Shaping

KERNELS = native.load("attention")
_DTYPES = (torch.float32, torch.bfloat16)
_NO_WINDOW_TOKENS = 2**30
"""A window as long as this hides nothing."""


def serves(layer: LayerKv) -> bool:
    """Whether there are kernels for such a pool here."""
    return (
        KERNELS is not None
        and layer.k.is_cpu
        and layer.k.dtype in _DTYPES
        and min(layer.heads[1], layer.heads[3]) >= KERNELS.LEAST_DIM
    )


def attend(
    layer: LayerKv,
    batch: RaggedBatch,
    query: torch.Tensor,  # (n_heads, n_tokens, k_dim)
    key: torch.Tensor,  # (n_kv_heads, n_tokens, k_dim)
    value: torch.Tensor,  # (n_kv_heads, n_tokens, v_dim)
    shaping: Shaping,
    window: int | None,
) -> torch.Tensor:
    """Stores K and V; (n_tokens, n_heads, v_dim)."""
    assert KERNELS is not None
    dtype = layer.k.dtype
    query, key, value = (_dense(tensor, dtype) for tensor in (query, key, value))
    out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
    sinks = None if shaping.sinks is None else shaping.sinks.to(torch.float32).contiguous()
    KERNELS.attend(
        *layer.address,
        *batch.addresses,
        *(query.data_ptr(), query.stride(0), query.stride(1)),
        *(key.data_ptr(), key.stride(0), key.stride(1)),
        *(value.data_ptr(), value.stride(0), value.stride(1)),
        out.data_ptr(),
        query.shape[0],
        shaping.scaling,
        0 if window is None or window >= _NO_WINDOW_TOKENS else window,
        shaping.softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        batch.n_threads,
    )
    return out


def _dense(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In the pool's dtype, every head of every token in one run."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
