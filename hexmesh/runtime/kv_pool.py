"""Paged KV memory of one stage: per layer one K and one V tensor of blocks, all reserved up front.

Blocks are head-major, so that one head's part of a block is contiguous: gathering copies whole runs, and a
hand-over of some heads needs no transposition.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class KvShape:
    """One layer's heads; K and V may differ in width."""

    n_kv_heads: int
    k_dim: int
    v_dim: int

    def block_elements(self, block_tokens: int) -> int:
        """Elements of K and V together in one block."""
        return self.n_kv_heads * block_tokens * (self.k_dim + self.v_dim)


@dataclass(frozen=True, slots=True)
class LayerKv:
    """One layer's blocks. Owned by its pool; the step that runs is the only writer."""

    k: torch.Tensor  # (n_blocks, n_kv_heads, block_tokens, k_dim)
    v: torch.Tensor  # (n_blocks, n_kv_heads, block_tokens, v_dim)
    heads: tuple[int, int, int, int] = field(init=False)
    """KV heads and width of K, then of V."""
    address: tuple[int, ...] = field(init=False)
    """For the kernels: where K and V lie, bytes of an element, n_blocks, n_kv_heads, block_tokens, k_dim, v_dim."""

    def __post_init__(self) -> None:
        n_blocks, n_kv_heads, block_tokens, k_dim = self.k.shape
        v_dim = self.v.shape[3]
        object.__setattr__(self, "heads", (n_kv_heads, k_dim, n_kv_heads, v_dim))
        sizes = (self.k.itemsize, n_blocks, n_kv_heads, block_tokens, k_dim, v_dim)
        object.__setattr__(self, "address", (self.k.data_ptr(), self.v.data_ptr(), *sizes))

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[1]


def pool_bytes(shapes: list[KvShape], n_blocks: int, block_tokens: int, dtype: torch.dtype) -> int:
    """What a pool of these layers takes."""
    return sum(shape.block_elements(block_tokens) for shape in shapes) * n_blocks * dtype.itemsize


class KvPool:
    """The KV blocks of layers [start, start + len(shapes)), zeroed, so that stale memory is always finite."""

    def __init__(
        self,
        *,
        start: int,
        shapes: list[KvShape],
        n_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._layers = {
            start + index: LayerKv(
                torch.zeros(
                    n_blocks, shape.n_kv_heads, block_tokens, shape.k_dim, dtype=dtype, device=device
                ),
                torch.zeros(
                    n_blocks, shape.n_kv_heads, block_tokens, shape.v_dim, dtype=dtype, device=device
                ),
            )
            for index, shape in enumerate(shapes)
        }

    @property
    def n_bytes(self) -> int:
        """Memory of all layers' K and V."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self._layers.values())

    def layer(self, layer_index: int) -> LayerKv:
        """The blocks of one of this stage's layers, by its index in the model."""
        return self._layers[layer_index]
