"""What a step makes a stage read and compute, from its rows: the roofline's terms before their maximum is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from hexmesh.model_spec import LayerSpec, ModelSpec
from hexmesh.plan import DTYPE_BYTES, DtypeName


class SeenRow(Protocol):
    """n_tokens of a sequence, from position `start` on."""

    @property
    def start(self) -> int: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def sample(self) -> object | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one step on one stage."""

    n_layers: int
    n_rows: int
    n_tokens: int
    read_bytes: float
    flops: float
    head_bytes: float
    head_flops: float


def work_of(spec: ModelSpec, dtype: DtypeName, start: int, stop: int, rows: Iterable[SeenRow]) -> Work:
    """Of layers [start, stop)."""
    seen = [(row.start, row.n_tokens) for row in rows]
    n_tokens = sum(n for _, n in seen)
    n_heads = sum(row.sample is not None for row in rows) if stop == spec.n_layers else 0
    read = flops = 0.0
    for layer, n in Counter(spec.layers[start:stop]).items():
        params, computed = _of_layer(spec, layer, n_tokens, seen)
        read, flops = read + n * params, flops + n * computed
    itemsize, head = DTYPE_BYTES[dtype], spec.head_matmul_params if n_heads else 0
    return Work(
        n_layers=stop - start,
        n_rows=len(seen),
        n_tokens=n_tokens,
        read_bytes=read * itemsize,
        flops=flops,
        head_bytes=float(head * itemsize),
        head_flops=2.0 * head * n_heads,
    )


def _of_layer(
    spec: ModelSpec, layer: LayerSpec, n_tokens: int, seen: list[tuple[int, int]]
) -> tuple[float, float]:
    """(numbers read, FLOPs)."""
    read = float(layer.params_read(n_tokens))
    flops = float(n_tokens * layer.flops_per_token)
    for start, n in seen:
        if n == 1:
            context = layer.seen_tokens(start + 1)
            read += context * spec.kv_values_per_token
            flops += context * spec.decode_attention_flops
        else:
            read += layer.seen_tokens(start) * spec.kv_values_per_token
            flops += n * layer.seen_tokens(start + n / 2) * spec.attention_flops
    return read, flops
