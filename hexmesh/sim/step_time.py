"""Seconds that a step takes on a stage: the score's roofline, for the rows that the step really has.

Per layer of a group of t devices, with T tokens: decoding rows at contexts c, and chunks [p, p + n) of prompts:

    bytes   params read by T tokens / t + (sum of c and of p) x KV of a rank
    FLOPs   (T F + sum of c x A_decode + sum of n (p + n/2) x A) / t
    layer   max(bytes / beta, FLOPs / phi) + 2 AR(T tokens) + launch + rows x row

For decoding rows alone that is `Roofline.decode_layer_s`, for one whole prompt `prefill_layer_s`. Where both are in
one step, the decoding rows' reading and the prompt's computing overlap, as they do where all tokens go through one
GEMM. The score adds them up: chunks are not even, and over a long run the two come to about the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexmesh.model_spec import LayerSpec, ModelSpec
from hexmesh.plan import DTYPE_BYTES, DtypeName
from hexmesh.roofline import Group, Roofline
from hexmesh.score import Seat
from hexmesh.serving.micro_batch import ScheduledRow


@dataclass(frozen=True, slots=True)
class Attended:
    """What a step's rows see of their contexts in layers of one window."""

    decode_tokens: float
    """Summed over decoding rows: read, and multiplied with."""
    prompt_tokens_read: float
    """Context before each chunk."""
    prompt_products: float
    """Summed over a chunk's tokens: what each of them sees."""


@dataclass(frozen=True, slots=True)
class StepLoad:
    """A step's rows, as far as time depends on them."""

    n_rows: int
    n_tokens: int
    n_heads: int
    """Tokens whose logits are wanted."""
    attended: dict[int | None, Attended]
    """By the layers' window."""


def load_of(rows: Iterable[ScheduledRow], windows: Iterable[int | None]) -> StepLoad:
    """Add up a step's rows, for layers of these windows."""
    n_rows = n_tokens = n_heads = n_decoding = seen = 0
    contexts: list[int] = []
    chunks: list[tuple[int, int]] = []
    for row in rows:
        n_new = row.n_tokens
        n_rows += 1
        n_tokens += n_new
        if n_new == 1:
            n_decoding += 1
            seen += row.start
            n_heads += row.n_wanted
            contexts.append(row.start + 1)
        else:
            n_heads += row.n_wanted
            chunks.append((row.start, row.start + n_new))
    attended = {}
    for window in windows:
        of_rows = seen + n_decoding if window is None else sum(min(one, window) for one in contexts)
        attended[window] = Attended(
            of_rows,
            sum(_clipped(start, window) for start, _ in chunks),
            sum(_area(stop, window) - _area(start, window) for start, stop in chunks),
        )
    return StepLoad(n_rows, n_tokens, n_heads, attended)


def decode_load(contexts: Sequence[int], n_later: int, windows: Iterable[int | None]) -> StepLoad:
    """Of a step of decoding rows alone, `n_later` tokens after their contexts were these."""
    n = len(contexts)
    attended = {
        window: Attended(
            sum(contexts) + n * n_later
            if window is None
            else sum(min(one + n_later, window) for one in contexts),
            0,
            0,
        )
        for window in windows
    }
    return StepLoad(n, n, n, attended)


class StageTimes:
    """What steps take on one stage."""

    def __init__(self, seat: Seat, spec: ModelSpec, dtype: DtypeName) -> None:
        self._model = Roofline(spec, dtype)
        self._group: Group = seat.group
        self._kinds = list(Counter(spec.layers[seat.start : seat.stop]).items())
        self._is_last = seat.stop == spec.n_layers
        device, tp = seat.group.device, seat.group.tp
        self._n_layers = seat.stop - seat.start
        self._param_s = DTYPE_BYTES[dtype] / device.bytes_per_s / tp
        self._kv_token_s = spec.kv_values_per_rank(tp) * DTYPE_BYTES[dtype] / device.bytes_per_s
        self._flop_s = 1 / device.flops_per_s / tp
        self._row_s = self._n_layers * device.row_s
        self._fixed_s = self._n_layers * seat.group.launch_s + seat.group.step_s

    def seconds(self, load: StepLoad) -> float:
        """Of one step."""
        n_tokens = load.n_tokens
        total_s = self._fixed_s + load.n_rows * self._row_s
        total_s += self._n_layers * self._group.all_reduces_s(n_tokens * self._model.hidden_bytes)
        for layer, n in self._kinds:
            total_s += n * self._layer_s(layer, n_tokens, load.attended[layer.window_tokens])
        if self._is_last and load.n_heads:
            total_s += self._model.head_s(self._group, load.n_heads)
        return total_s

    def _layer_s(self, layer: LayerSpec, n_tokens: int, attended: Attended) -> float:
        spec = self._model.spec
        read_s = layer.params_read(n_tokens) * self._param_s
        read_s += (attended.decode_tokens + attended.prompt_tokens_read) * self._kv_token_s
        flops = n_tokens * layer.flops_per_token + attended.decode_tokens * spec.decode_attention_flops
        flops += attended.prompt_products * spec.attention_flops
        return max(read_s, flops * self._flop_s)


def windows_of(spec: ModelSpec) -> tuple[int | None, ...]:
    """The different windows of a model's layers."""
    return tuple(dict.fromkeys(layer.window_tokens for layer in spec.layers))


def _clipped(n_tokens: int, window: int | None) -> int:
    return n_tokens if window is None else min(n_tokens, window)


def _area(n_tokens: int, window: int | None) -> float:
    """What the first `n_tokens` of a prompt see, added up."""
    if window is None or n_tokens <= window:
        return n_tokens * n_tokens / 2
    return window * (n_tokens - window / 2)
