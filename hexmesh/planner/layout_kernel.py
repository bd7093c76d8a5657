"""The compiled kernel (`hexmesh/native/layout.c`) behind its twin's interface, or the twin where it was not built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hexmesh.cluster import Role
from hexmesh.native import load
from hexmesh.plan import DTYPE_BYTES
from hexmesh.planner.layout_dp import Fit, Kernel, Placed, TwinKernel, Weighted
from hexmesh.planner.layout_graph import Graph
from hexmesh.planner.layout_tables import Floats, Option, Step, Tables
from hexmesh.score.capacity import BATCH_CAP, BISECTIONS, MAX_MICRO_BATCHES
from hexmesh.score.pipeline import Hop, Pipeline

_ROLES: dict[Role, int] = {"prefill": 0, "decode": 1, "mixed": 2}


class Kernels:
    """Makes kernels for graphs. `options` names the tables' options by kind of device and TP degree."""

    def __init__(self, tables: Tables, options: Sequence[dict[int, int]], *, compiled: bool = True) -> None:
        self._tables, self._options = tables, options
        self._native: Any = load("layout") if compiled else None
        self._packed = None if self._native is None else self._native.tables(*_packed_tables(tables))

    def of(self, graph: Graph) -> Kernel:
        """The kernel for one team."""
        if self._native is None:
            return TwinKernel(self._tables, graph, self._options)
        return _NativeKernel(
            self._native, self._native.graph(self._packed, *_packed_graph(graph, self._options))
        )

    def highest(self, pipeline: Pipeline, option_of: Sequence[int], role: Role) -> tuple[float, int, float]:
        """(batch, micro-batches, period) of the highest rate of a layout that decodes, as `Capacities` has it.

        `option_of` names the tables' option of each seat. The batch is 0 if there is no rate.
        """
        if self._native is None:
            capacities = self._tables.capacities
            rates = capacities.decode(pipeline) if role == "decode" else capacities.mixed(pipeline)
            return rates.batch, rates.micro_batches, rates.tpot_s / rates.micro_batches
        seats = [
            (option, seat.start, seat.stop) for option, seat in zip(option_of, pipeline.seats, strict=True)
        ]
        hops = [*(figure for hop in pipeline.hops for figure in _packed_hop(hop)), pipeline.back.delay_s]
        limit_s = self._tables.capacities.workload.slo.tpot_s
        batch, n, period_s = self._native.rate(
            self._packed,
            _ROLES[role],
            np.array(seats, np.int64).tobytes(),
            np.array(hops, float).tobytes(),
            math.inf if limit_s is None else limit_s,
            MAX_MICRO_BATCHES,
            BATCH_CAP,
            BISECTIONS,
        )
        return batch, n, period_s


class _NativeKernel:
    def __init__(self, native: Any, graph: object) -> None:
        self._native, self._graph = native, graph

    def fit(self, step: Step, resident: float, slowest_s: float, around_s: float) -> Fit | None:
        return _fit_of(
            self._native.fit(self._graph, _ROLES[step.role], step.batch, resident, 0.0, slowest_s, around_s)
        )

    def tightest(
        self, step: Step, resident: float, n_groups: float, period_s: float, around_s: float
    ) -> Fit | None:
        role = _ROLES[step.role]
        return _fit_of(
            self._native.tightest(self._graph, role, step.batch, resident, n_groups, period_s, around_s)
        )

    def soonest(self, weighted: Weighted, resident: float) -> Fit | None:
        step = weighted[-1][0]
        weights = {one.role: weight for one, weight in weighted}
        prompt_weight = weights["prefill"] if len(weighted) > 1 else 0.0
        role = _ROLES[step.role]
        return _fit_of(
            self._native.soonest(self._graph, role, step.batch, resident, weighted[-1][1], prompt_weight, 0.0)
        )


def _fit_of(found: tuple[Any, ...] | None) -> Fit | None:
    if found is None:
        return None
    stages = tuple(Placed(*found[at : at + 4]) for at in range(3, len(found), 4))
    return Fit(stages=stages, slowest_s=found[0], around_s=found[1], room=found[2])


def _packed_tables(tables: Tables) -> tuple[bytes, bytes]:
    """What `layout.tables` takes."""
    kinds, workload = tables.layer_kinds, tables.capacities.workload
    counts = np.concatenate(
        [[tables.n_layers, len(kinds), len(tables.options)], tables.kind_of_layer]
    ).astype(np.int64)
    limit_s = workload.slo.ttft_s
    figures: list[float] = [
        tables.capacities.model.hidden_bytes,
        workload.prompt_tokens,
        workload.output_tokens,
        math.inf if limit_s is None else limit_s,
    ]
    for kind in kinds:
        unused = 1.0 - kind.n_active_experts / kind.n_experts if kind.n_experts else 0.0
        figures += [kind.params, kind.n_experts * kind.expert_params, unused]
    for option in tables.options:
        figures += _packed_option(tables, option)
    rooms: list[Floats] = [option.room.ravel() for option in tables.options]
    return counts.tobytes(), np.concatenate([np.array(figures, float), *rooms]).tobytes()


def _packed_option(tables: Tables, option: Option) -> list[float]:
    """The terms of `hexmesh.roofline`'s layer times that do not depend on the batch."""
    costs, model, group = tables.capacities.costs, tables.capacities.model, option.group
    spec, device, tp, workload = costs.spec, group.device, group.tp, tables.capacities.workload
    itemsize = DTYPE_BYTES[costs.dtype]
    token_s = group.all_reduces_s(model.hidden_bytes) - group.all_reduces_s(0.0)
    head = spec.head_matmul_params
    figures = [
        tp,
        itemsize / device.bytes_per_s / tp,
        group.launch_s + group.all_reduces_s(0.0),
        token_s + device.row_s,
        group.step_s,
        head * itemsize / device.bytes_per_s / tp,
        2 * head / device.flops_per_s / tp,
        model.head_s(group, 1),
    ]
    for kind in tables.layer_kinds:
        seen = kind.seen_tokens(workload.mean_context)
        figures += [
            seen * spec.kv_values_per_rank(tp) * itemsize / device.bytes_per_s,
            (kind.flops_per_token + seen * spec.decode_attention_flops) / tp / device.flops_per_s,
            model.prefill_layer_s(group, kind, workload.prompt_tokens),
        ]
    return figures


def _packed_graph(graph: Graph, options: Sequence[dict[int, int]]) -> tuple[bytes, bytes]:
    """What `layout.graph` takes."""
    counts, figures = [len(graph.visits), graph.is_complete], _packed_hop(graph.inside)
    for visit in graph.visits:
        found = graph.classes[visit.cls]
        usable = [at for tp, at in options[found.kind].items() if tp <= found.n_devices]
        counts += [visit.is_first, visit.back is not None, found.n_devices, len(usable), len(visit.entries)]
        counts += [*usable, *(entry.visit for entry in visit.entries)]
        figures.append(visit.back.delay_s if visit.back else 0.0)
        for entry in visit.entries:
            figures += _packed_hop(entry.hop)
    return np.array(counts, np.int64).tobytes(), np.array(figures, float).tobytes()


def _packed_hop(hop: Hop) -> list[float]:
    return [hop.delay_s, 1 / hop.bytes_per_s]
