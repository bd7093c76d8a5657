"""What layout searches look up: room and seconds of every stage that devices of some kind may hold, by its cut.

`Option` is a group of like devices that may share a stage. Its room does not depend on the step and is counted once,
with the very figures of `hexmesh.score.capacity`; its seconds are those of a `Step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Role
from hexmesh.cost import ALLOCATOR_SLACK_DIVISOR
from hexmesh.model_spec import LayerSpec
from hexmesh.roofline import Group
from hexmesh.score.capacity import Capacities

Floats = npt.NDArray[np.float64]

ROUNDING = 1e-12
"""Room that two ways to count it may differ by, as a share."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a pipeline does over and over: a prompt, or `batch` sequences that decode, their prompts' share with it."""

    role: Role
    batch: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """Like devices of one host that may share a stage."""

    group: Group
    room: Floats
    """(n_layers + 1, n_layers + 1): sequences of mean context beside layers [start, stop); -1 if there are none."""


class Tables:
    """Options of one model and workload, by index."""

    def __init__(self, capacities: Capacities, groups: Sequence[Group]) -> None:
        self.capacities = capacities
        self.options = tuple(Option(group, self._room(group)) for group in groups)
        self._levels = dict[frozenset[int], Floats]()

    @property
    def n_layers(self) -> int:
        return self.capacities.costs.spec.n_layers

    @property
    def least_resident(self) -> float:
        """Sequences of mean context whose room prompts need at least, being computed and handed over."""
        workload, n_prompts = self.capacities.workload, self.capacities.residency.prompts
        return n_prompts * workload.prompt_tokens / workload.mean_context * (1 + ROUNDING)

    @cached_property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """Layers that differ, in the order of their first."""
        return tuple(dict.fromkeys(self.capacities.costs.spec.layers))

    @cached_property
    def kind_of_layer(self) -> npt.NDArray[np.int32]:
        """(n_layers,)"""
        at = {layer: index for index, layer in enumerate(self.layer_kinds)}
        return np.array([at[layer] for layer in self.capacities.costs.spec.layers], np.int32)

    def payload_bytes(self, step: Step) -> float:
        """What a step sends over a hop."""
        workload, token_bytes = self.capacities.workload, self.capacities.model.hidden_bytes
        if step.role == "prefill":
            return float(workload.prompt_tokens * token_bytes)
        share = workload.prompt_tokens / workload.output_tokens if step.role == "mixed" else 0.0
        return step.batch * (1 + share) * token_bytes

    def stage_s(self, option: Option, step: Step) -> Floats:
        """(n_layers + 1, n_layers + 1): seconds of layers [start, stop); infinite if there are none."""
        group, model, workload = option.group, self.capacities.model, self.capacities.workload
        prompts = {"prefill": 1.0, "decode": 0.0, "mixed": step.batch / workload.output_tokens}[step.role]
        layer_s = np.zeros(len(self.layer_kinds))
        head_s = fixed_s = 0.0
        if step.role != "decode":
            layer_s += [
                prompts * model.prefill_layer_s(group, kind, workload.prompt_tokens)
                for kind in self.layer_kinds
            ]
            head_s, fixed_s = prompts * model.head_s(group, 1), prompts * group.step_s
        if step.role != "prefill":
            context = workload.mean_context
            layer_s += [model.decode_layer_s(group, kind, step.batch, context) for kind in self.layer_kinds]
            head_s, fixed_s = head_s + model.head_s(group, step.batch), fixed_s + group.step_s
        before = np.concatenate([[0.0], np.cumsum(layer_s[self.kind_of_layer])])
        seconds = before[None, :] - before[:, None] + fixed_s
        seconds[:, -1] += head_s
        return np.where(self._is_cut, seconds, np.inf)

    @cached_property
    def _is_cut(self) -> npt.NDArray[np.bool_]:
        ends = np.arange(self.n_layers + 1)
        return ends[:, None] < ends[None, :]

    @cached_property
    def _weight_bytes(self) -> npt.NDArray[np.int64]:
        """(n_layers + 1, n_layers + 1), by start and stop."""
        costs, ends = self.capacities.costs, range(self.n_layers + 1)
        return np.array(
            [[costs.weight_bytes(start, stop) if start < stop else 0 for stop in ends] for start in ends]
        )

    def _room(self, group: Group) -> Floats:
        """As `Capacities` counts it, to the bit."""
        costs, ends = self.capacities.costs, np.arange(self.n_layers + 1)
        workspace = np.array([costs.workspace_bytes(stop) for stop in range(self.n_layers + 1)])
        wanted = -(-self._weight_bytes // group.tp) + workspace
        free = group.device.budget_bytes - (wanted + wanted // ALLOCATOR_SLACK_DIVISOR)
        block = costs.block_bytes(1, group.device.kind, group.tp) - costs.block_bytes(
            0, group.device.kind, group.tp
        )
        gather = costs.block_bytes(0, group.device.kind, group.tp)
        n_layers = np.maximum(ends[None, :] - ends[:, None], 1)
        context, residency = self.capacities.workload.mean_context, self.capacities.residency
        one = context * (n_layers * block + gather) / costs.block_tokens
        longest = residency.least_tokens * (n_layers * block + gather) / costs.block_tokens
        room = np.minimum(np.maximum(0.0, free.astype(float)) / one, residency.most_sequences)
        return np.where(self._is_cut, np.where(free >= longest, room, 0.0), -1.0)

    def levels(self, options: frozenset[int]) -> Floats:
        """All rooms that a stage on one of the options may have, rising."""
        if options not in self._levels:
            rooms = [option.room[option.room > 0] for option in (self.options[at] for at in options)]
            self._levels[options] = np.unique(np.concatenate([np.zeros(0), *rooms]))
        return self._levels[options]
