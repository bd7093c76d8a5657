"""What a stage costs: bytes it needs on its device and seconds that a decode step takes there and between.

Symbols as in the planner's notes: W weight bytes of a layer, K KV bytes of a token and layer, F FLOPs of a
token and layer, b sequences in a step, ctx their mean context.

    layer   max((W + b ctx K) / bytes_per_s, b (F + ctx A) / flops_per_s) + c0; A: attention FLOPs stage   the
    sum over its layers, plus the head on the last stage, plus c1 hop     rtt / 2 + b hidden_bytes /
    bytes_per_s; the sampled tokens return in rtt / 2 bytes   weights + workspace + 1/50 of both for the
    allocator + blocks x (layers + gather) x K x block_tokens

gather is the copy of one layer's context that attention reads from: blocks of all sequences are gathered at
once.

After HexGen's cost model (memory-bound decode, compute, hops); differs: exact figures instead of 12 H^2, the
context's KV is read too, one roofline a layer, and c0 and c1, a framework's call overhead, without which
small models look free. All of it holds at any size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hexmesh.cluster import Device, DeviceKind, Link
from hexmesh.model_spec import LayerSpec, ModelSpec
from hexmesh.plan import DTYPE_BYTES, DtypeName

LAYER_OVERHEAD_S = 2.6e-4
"""c0: Python and dispatch of one layer that runs through its own modules. Measured: 3.1 ms for 12 tiny layers."""
KERNEL_LAYER_OVERHEAD_S = 4e-5
"""c0 on CPUs, where a layer is mostly one call of the C kernels. Measured: 35 us for a tiny one."""
STAGE_OVERHEAD_S = 8e-4
"""c1: 0.45 ms of the module's outer forward (measured) and a round trip to the worker process (estimated)."""
LOCAL_HOP_S = 5e-5
"""Between two workers of one host."""
LOCAL_BYTES_PER_S = 4e9
ALLOCATOR_SLACK_DIVISOR = 50
STEP_TOKENS = 256
"""Tokens that one step may carry through a stage, decode and prefill rows together."""
_GATHER_GROWTH = 1.25
"""Gather buffers grow by a quarter more than is asked for."""
_FLOAT32_BYTES = 4
_SAMPLING_BYTES = 48
"""Per logit, beside the logits themselves: two float32 and five float64 copies while every row is drawn."""


def layer_overhead_s(kind: DeviceKind) -> float:
    """c0 of a device."""
    return KERNEL_LAYER_OVERHEAD_S if kind == "cpu" else LAYER_OVERHEAD_S


def default_dtype(kinds: Iterable[DeviceKind]) -> DtypeName:
    """The compute dtype where nobody chose one: bfloat16 on GPUs alone, float32 with a CPU."""
    found = set(kinds)
    return "bfloat16" if found and "cpu" not in found else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step that a stage's workspace must hold."""

    step_tokens: int = STEP_TOKENS
    logits_rows: int = 32
    """Rows that are sampled in one step."""
    context_tokens: int = 2048
    """Context that a chunk of a prompt is masked against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Predicted seconds of one decode step of a stage; memory_s and compute_s are what either alone takes."""

    total_s: float
    memory_s: float
    compute_s: float
    overhead_s: float

    @property
    def bound(self) -> str:
        """What most of the time goes to, in words."""
        if self.overhead_s > max(self.memory_s, self.compute_s):
            return "call overhead"
        return "memory bandwidth" if self.memory_s >= self.compute_s else "compute"


