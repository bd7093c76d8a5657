"""One replica laid out over the mesh's devices: which of them, in what order, with which layers.

Maximises the decode rate b / C(b), where C(b) is the sum of all stage times and hops for b sequences: one
batch is in flight at a time, as the runtime drives its pipelines. Each stage is one device. What is within
TOLERANCE of the best rate counts as equal, being below what measurements tell apart, and is decided by fewer
stages, then more KV blocks, then a faster slowest stage. Up to `held_karp.MAX_PLACES` devices the best rate
is exact; beyond, see `chains`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from hexmesh.cluster import Cluster
from hexmesh.cost import STEP_TOKENS, CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName, Flow, Plan, Replica, Stage, Unused
from hexmesh.schedule.chains import good_orders
from hexmesh.schedule.cuts import Cut, best_cut, cut_cycle_s
from hexmesh.schedule.explain import explain
from hexmesh.schedule.held_karp import MAX_PLACES, SAME, Found, best_orders
from hexmesh.schedule.misfit import NoFit, misfit, too_small, why_unusable
from hexmesh.schedule.tables import Blocks, Place, Tables, build_tables, room_blocks
from hexmesh.workload import Workload

TOLERANCE = 0.01
KEEP_GAIN = 1.05
"""A new layout must be this much faster than the present one to be worth moving layers."""
LONG_CONTEXT_COST = 0.8
"""A layout with room for longer sequences is taken if it keeps this share of the best rate."""
_COMMON_CONTEXT_TOKENS = 2048
_REPLICA = "r0"


def lay_out(
    cluster: Cluster,
    spec: ModelSpec,
    dtype: DtypeName,
    workload: Workload,
    *,
    model_id: str,
    model_name: str,
    hosts: Mapping[str, int],
    max_model_tokens: int,
    block_tokens: int = 16,
    step_tokens: int = STEP_TOKENS,
    reason: str = "",
    current: Plan | None = None,
    max_devices: int = MAX_PLACES,
    tolerance: float = TOLERANCE,
) -> Plan | NoFit:
    """The plan of one replica over the devices of `hosts`, or why there is none.

    Every stage has room for the same KV blocks: at least one sequence of min(max_model_tokens, prompt +
    output), of max_model_tokens where that costs little, and at most all concurrent sequences at full length.
    `current` is kept unless the new layout is KEEP_GAIN faster or holds the longer sequences that it cannot.
    With more than `max_devices` usable devices the search is not exact.
    """
    if (
        min(max_model_tokens, block_tokens, workload.max_concurrent_sequences, workload.mean_context_tokens)
        < 1
    ):
        raise InvalidInput("token counts and concurrency of a workload must be positive")
    problem = _Problem.of(cluster, spec, dtype, workload, hosts, max_model_tokens, block_tokens, step_tokens)
    found = problem.search(max_devices, tolerance)
    if found is None:
        return misfit(cluster, problem.costs, problem.floors[-1], problem.usable, hosts)
    layout = problem.settle(found, tolerance)
    kept = problem.keep(layout, current, model_id, dtype, hosts) if current is not None else None
    plan = _plan(problem, layout if kept is None else kept, hosts, model_id, model_name, reason)
    notes = () if kept is None else (_kept_note(problem, layout, kept),)
    return msgspec.structs.replace(plan, explanation=(*explain(plan, cluster, spec, workload), *notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """A cut, the tables it was found in and what the search knew."""

    tables: Tables
    cut: Cut
    floor_tokens: int
    """The sequence length that every stage was required to have room for."""
    found: Found

    @property
    def rate(self) -> float:
        return self.tables.batches[self.cut.batch] / self.cut.cycle_s

    @property
    def room(self) -> int:
        """KV blocks that the tightest stage has room for."""
        return min(int(self.tables.room_blocks[span]) for span in self.cut.spans())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What stays the same for all searches of one planning."""

    cluster: Cluster
    costs: CostModel
    workload: Workload
    max_model_tokens: int
    usable: tuple[Place, ...]
    """Devices of leased hosts with measured speed."""
    places: tuple[Place, ...]
    """Of those, the ones with room for a layer and one sequence."""
    room: Blocks
    floors: tuple[int, ...]
    """Sequence lengths to make room for, the most wanted first; the last one is a must."""

    @staticmethod
    def of(
        cluster: Cluster,
        spec: ModelSpec,
        dtype: DtypeName,
        workload: Workload,
        hosts: Mapping[str, int],
        max_model_tokens: int,
        block_tokens: int,
        step_tokens: int,
    ) -> _Problem:
        must = min(max_model_tokens, workload.prompt_tokens + workload.output_tokens)
        common = min(max_model_tokens, max(must, _COMMON_CONTEXT_TOKENS))
        n_sequences = workload.max_concurrent_sequences
        limits = StepLimits(
            step_tokens=min(step_tokens, n_sequences * max_model_tokens),
            logits_rows=n_sequences,
            context_tokens=must,
        )
        costs = CostModel(spec, dtype, block_tokens, limits)
        usable = tuple(
            Place(node, device)
            for node in sorted(cluster.nodes, key=lambda node: node.id)
            if node.id in hosts
            for device in sorted(node.devices, key=lambda device: device.index)
            if device.flops_per_s > 0 and device.bytes_per_s > 0
        )
        room = room_blocks(costs, usable)
        fits = [bool((table >= costs.blocks_of(must)).any()) for table in room]
        return _Problem(
            cluster=cluster,
            costs=costs,
            workload=workload,
            max_model_tokens=max_model_tokens,
            usable=usable,
            places=tuple(place for place, fit in zip(usable, fits, strict=True) if fit),
            room=room[fits],
            floors=tuple(sorted({max_model_tokens, common, must}, reverse=True)),
        )

    @property
    def max_blocks(self) -> int:
        """What all concurrent sequences need at full length."""
        return self.workload.max_concurrent_sequences * self.costs.blocks_of(self.max_model_tokens)

    def tables(self, floor_tokens: int) -> Tables:
        """Tables whose stages have room for one sequence of `floor_tokens` and for the batch's mean KV."""
        costs = self.costs
        context = min(self.workload.mean_context_tokens, self.max_model_tokens)
        batches = _batch_levels(self.workload.max_concurrent_sequences)
        floor, mean = costs.blocks_of(floor_tokens), costs.blocks_of(context)
        return build_tables(
            costs,
            self.places,
            self.cluster.link_table(),
            room=self.room,
            batches=batches,
            needed_blocks=[max(floor, batch * mean) for batch in batches],
            context_tokens=context,
        )

    def search(self, max_devices: int, tolerance: float) -> tuple[int, Tables, Found] | None:
        """(floor, tables, found) of the best order for the longest sequences that are worth their cost."""
        if not self.places:
            return None
        search = best_orders if len(self.places) <= min(max_devices, MAX_PLACES) else good_orders
        must = self.floors[-1]
        tables = self.tables(must)
        found = search(tables, tolerance)
        if found is None:
            return None
        for floor in self.floors[:-1]:
            longer_tables = self.tables(floor)
            longer = search(longer_tables, tolerance)
            if longer is not None and longer.best_rate >= LONG_CONTEXT_COST * found.best_rate:
                return floor, longer_tables, longer
        return must, tables, found

    def settle(self, searched: tuple[int, Tables, Found], tolerance: float) -> _Layout:
        """The cut with the most KV blocks, of all orders that were found; then the fastest one."""
        floor, tables, found = searched
        least_rate = found.best_rate * (1.0 - max(tolerance, 2 * SAME))
        cuts = [
            best_cut(
                tables,
                option.order,
                option.batch,
                limit_s=tables.batches[option.batch] / least_rate,
                max_blocks=self.max_blocks,
            )
            for option in found.options
        ]
        layouts = [_Layout(tables=tables, cut=cut, floor_tokens=floor, found=found) for cut in cuts if cut]
        return max(layouts, key=lambda layout: (min(layout.room, self.max_blocks), layout.rate))

    def keep(
        self, layout: _Layout, current: Plan, model_id: str, dtype: DtypeName, hosts: Mapping[str, int]
    ) -> _Layout | None:
        """The present layout with today's figures, if it is still valid and about as good as `layout`."""
        stages = current.replicas[0].stages if len(current.replicas) == 1 else ()
        if (current.model_id, current.dtype) != (model_id, dtype):
            return None
        if any(current.hosts.get(stage.node) != hosts.get(stage.node) for stage in stages):
            return None
        index = {(place.node.id, place.device.index): at for at, place in enumerate(self.places)}
        order = tuple(index.get((stage.node, stage.devices[0]), -1) for stage in stages)
        bounds = (0, *(stage.stop for stage in stages))
        if not order or -1 in order or bounds[-1] != self.costs.spec.n_layers:
            return None
        tables = layout.tables
        cycles = [cut_cycle_s(tables, order, bounds, batch) for batch in range(len(tables.batches))]
        batch = max(range(len(cycles)), key=lambda at: tables.batches[at] / cycles[at])
        kept = _Layout(
            tables=tables,
            cut=Cut(order=order, bounds=bounds, batch=batch, cycle_s=cycles[batch]),
            floor_tokens=layout.floor_tokens,
            found=layout.found,
        )
        return kept if kept.rate * KEEP_GAIN > layout.rate else None


