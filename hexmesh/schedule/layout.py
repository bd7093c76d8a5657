"""Replicas laid out over the mesh's devices: which devices make a replica, in what order, with which layers.

Maximises the sum of the replicas' decode rates b / C(b), where C(b) is the sum of all stage times and hops for
b sequences: what a replica gives with one step in flight. It takes as many sequences at once as the workload says.
Each stage is one device. Sums within TOLERANCE of the best count as equal, being below what measurements tell
apart, and are decided by more replicas, fewer stages, then an even pipeline (see `cuts`), more KV blocks, a faster
slowest stage. Up to `held_karp.MAX_PLACES` devices the best sum is exact; beyond, see `replicas`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import msgspec

from hexmesh.cluster import Cluster
from hexmesh.cost import STEP_TOKENS, CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName, Flow, Plan, Replica, Stage, Unused
from hexmesh.schedule.cuts import EVEN, best_cut, cut_cycle_s, last_true
from hexmesh.schedule.explain import explain
from hexmesh.schedule.held_karp import MAX_PLACES, SAME
from hexmesh.schedule.misfit import NoFit, misfit, too_small, why_unusable
from hexmesh.schedule.replicas import Found, Search, find_replicas
from hexmesh.schedule.tables import Blocks, Cut, Place, Tables, build_tables, room_blocks
from hexmesh.workload import Workload

TOLERANCE = 0.01
KEEP_GAIN = 1.05
"""New replicas must be this much faster than the present ones to be worth moving layers."""
LONG_CONTEXT_COST = 0.8
"""A layout with room for longer sequences is taken if it keeps this share of the best rate."""


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
    """The plan over the devices of `hosts`, or why there is none.

    Every stage of a replica has room for the same KV blocks: at least one sequence of min(max_model_tokens,
    prompt + output), of max_model_tokens or the longest half, quarter and so on of it where that costs little,
    and at most all concurrent sequences at full length. Replicas of `current` are kept unless new ones are
    KEEP_GAIN faster in all, more in number, or hold the longer sequences that those cannot. With more than
    `max_devices` usable devices the search is not exact.
    """
    if (
        min(max_model_tokens, block_tokens, workload.max_concurrent_sequences, workload.mean_context_tokens)
        < 1
    ):
        raise InvalidInput("token counts and concurrency of a workload must be positive")
    problem = _Problem.of(cluster, spec, dtype, workload, hosts, max_model_tokens, block_tokens, step_tokens)
    searcher = _Searcher(problem=problem, max_exact=min(max_devices, MAX_PLACES), tolerance=tolerance)
    best = searcher.best()
    if best is None:
        return misfit(cluster, problem.costs, problem.floors[0], problem.usable, hosts)
    present = problem.present(current, model_id, dtype, hosts)
    kept = searcher.keep(best, list(present.values()))
    chosen = best if kept is None else kept
    plan = _plan(problem, chosen, _names(chosen.cuts, present), hosts, model_id, model_name, reason)
    notes = () if kept is None else (_kept_note(best, kept, list(present.values())),)
    return msgspec.structs.replace(plan, explanation=(*explain(plan, cluster, spec, workload), *notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Cuts, the tables they were found in and what the search knew."""

    tables: Tables
    cuts: tuple[Cut, ...]
    floor_tokens: int
    """The sequence length that every stage was required to have room for."""
    search: Search
    possible: Search
    """What was found with room for the shortest sequences alone."""

    @property
    def rate(self) -> float:
        return sum(self.tables.rate_of(cut) for cut in self.cuts)

    @property
    def n_stages(self) -> int:
        return sum(len(cut.order) for cut in self.cuts)


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
    """Sequence lengths to make room for, ascending: the first one is a must, the last one most wanted."""

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
            floors=tuple(sorted({must, *_halves(max_model_tokens, must)})),
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

    def present(
        self, current: Plan | None, model_id: str, dtype: DtypeName, hosts: Mapping[str, int]
    ) -> dict[str, _Present]:
        """The present plan's replicas that could stay as they are, by id."""
        if current is None or (current.model_id, current.dtype) != (model_id, dtype):
            return {}
        index = {(place.node.id, place.device.index): at for at, place in enumerate(self.places)}
        found = {}
        for replica in current.replicas:
            order = tuple(index.get((stage.node, stage.devices[0]), -1) for stage in replica.stages)
            bounds = (0, *(stage.stop for stage in replica.stages))
            is_same_boot = all(
                current.hosts.get(stage.node) == hosts.get(stage.node) for stage in replica.stages
            )
            if order and -1 not in order and is_same_boot and bounds[-1] == self.costs.spec.n_layers:
                found[replica.id] = _Present(order, bounds)
        return found


