"""Shapes of replicas: how many micro-batches of how many sequences, and what a stage does in each shape.

A replica of m micro-batches of b sequences needs room for m b of them in every stage. With one layer more a stage has
room for fewer sequences, so rooms are few (levels), and m b may as well be one of them or m times the cap: up to there
no stage gives up a layer, and no step takes longer for each of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexmesh.cost import ALLOCATOR_SLACK_DIVISOR
from hexmesh.model_spec import LayerSpec
from hexmesh.plan import DTYPE_BYTES
from hexmesh.roofline import Group
from hexmesh.score.capacity import BATCH_CAP, MAX_MICRO_BATCHES, Capacities

Floats = npt.NDArray[np.float64]

MOST_LEVELS = 400
"""Of more, those that are close count as one: with the layers of the lowest and the batch of the highest."""
_CLOSE = 1.02


@dataclass(frozen=True, slots=True, eq=False)
class Stages:
    """What a group may do as a stage, by shape, each stage with as many layers as it has room for; 0 for no room."""

    tp: int
    layers: Floats
    prompts: Floats
    """Requests per second whose prompts, and whose outputs, it would do alone, times its share of the layers."""
    outputs: Floats
    alone: float
    """Prompts, where nothing decodes."""


class Shapes:
    """All shapes of replicas that up to `n_devices` devices in such groups may have, by index."""

    def __init__(self, capacities: Capacities, groups: Sequence[Group], n_devices: int) -> None:
        self._capacities = capacities
        spec = capacities.costs.spec
        self._kinds = tuple(dict.fromkeys(spec.layers))
        self._weights = _least_weights(capacities)
        rooms = [self._room(group) for group in groups]
        lows, highs = _levels(np.concatenate([np.zeros(0), *rooms]))
        needs, self.n, self.batch = list[Floats](), np.zeros(0), np.zeros(0)
        for n in range(1, min(MAX_MICRO_BATCHES, n_devices) + 1):
            below = (highs >= n) & (lows < n * BATCH_CAP)
            batch = np.minimum(highs[below] / n, BATCH_CAP)
            need = np.maximum(lows[below], n)
            if len(highs) and highs[-1] >= n * BATCH_CAP:
                batch, need = np.append(batch, BATCH_CAP), np.append(need, n * BATCH_CAP)
            self.n = np.append(self.n, np.full(len(batch), n))
            self.batch = np.append(self.batch, batch)
            needs.append(need)
        self._need = np.concatenate([np.zeros(0), *needs])
        self.stages = [self._stages(group, room) for group, room in zip(groups, rooms, strict=True)]

    def __len__(self) -> int:
        return len(self.n)

    @property
    def n_layers(self) -> int:
        """Of the model."""
        return self._capacities.costs.spec.n_layers

    def _room(self, group: Group) -> Floats:
        """Sequences of mean context beside 1, 2, ... layers of the lightest kind, at most; falling."""
        residency = self._capacities.residency
        free, one = self._free_bytes(group), self._token_bytes(group)
        room = np.maximum(free, 0.0) / (one * self._capacities.workload.mean_context)
        fits = free >= one * residency.least_tokens
        return np.where(fits, np.minimum(room, residency.most_sequences), 0.0)

    def _free_bytes(self, group: Group) -> Floats:
        wanted = self._weights / group.tp + self._capacities.costs.workspace_bytes(0)
        return group.device.budget_bytes - wanted * (1 + 1 / ALLOCATOR_SLACK_DIVISOR) + 1.0

    def _token_bytes(self, group: Group) -> Floats:
        costs = self._capacities.costs
        first, second = (costs.block_bytes(n_layers, group.device.kind, group.tp) for n_layers in (1, 2))
        return (first + (second - first) * np.arange(self.n_layers)) / costs.block_tokens

    def _stages(self, group: Group, room: Floats) -> Stages:
        workload = self._capacities.workload
        layers = np.searchsorted(-room, -self._need * (1 - 1e-12), side="right").astype(float)
        layer_s = np.min([self._decode_layer_s(group, kind) for kind in self._kinds], axis=0)
        share, some = layers / self.n_layers, np.maximum(layers, 1.0)
        return Stages(
            tp=group.tp,
            layers=layers,
            prompts=share / self._prefill_s(group, some),
            outputs=share * self.batch / (workload.output_tokens * (some * layer_s + group.step_s)),
            alone=self._alone(group),
        )

    def _prefill_s(self, group: Group, layers: Floats) -> Floats:
        prompt, model = self._capacities.workload.prompt_tokens, self._capacities.model
        layer_s = min(model.prefill_layer_s(group, kind, prompt) for kind in self._kinds)
        return layers * layer_s + group.step_s

    def _alone(self, group: Group) -> float:
        residency = self._capacities.residency
        n_tokens = max(residency.prompts * self._capacities.workload.prompt_tokens, residency.least_tokens)
        layers = float(np.count_nonzero(self._free_bytes(group) >= self._token_bytes(group) * n_tokens))
        return layers / self.n_layers / float(self._prefill_s(group, np.array(max(layers, 1.0))))

    def _decode_layer_s(self, group: Group, kind: LayerSpec) -> Floats:
        """As `Roofline.decode_layer_s`, of all shapes' batches at once."""
        capacities, batch, tp = self._capacities, self.batch, group.tp
        spec, itemsize = capacities.costs.spec, DTYPE_BYTES[capacities.costs.dtype]
        seen = kind.seen_tokens(capacities.workload.mean_context)
        unused = (1.0 - kind.n_active_experts / kind.n_experts) ** batch if kind.n_experts else 0.0
        read = (kind.params - kind.n_experts * kind.expert_params * unused) / tp
        memory_s = (read + batch * seen * spec.kv_values_per_rank(tp)) * itemsize / group.device.bytes_per_s
        flops = batch * (kind.flops_per_token + seen * spec.decode_attention_flops) / tp
        start_s = group.all_reduces_s(0.0)
        token_s = group.all_reduces_s(capacities.model.hidden_bytes) - start_s
        found: Floats = np.maximum(memory_s, flops / group.device.flops_per_s) + batch * token_s
        return found + start_s + group.launch_s


def _least_weights(capacities: Capacities) -> Floats:
    """Bytes of 1, 2, ... layers in a row, where they are fewest."""
    costs = capacities.costs
    before = np.array(costs.spec.params_before(), float)
    least = [np.min(before[n:] - before[:-n]) for n in range(1, len(before))]
    return (np.array(least) + costs.spec.shared_params) * DTYPE_BYTES[costs.dtype]


def _levels(rooms: Floats) -> tuple[Floats, Floats]:
    """Rooms of one sequence or more, rising: the lowest and the highest of those that count as one."""
    levels = np.unique(rooms[rooms >= 1.0])
    if len(levels) <= MOST_LEVELS:
        return levels, levels
    grade = np.floor(np.log(levels) / np.log(_CLOSE))
    is_first = np.append(True, grade[1:] > grade[:-1])
    return levels[is_first], levels[np.append(is_first[1:], True)]