def _batch_levels(n_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the number itself."""
    return tuple(sorted({1 << power for power in range(n_sequences.bit_length())} | {n_sequences}))


def _plan(
    problem: _Problem, layout: _Layout, hosts: Mapping[str, int], model_id: str, model_name: str, reason: str
) -> Plan:
    costs, cut = problem.costs, layout.cut
    kv_blocks = min(layout.room, problem.max_blocks)
    stages = tuple(
        Stage(
            node=problem.places[place].node.id,
            devices=(problem.places[place].device.index,),
            start=start,
            stop=stop,
            kv_blocks=kv_blocks,
            needed_bytes=costs.needed_bytes(start, stop, kv_blocks, problem.places[place].device.kind),
            room_bytes=problem.places[place].device.budget_bytes,
            predicted_step_s=float(layout.tables.step_s[cut.batch, place, start, stop]),
        )
        for place, start, stop in cut.spans()
    )
    replica = Replica(
        id=_REPLICA,
        role="mixed",
        stages=stages,
        block_tokens=costs.block_tokens,
        predicted_tokens_per_s=layout.rate,
        predicted_batch=layout.tables.batches[cut.batch],
    )
    return Plan(
        model_id=model_id,
        model_name=model_name,
        n_layers=costs.spec.n_layers,
        dtype=costs.dtype,
        max_model_tokens=problem.max_model_tokens,
        hosts=dict(hosts),
        replicas=(replica,),
        flows=(Flow(src=_REPLICA, dst=_REPLICA, share=1.0),),
        unused=_unused(problem, layout, hosts),
        reason=reason,
    )


def _unused(problem: _Problem, layout: _Layout, hosts: Mapping[str, int]) -> tuple[Unused, ...]:
    index = {(place.node.id, place.device.index): at for at, place in enumerate(problem.places)}
    used = {problem.places[at] for at in layout.cut.order}

    def why(place: Place) -> str:
        at = index.get((place.node.id, place.device.index))
        if at is not None:
            return _why_not_needed(layout, at)
        if place in problem.usable:
            return too_small(problem.costs, place.device, problem.floors[-1])
        return why_unusable(place.node.id, hosts)

    everywhere = [Place(node, device) for node in problem.cluster.nodes for device in node.devices]
    return tuple(
        Unused(node=place.node.id, device=place.device.index, reason=why(place))
        for place in everywhere
        if place not in used
    )


def _why_not_needed(layout: _Layout, at: int) -> str:
    tables, rate = layout.tables, layout.rate
    rate_with, n_stages = layout.found.rate_with[at]
    if rate_with <= 0.0:
        others = [other for other in layout.cut.order if other != at]
        is_linked = any(
            max(tables.hop_s[0, at, one], tables.hop_s[0, one, at]) < float("inf") for one in others
        )
        return (
            "no cut of the layers fits it together with its neighbours"
            if is_linked
            else "no measured link joins it to the devices in use, both ways"
        )
    instead = f"at best {_show(rate_with)} instead of {_show(rate)} tokens/s"
    if n_stages > len(layout.cut.order):
        return f"adds a hop: {instead}" if rate_with < rate else f"too little gain for another hop: {instead}"
    return f"no gain in place of another: {instead}"


def _kept_note(problem: _Problem, new: _Layout, kept: _Layout) -> str:
    if new.cut.order == kept.cut.order and new.cut.bounds == kept.cut.bounds:
        return "the layout is as before"
    return (
        f"kept the present layout: another would give {_show(new.rate)} instead of {_show(kept.rate)} "
        f"tokens/s, less than {round((KEEP_GAIN - 1) * 100)} % more"
    )


def _show(rate: float) -> str:
    return f"{rate:.4g}" if rate < 1e4 else f"{rate:.0f}"