@dataclass(frozen=True, slots=True)
class _Present:
    """A replica as it is laid out now."""

    order: tuple[int, ...]
    bounds: tuple[int, ...]

    def is_in(self, cuts: Sequence[Cut]) -> bool:
        return any((cut.order, cut.bounds) == (self.order, self.bounds) for cut in cuts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Searcher:
    """Searches of one planning."""

    problem: _Problem
    max_exact: int
    tolerance: float

    def best(self) -> _Layout | None:
        """The best layout for the longest sequences that are worth their cost; None if nothing fits."""
        floors = self.problem.floors
        if not self.problem.places:
            return None
        found = {0: self._search(floors[0])}
        possible = found[0][1]
        if possible is None:
            return None
        least_rate = LONG_CONTEXT_COST * possible.best_rate

        def is_worth(at: int) -> bool:
            found[at] = self._search(floors[at])
            search = found[at][1]
            return search is not None and search.best_rate >= least_rate

        top = len(floors) - 1
        at = top if top == 0 or is_worth(top) else last_true(0, top - 1, is_worth)
        tables, search = found[at]
        assert search is not None
        return _Layout(
            tables=tables,
            cuts=self._settle(tables, search.replicas),
            floor_tokens=floors[at],
            search=search,
            possible=possible,
        )

    def keep(self, best: _Layout, present: Sequence[_Present]) -> _Layout | None:
        """A layout with present replicas as they are, all or all but one, if it is about as good as `best`."""
        tables = best.tables
        cuts = [cut for one in present if (cut := _as_it_is(tables, one)) is not None]
        tries = [cuts, *([cut for cut in cuts if cut is not left_out] for left_out in cuts)]
        for kept in tries:
            layout = self._around(best, kept) if kept else None
            if layout is not None and layout.rate * KEEP_GAIN > best.rate and _n(layout) >= _n(best):
                return layout
        return None

    def _around(self, best: _Layout, kept: Sequence[Cut]) -> _Layout:
        """`kept`, and the best replicas over the devices that those leave."""
        used = {place for cut in kept for place in cut.order}
        left = [place for place in range(len(best.tables.places)) if place not in used]
        more = self._find(best.tables, left)
        added = () if more is None else self._settle(best.tables, more.replicas)
        return _Layout(
            tables=best.tables,
            cuts=(*kept, *added),
            floor_tokens=best.floor_tokens,
            search=best.search,
            possible=best.possible,
        )

    def _search(self, floor_tokens: int) -> tuple[Tables, Search | None]:
        tables = self.problem.tables(floor_tokens)
        return tables, self._find(tables, range(len(tables.places)))

    def _find(self, tables: Tables, places: Sequence[int]) -> Search | None:
        return find_replicas(tables, places, max_exact=self.max_exact, tolerance=self.tolerance)

    def _settle(self, tables: Tables, replicas: Sequence[Found]) -> tuple[Cut, ...]:
        cuts = (self._cut(tables, found) for found in replicas)
        return tuple(sorted(cuts, key=lambda cut: (-tables.rate_of(cut), cut.order)))

    def _cut(self, tables: Tables, found: Found) -> Cut:
        """Of all orders that were found, the cut with an even pipeline, then the most KV blocks, then the fastest."""
        least_rate, max_blocks = found.least_rate * (1.0 - 2 * SAME), self.problem.max_blocks
        cuts = [
            best_cut(
                tables,
                option.order,
                option.batch,
                limit_s=tables.batches[option.batch] / least_rate,
                max_blocks=max_blocks,
            )
            for option in found.options
        ]
        possible = [cut for cut in cuts if cut is not None]
        even_s = EVEN * min(tables.slowest_s(cut) for cut in possible)
        return max(
            (cut for cut in possible if tables.slowest_s(cut) <= even_s),
            key=lambda cut: (min(tables.room_of(cut), max_blocks), tables.rate_of(cut)),
        )


def _n(layout: _Layout) -> int:
    return len(layout.cuts)


def _as_it_is(tables: Tables, present: _Present) -> Cut | None:
    """A present replica with today's figures; None if it lacks room."""
    cycles = [
        cut_cycle_s(tables, present.order, present.bounds, batch) for batch in range(len(tables.batches))
    ]
    batch = max(range(len(cycles)), key=lambda at: tables.batches[at] / cycles[at])
    cut = Cut(order=present.order, bounds=present.bounds, batch=batch, cycle_s=cycles[batch])
    return cut if tables.rate_of(cut) > 0.0 else None


def _halves(longest: int, shortest: int) -> Iterator[int]:
    """`longest`, its half, quarter and so on, while longer than `shortest`."""
    while longest > shortest:
        yield longest
        longest //= 2


def _names(cuts: Sequence[Cut], present: Mapping[str, _Present]) -> dict[str, Cut]:
    """The cuts by replica id, in order of the ids: what stays keeps its id, the others get free ones."""
    left = list(cuts)
    named = {}
    for name, one in present.items():
        for cut in left:
            if one.is_in([cut]):
                named[name] = cut
                left.remove(cut)
                break
    free = (name for name in (f"r{n}" for n in count()) if name not in named)
    named |= dict(zip(free, left, strict=False))
    return dict(sorted(named.items(), key=lambda item: (len(item[0]), item[0])))


def _batch_levels(n_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the number itself."""
    return tuple(sorted({1 << power for power in range(n_sequences.bit_length())} | {n_sequences}))


def _plan(
    problem: _Problem,
    layout: _Layout,
    named: Mapping[str, Cut],
    hosts: Mapping[str, int],
    model_id: str,
    model_name: str,
    reason: str,
) -> Plan:
    replicas = tuple(_replica(problem, layout.tables, name, cut) for name, cut in named.items())
    total = sum(replica.predicted_tokens_per_s for replica in replicas)
    return Plan(
        model_id=model_id,
        model_name=model_name,
        n_layers=problem.costs.spec.n_layers,
        dtype=problem.costs.dtype,
        max_model_tokens=problem.max_model_tokens,
        hosts=dict(hosts),
        replicas=replicas,
        flows=tuple(
            Flow(src=replica.id, dst=replica.id, share=replica.predicted_tokens_per_s / total)
            for replica in replicas
        ),
        unused=_unused(problem, layout, hosts),
        reason=reason,
    )


def _replica(problem: _Problem, tables: Tables, name: str, cut: Cut) -> Replica:
    costs, kv_blocks = problem.costs, min(tables.room_of(cut), problem.max_blocks)
    stages = tuple(
        Stage(
            node=problem.places[place].node.id,
            devices=(problem.places[place].device.index,),
            start=start,
            stop=stop,
            kv_blocks=kv_blocks,
            needed_bytes=costs.needed_bytes(start, stop, kv_blocks, problem.places[place].device.kind),
            room_bytes=problem.places[place].device.budget_bytes,
            predicted_step_s=float(tables.step_s[cut.batch, place, start, stop]),
        )
        for place, start, stop in cut.spans()
    )
    return Replica(
        id=name,
        role="mixed",
        stages=stages,
        block_tokens=costs.block_tokens,
        predicted_tokens_per_s=tables.rate_of(cut),
        predicted_batch=tables.batches[cut.batch],
    )


def _unused(problem: _Problem, layout: _Layout, hosts: Mapping[str, int]) -> tuple[Unused, ...]:
    index = {(place.node.id, place.device.index): at for at, place in enumerate(problem.places)}
    used = {problem.places[at] for cut in layout.cuts for at in cut.order}

    def why(place: Place) -> str:
        at = index.get((place.node.id, place.device.index))
        if at is not None:
            return _why_not_needed(layout, at)
        if place in problem.usable:
            return too_small(problem.costs, place.device, problem.floors[0])
        return why_unusable(place.node.id, hosts)

    everywhere = [Place(node, device) for node in problem.cluster.nodes for device in node.devices]
    return tuple(
        Unused(node=place.node.id, device=place.device.index, reason=why(place))
        for place in everywhere
        if place not in used
    )


def _why_not_needed(layout: _Layout, at: int) -> str:
    rate = layout.rate
    rate_with, n_stages = layout.search.rate_with.get(at, (layout.search.best_rate, 0))
    possible, _ = layout.possible.rate_with.get(at, (layout.possible.best_rate, 0))
    if layout.search is not layout.possible and possible > max(rate, rate_with):
        return f"too little memory for sequences of {layout.floor_tokens} tokens, as every replica holds"
    if rate_with <= 0.0:
        return (
            "no cut of the layers fits it together with its neighbours"
            if _is_linked(layout, at)
            else "no measured link joins it to the devices in use, both ways"
        )
    instead = f"at best {_show(rate_with)} instead of {_show(rate)} tokens/s"
    if n_stages > layout.n_stages:
        return f"adds a hop: {instead}" if rate_with < rate else f"too little gain for another hop: {instead}"
    return f"no gain in place of another: {instead}"


def _is_linked(layout: _Layout, at: int) -> bool:
    hop_s = layout.tables.hop_s[0]
    others = [other for cut in layout.cuts for other in cut.order]
    return any(max(hop_s[at, other], hop_s[other, at]) < float("inf") for other in others)


def _kept_note(best: _Layout, kept: _Layout, present: Sequence[_Present]) -> str:
    n_stay = sum(one.is_in(kept.cuts) for one in present)
    is_as_before = n_stay == len(present) == _n(kept)
    if _n(kept) == _n(best) and all(_Present(cut.order, cut.bounds).is_in(best.cuts) for cut in kept.cuts):
        return "the layout is as before" if is_as_before else f"{n_stay} of the replicas stay where they are"
    what = "kept the present layout" if is_as_before else f"kept {n_stay} of the replicas where they are"
    return (
        f"{what}: another layout would give {_show(best.rate)} instead of {_show(kept.rate)} tokens/s, less "
        f"than {round((KEEP_GAIN - 1) * 100)} % more"
    )


def _show(rate: float) -> str:
    return f"{rate:.4g}" if rate < 1e4 else f"{rate:.0f}"
