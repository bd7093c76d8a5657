"""Paged attention for ragged batches, behind transformers' attention interface under the name "hexmesh".

The model code calls `attend` per layer with queries, keys and values of all the batch's tokens (rotary
already applied, keys not yet repeated for grouped queries). New K and V are written to the stage's pool
first; then all rows are answered from there, by our kernels or by torch. Which pool and batch is meant stands
in a context variable, because model code does not pass everything through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from hexmesh.errors import Internal
from hexmesh.runtime import native_attention, torch_attention
from hexmesh.runtime.kv_pool import KvPool, LayerKv
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.runtime.shaping import Shaping
from hexmesh.runtime.torch_attention import Scratch

NAME = "hexmesh"


@dataclass(slots=True)
class RunContext:
    """What the model code's forward is about, for the modules of ours inside it."""

    pool: KvPool
    batch: RaggedBatch
    hidden: torch.Tensor | None = None
    """What earlier stages computed, (1, n_tokens, hidden_size); None on the first stage."""
    scratch: Scratch = field(default_factory=Scratch)


_CURRENT: ContextVar[RunContext] = ContextVar("hexmesh_run")


@contextmanager
def running(context: RunContext) -> Iterator[None]:
    """Make `context` the one that this thread's forward is about."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> RunContext:
    """The context of the forward that calls."""
    return _CURRENT.get()


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, n_heads, n_tokens, k_dim)
    key: torch.Tensor,  # (1, n_kv_heads, n_tokens, k_dim)
    value: torch.Tensor,  # (1, n_kv_heads, n_tokens, v_dim)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **ignored: object,
) -> tuple[torch.Tensor, None]:
    """Attention output (1, n_tokens, n_heads, v_dim); the signature is the interface's, the mask is ours."""
    if attention_mask is not None:
        raise Internal("the model made an attention mask of its own, which paged attention would ignore")
    context = current()
    layer_index: int = module.layer_idx  # type: ignore[assignment]
    layer = context.pool.layer(layer_index)
    _check_heads(layer, key, value)
    shaping = Shaping(query.shape[3] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    tensors = query[0], key[0], value[0]
    if native_attention.serves(layer):
        out = native_attention.attend(layer, context.batch, *tensors, shaping, sliding_window)
    else:
        out = torch_attention.attend(layer, context.batch, *tensors, shaping, sliding_window, context.scratch)
    return out[None], None


def _check_heads(layer: LayerKv, key: torch.Tensor, value: torch.Tensor) -> None:
    _, n_kv_heads, _, k_dim = key.shape
    if (n_kv_heads, k_dim, value.shape[1], value.shape[3]) != layer.heads:
        raise Internal(
            f"layer gives K {tuple(key.shape[1:])} and V {tuple(value.shape[1:])}, "
            f"but its pool has blocks of {tuple(layer.k.shape[1:])} and {tuple(layer.v.shape[1:])}"
        )
