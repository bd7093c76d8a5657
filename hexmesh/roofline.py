"""Seconds of one layer on a group of like devices, by the phase: the score's smallest terms.

Symbols: t devices share the layer (TP), W its weight bytes, F FLOPs of a token, K KV bytes of a token, H bytes of a
hidden state, phi and beta what a device sustains in FLOP/s and bytes/s, b sequences in a step, ctx their context.

    prefill of s tokens   max(s (F + s A / 2) / (t phi), W / (t beta)) + 2 AR(t, s H) + launch + row
    decode step           max((W + b ctx K) / (t beta), b (F + ctx A) / (t phi)) + 2 AR(t, b H) + launch + b row
    all-reduce of x       AR(t, x) = 2 (t - 1) (step + x / (t rate)), a ring

A is the attention's FLOPs for one token of context; a layer with a window sees no more than that of it; of an
expert layer, the experts that the step's tokens pick are read; `row` is what a sequence takes besides, on CPUs a call
of the attention. KV of few heads or of latents is copied to ranks, not dealt out.
After HexGen's cost model, which HexGen-2 costs its strategies by; differs: a maximum of memory and compute
instead of their sum, exact counts, and measured efficiencies in phi, beta, step and rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexmesh.cluster import Device, Fabric
from hexmesh.model_spec import LayerSpec, ModelSpec
from hexmesh.plan import DTYPE_BYTES, DtypeName


def all_reduce_s(fabric: Fabric, tp: int, n_bytes: float) -> float:
    """Seconds to sum `n_bytes` over `tp` devices, in a ring."""
    return 2 * (tp - 1) * (fabric.step_s + n_bytes / (tp * fabric.bytes_per_s)) if tp > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Devices of one host that share every layer of a stage; all like `device`."""

    device: Device
    fabric: Fabric | None
    """Needed from two devices on."""
    tp: int
    launch_s: float
    """Of a layer."""
    step_s: float = 0.0
    """Of a step of the stage, beside its layers."""

    def all_reduces_s(self, n_bytes: float) -> float:
        """The two all-reduces of a layer."""
        if self.tp == 1:
            return 0.0
        assert self.fabric is not None
        return 2 * all_reduce_s(self.fabric, self.tp, n_bytes)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Layer times of one model in one dtype."""

    spec: ModelSpec
    dtype: DtypeName

    @property
    def hidden_bytes(self) -> int:
        """A token's hidden state, as it crosses between stages and in all-reduces."""
        return self.spec.hidden_size * DTYPE_BYTES[self.dtype]

    def prefill_layer_s(self, group: Group, layer: LayerSpec, n_tokens: float) -> float:
        """One layer of a prompt of `n_tokens`, alone in its step."""
        device, tp = group.device, group.tp
        seen = _mean_seen(layer, n_tokens)
        compute_s = n_tokens * (layer.flops_per_token + seen * self.spec.attention_flops) / device.flops_per_s
        memory_s = layer.params_read(n_tokens) * DTYPE_BYTES[self.dtype] / device.bytes_per_s
        return (
            max(compute_s, memory_s) / tp
            + group.all_reduces_s(n_tokens * self.hidden_bytes)
            + group.launch_s
            + device.row_s
        )

    def decode_layer_s(self, group: Group, layer: LayerSpec, batch: float, context_tokens: float) -> float:
        """One layer of a step of `batch` sequences that decode one token each."""
        spec, device, tp = self.spec, group.device, group.tp
        seen = layer.seen_tokens(context_tokens)
        read = layer.params_read(batch) / tp + batch * seen * spec.kv_values_per_rank(tp)
        flops = batch * (layer.flops_per_token + seen * spec.decode_attention_flops) / tp
        memory_s = read * DTYPE_BYTES[self.dtype] / device.bytes_per_s
        return (
            max(memory_s, flops / device.flops_per_s)
            + group.all_reduces_s(batch * self.hidden_bytes)
            + group.launch_s
            + batch * device.row_s
        )

    def head_s(self, group: Group, batch: float) -> float:
        """The logits of `batch` tokens."""
        params = self.spec.head_matmul_params
        memory_s = params * DTYPE_BYTES[self.dtype] / group.device.bytes_per_s
        return max(memory_s, 2 * batch * params / group.device.flops_per_s) / group.tp

    def kv_bytes(self, n_tokens: float) -> float:
        """KV of one sequence in all layers: what a handoff carries when nothing of it is there yet."""
        return n_tokens * self.spec.n_layers * self.spec.kv_values_per_token * DTYPE_BYTES[self.dtype]


def _mean_seen(layer: LayerSpec, n_tokens: float) -> float:
    """Context that a prompt's tokens see on average."""
    window = layer.window_tokens
    if window is None or window >= n_tokens:
        return n_tokens / 2
    return window - window * window / (2 * n_tokens)