@dataclass(frozen=True)
class CostModel:
    """Bytes and seconds of any cut of one model in one dtype."""

    spec: ModelSpec
    dtype: DtypeName
    block_tokens: int
    limits: StepLimits

    @cached_property
    def _params_before(self) -> tuple[int, ...]:
        return self.spec.params_before()

    @property
    def _itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def _activation_bytes(self) -> int:
        spec, limits = self.spec, self.limits
        attention = (spec.n_heads + spec.n_kv_heads) * (spec.k_head_dim + spec.v_head_dim)
        mlp = max(layer.mlp_activations for layer in spec.layers)
        numbers = 3 * spec.hidden_size + max(attention, mlp)
        mask_bytes = limits.context_tokens * (1 + self._itemsize)
        return limits.step_tokens * (numbers * self._itemsize + mask_bytes)

    def weight_bytes(self, start: int, stop: int) -> int:
        """Weights of layers [start, stop), the embedding before the first, the head after the last."""
        spec = self.spec
        params = self._params_before[stop] - self._params_before[start] + spec.shared_params
        is_first, is_last = start == 0, stop == spec.n_layers
        if is_first or (is_last and spec.ties_embeddings):
            params += spec.embedding_params
        if is_last:
            params += spec.head_params
        return params * self._itemsize

    def kv_block_bytes(self, n_layers: int, tp: int = 1) -> int:
        """One block of the KV pool for that many layers, on each of `tp` devices that share them."""
        return n_layers * self.block_tokens * self.spec.kv_values_per_rank(tp) * self._itemsize

    def workspace_bytes(self, stop: int) -> int:
        """Activations and mask of the largest step, and on the last stage its logits and their sampling."""
        is_last = stop == self.spec.n_layers
        logits = self.limits.logits_rows * self.spec.vocab_size if is_last else 0
        return self._activation_bytes + logits * (self._itemsize + _SAMPLING_BYTES)

    def fixed_bytes(self, start: int, stop: int, tp: int = 1) -> int:
        """Everything but the KV pool, on each of `tp` devices that share the layers."""
        wanted = -(-self.weight_bytes(start, stop) // tp) + self.workspace_bytes(stop)
        return wanted + wanted // ALLOCATOR_SLACK_DIVISOR

    def gather_block_bytes(self, kind: DeviceKind, tp: int = 1) -> int:
        """What one more block costs beside the pool.

        CPUs attend in float32, so half precision is copied twice.
        """
        itemsize = self._itemsize
        if kind == "cpu" and itemsize < _FLOAT32_BYTES:
            itemsize += _FLOAT32_BYTES
        return round(self.block_tokens * self.spec.kv_values_per_rank(tp) * itemsize * _GATHER_GROWTH)

    def block_bytes(self, n_layers: int, kind: DeviceKind, tp: int = 1) -> int:
        """What one more KV block of so many layers costs on each device."""
        return self.kv_block_bytes(n_layers, tp) + self.gather_block_bytes(kind, tp)

    def needed_bytes(self, start: int, stop: int, kv_blocks: int, kind: DeviceKind, tp: int = 1) -> int:
        """All that a stage needs on each of its devices."""
        return self.fixed_bytes(start, stop, tp) + kv_blocks * self.block_bytes(stop - start, kind, tp)

    def room_blocks(self, start: int, stop: int, device: Device, tp: int = 1) -> int:
        """KV blocks that fit beside the stage's weights; negative when even those do not fit."""
        free_bytes = device.budget_bytes - self.fixed_bytes(start, stop, tp)
        return free_bytes // self.block_bytes(stop - start, device.kind, tp)

    def blocks_of(self, n_tokens: int) -> int:
        """Blocks of one sequence of that many tokens."""
        return -(-n_tokens // self.block_tokens)

    def step_time(self, device: Device, start: int, stop: int, batch: int, context_tokens: int) -> StepTime:
        """One decode step of `batch` sequences through layers [start, stop) on the device."""
        spec = self.spec
        parts = [self._layer_parts(device, layer, batch, context_tokens) for layer in spec.layers[start:stop]]
        overhead_s = (stop - start) * layer_overhead_s(device.kind) + STAGE_OVERHEAD_S
        if stop == spec.n_layers:
            parts.append(self._head_parts(device, batch))
        return StepTime(
            total_s=sum(max(part) for part in parts) + overhead_s,
            memory_s=sum(memory_s for memory_s, _ in parts),
            compute_s=sum(compute_s for _, compute_s in parts),
            overhead_s=overhead_s,
        )

    def layer_s(self, device: Device, layer: LayerSpec, batch: int, context_tokens: int) -> float:
        """One layer's share of a step, its overhead included."""
        return max(self._layer_parts(device, layer, batch, context_tokens)) + layer_overhead_s(device.kind)

    def head_s(self, device: Device, batch: int) -> float:
        """What the last stage's step takes on top of its layers."""
        return max(self._head_parts(device, batch))

    def hop_s(self, link: Link | None, batch: int) -> float:
        """Sending a step's hidden states on; None is the way between two devices of one host."""
        payload_bytes = batch * self.spec.hidden_size * self._itemsize
        if link is None:
            return LOCAL_HOP_S + payload_bytes / LOCAL_BYTES_PER_S
        return link.rtt_p50_s / 2 + payload_bytes / link.bytes_per_s

    def return_s(self, link: Link | None) -> float:
        """The sampled tokens' way back to the first stage."""
        return LOCAL_HOP_S if link is None else link.rtt_p50_s / 2

    def _layer_parts(
        self, device: Device, layer: LayerSpec, batch: int, context_tokens: int
    ) -> tuple[float, float]:
        spec = self.spec
        read = (layer.params_read(batch) + batch * context_tokens * spec.kv_values_per_token) * self._itemsize
        flops = batch * (layer.flops_per_token + context_tokens * spec.attention_flops)
        return read / device.bytes_per_s, flops / device.flops_per_s

    def _head_parts(self, device: Device, batch: int) -> tuple[float, float]:
        params = self.spec.head_matmul_params
        return params * self._itemsize / device.bytes_per_s, 2 * batch * params / device.flops_per_s
