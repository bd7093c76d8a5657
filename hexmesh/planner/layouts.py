"""The best layouts of teams, each problem solved once: teams that look alike share the answer.

A team's problem is its classes of pools and the ways between them (`layout_graph`), so that any team of two H100 in one
host and four L40 in another over a like line is one entry, whichever hosts they are. Rates of what is found are the
score's own (`Capacities`), never the search's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from hexmesh.cluster import Cluster, Device, Fabric, Role
from hexmesh.cost import LOCAL_BYTES_PER_S, LOCAL_HOP_S
from hexmesh.errors import InvalidInput
from hexmesh.planner.layout_dp import Fit, Kernel
from hexmesh.planner.layout_graph import Class, Graph, graph_of
from hexmesh.planner.layout_kernel import Kernels
from hexmesh.planner.layout_search import fastest_prompts, fastest_tokens
from hexmesh.planner.layout_tables import Step, Tables
from hexmesh.planner.pools import Part, Pool, Team
from hexmesh.roofline import Group
from hexmesh.score.capacity import Capacities
from hexmesh.score.pipeline import NOWHERE, Hop, Pipeline, Seat, group_like, hop_between

INSIDE = Hop(LOCAL_HOP_S, LOCAL_BYTES_PER_S)
"""Between two stages of one host."""

MOST_ANSWERS = 100_000
"""Layouts of teams that are kept by name; problems that are solved stay."""

Goal = Literal["best", "quickest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A replica before it has its devices."""

    role: Role
    parts: tuple[Part, ...]
    """In pipeline order."""
    prefill: float
    """Requests per second, as in `ReplicaRates`."""
    decode: float
    uses: tuple[tuple[float, float], ...]
    """As in `Mixed`, for "mixed"."""
    requests_per_s: float
    """What it gives in its role, alone; a mixed one's balanced rate."""
    prefill_latency_s: float
    """Of one prompt through the idle pipeline."""
    alone_s: float
    """Of one request alone in its role: its prompt, its tokens, or both."""
    tpot_s: float
    """At the highest rate; 0 for "prefill", as are the next two."""
    batch: float
    micro_batches: int


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is alike in pools whose devices are alike to a search."""

    device: Device
    fabric: Fabric | None
    launch_s: float
    step_s: float
    degrees: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Signature:
    """A team's problem."""

    classes: tuple[Class, ...]
    hops: tuple[tuple[Hop | None, ...], ...]


@dataclass(frozen=True, slots=True)
class _Stage:
    """Of a solution: a part on some pool of a class, the same one for all stages of a visit."""

    visit: int
    cls: int
    tp: int
    start: int
    stop: int


class Layouts:
    """Layouts of any team of some pools, kept for as long as this lives. One caller at a time."""

    def __init__(
        self, cluster: Cluster, pools: tuple[Pool, ...], capacities: Capacities, *, compiled: bool = True
    ) -> None:
        self._pools, self._capacities = pools, capacities
        self._links = cluster.link_table()
        self._sites = {site: at for at, site in enumerate(dict.fromkeys(pool.node.site for pool in pools))}
        kinds = [_kind_of(pool) for pool in pools]
        self._kind_at = {kind: at for at, kind in enumerate(dict.fromkeys(kinds))}
        self._kinds = [self._kind_at[kind] for kind in kinds]
        self._options = list[dict[int, int]]()
        """By kind: the tables' option by TP degree."""
        groups = list[Group]()
        for kind in self._kind_at:
            pool = pools[kinds.index(kind)]
            self._options.append({tp: len(groups) + at for at, tp in enumerate(kind.degrees)})
            groups += [group_like(pool.node, pool.device, tp) for tp in kind.degrees]
        self._tables = Tables(capacities, groups)
        self._kernels = Kernels(self._tables, self._options, compiled=compiled)
        self._hops = dict[tuple[int, int], Hop | None]()
        self._solved = dict[tuple[_Signature, Role, Goal], tuple[_Stage, ...] | None]()
        self._latest: tuple[_Signature, Graph, Kernel] | None = None
        self._answers = dict[tuple[Team, Role, Goal], Layout | None]()
        self._rated = dict[tuple[object, Role], Layout | None]()

    def best(self, team: Team, role: Role) -> Layout | None:
        """The layout with the highest rate in the role; None if there is none that keeps the limits.

        It may leave devices idle, and those that may not have the role are. Exact unless the team has more than about
        five pools that all differ (`layout_graph`).
        """
        return self._answer(team, role, "best")

    def quickest(self, team: Team, role: Role) -> Layout | None:
        """The layout with the least `alone_s`; None if there is none that keeps the limits."""
        return self._answer(team, role, "quickest")

    def rated(self, parts: tuple[Part, ...], role: Role) -> Layout | None:
        """The rates of exactly these parts; None if they do nothing in the role."""
        pipeline = self._pipeline(parts)
        if pipeline is None:
            return None
        key = tuple((self._kinds[part.pool], part.tp, part.start, part.stop) for part in parts)
        known = (key, pipeline.hops, pipeline.back), role
        if known not in self._rated:
            self._rated[known] = self._rate(pipeline, parts, role)
        found = self._rated[known]
        return None if found is None else replace(found, parts=parts)

    def _rate(self, pipeline: Pipeline, parts: tuple[Part, ...], role: Role) -> Layout | None:
        capacities, output_tokens = self._capacities, self._capacities.workload.output_tokens
        prompts = capacities.prefill(pipeline)
        if role != "decode" and prompts.requests_per_s == 0:
            return None
        tokens_s = 0.0 if role == "prefill" else (output_tokens - 1) * capacities.token_alone_s(pipeline)
        layout = Layout(
            role=role,
            parts=parts,
            prefill=0.0 if role == "decode" else prompts.requests_per_s,
            decode=0.0,
            uses=(),
            requests_per_s=prompts.requests_per_s,
            prefill_latency_s=prompts.latency_s,
            alone_s=tokens_s if role == "decode" else prompts.latency_s + tokens_s,
            tpot_s=0.0,
            batch=0.0,
            micro_batches=0,
        )
        return layout if role == "prefill" else self._with_tokens(layout, pipeline)

    def _with_tokens(self, layout: Layout, pipeline: Pipeline) -> Layout | None:
        """The rates of one that decodes; None if it cannot."""
        options = [self._options[self._kinds[part.pool]][part.tp] for part in layout.parts]
        batch, n, period_s = self._kernels.highest(pipeline, options, layout.role)
        if batch == 0:
            return None
        tokens_per_s, uses = batch / period_s, tuple[tuple[float, float], ...]()
        requests_per_s = tokens_per_s / self._capacities.workload.output_tokens
        if layout.role == "mixed":
            decode_batch, _, decode_period_s = self._kernels.highest(pipeline, options, "decode")
            tokens_per_s = decode_batch / decode_period_s
            uses = tuple(self._capacities.uses(pipeline, batch, n))
        return replace(
            layout,
            decode=tokens_per_s / self._capacities.workload.output_tokens,
            uses=uses,
            requests_per_s=requests_per_s,
            tpot_s=n * period_s,
            batch=batch,
            micro_batches=n,
        )

    def _answer(self, team: Team, role: Role, goal: Goal) -> Layout | None:
        asked = team, role, goal
        if asked not in self._answers:
            if len(self._answers) >= MOST_ANSWERS:
                self._answers.clear()
                self._rated.clear()
            self._answers[asked] = self._find(team, role, goal)
        return self._answers[asked]

    def _find(self, team: Team, role: Role, goal: Goal) -> Layout | None:
        members = [(pool, count) for pool, count in team if count and role in self._pools[pool].roles]
        if not members:
            return None
        classes = self._classes(members)
        signature = self._signature(classes)
        solved = signature, role, goal
        if solved not in self._solved:
            self._solved[solved] = self._solve(signature, role, goal)
        found = self._solved[solved]
        if found is None:
            return None
        return self.rated(tuple(_parts(found, classes)), role)

    def _solve(self, signature: _Signature, role: Role, goal: Goal) -> tuple[_Stage, ...] | None:
        graph, kernel = self._graph_of(signature)
        found = self._search(signature, kernel, role, goal)
        if found is None:
            return None
        cls_of = [visit.cls for visit in graph.visits]
        return tuple(
            _Stage(one.visit, cls_of[one.visit], one.tp, one.start, one.stop) for one in found.stages
        )

    def _search(self, signature: _Signature, kernel: Kernel, role: Role, goal: Goal) -> Fit | None:
        least, slo = self._tables.least_resident, self._capacities.workload.slo
        if goal == "quickest":
            room = {"prefill": least, "decode": 1.0, "mixed": max(1.0, least)}[role]
            return kernel.soonest(_alone(role, self._capacities.workload.output_tokens), room)
        if role == "prefill":
            return fastest_prompts(kernel, least, slo)
        used = {
            at
            for cls in signature.classes
            for tp, at in self._options[cls.kind].items()
            if tp <= cls.n_devices
        }
        return fastest_tokens(kernel, role, self._tables.levels(frozenset(used)), least, slo)

    def _graph_of(self, signature: _Signature) -> tuple[Graph, Kernel]:
        """Kept for the next call only: roles of one team are often asked for together, and graphs are large."""
        if self._latest is None or self._latest[0] != signature:
            graph = graph_of(signature.classes, signature.hops, INSIDE)
            self._latest = signature, graph, self._kernels.of(graph)
        return self._latest[1:]

    def _classes(self, members: Sequence[tuple[int, int]]) -> list[tuple[Class, list[int]]]:
        """The team's pools, alike ones together, in an order that does not depend on which hosts they are."""
        counts = dict(members)
        pools = self._sorted(members)
        found = list[list[int]]()
        for pool in pools:
            alike = next((cls for cls in found if self._are_alike(cls[0], pool, pools, counts)), None)
            if alike is None:
                found.append([pool])
            else:
                alike.append(pool)
        sites = dict[int, int]()
        return [
            (
                Class(
                    kind=self._kinds[cls[0]],
                    n_devices=counts[cls[0]],
                    n_pools=len(cls),
                    site=sites.setdefault(self._sites[self._pools[cls[0]].node.site], len(sites)),
                ),
                cls,
            )
            for cls in found
        ]

    def _sorted(self, members: Sequence[tuple[int, int]]) -> list[int]:
        """Pools by what they are, and then by what they are to the others."""

        looks: dict[int, Any] = {pool: (self._kinds[pool], count) for pool, count in members}
        if len(set(looks.values())) < len(looks):
            for _ in range(2):
                order = {look: at for at, look in enumerate(sorted(set(looks.values())))}
                looks = {
                    pool: (order[looks[pool]], self._surroundings(pool, looks, order)) for pool, _ in members
                }
        return sorted(looks, key=lambda pool: (looks[pool], pool))

    def _surroundings(self, pool: int, looks: dict[int, Any], order: dict[Any, int]) -> tuple[Any, ...]:
        """What ways lead to and from which others."""

        def figures(hop: Hop | None) -> tuple[float, float]:
            return (-1.0, -1.0) if hop is None else (hop.delay_s, hop.bytes_per_s)

        return tuple(
            sorted(
                (order[looks[other]], figures(self._hop(pool, other)), figures(self._hop(other, pool)))
                for other in looks
                if other != pool
            )
        )

    def _are_alike(self, one: int, other: int, pools: Sequence[int], counts: dict[int, int]) -> bool:
        """Whether two pools may change places and nothing else changes."""
        return (
            self._kinds[one] == self._kinds[other]
            and counts[one] == counts[other]
            and self._hop(one, other) == self._hop(other, one)
            and all(
                self._hop(one, third) == self._hop(other, third)
                and self._hop(third, one) == self._hop(third, other)
                for third in pools
                if third not in (one, other)
            )
        )

    def _signature(self, classes: Sequence[tuple[Class, list[int]]]) -> _Signature:
        def hop(src: Sequence[int], dst: Sequence[int]) -> Hop | None:
            if src is dst:
                return self._hop(src[0], src[1]) if len(src) > 1 else None
            return self._hop(src[0], dst[0])

        return _Signature(
            tuple(found for found, _ in classes),
            tuple(tuple(hop(src, dst) for _, dst in classes) for _, src in classes),
        )

    def _hop(self, src: int, dst: int) -> Hop | None:
        """Between two pools; None where there is no link."""
        if (src, dst) not in self._hops:
            try:
                hop = hop_between(self._pools[src].node, self._pools[dst].node, self._links)
            except InvalidInput:
                hop = None
            self._hops[src, dst] = hop
        return self._hops[src, dst]

    def _pipeline(self, parts: Sequence[Part]) -> Pipeline | None:
        """None where a way is missing."""
        hops = [self._hop(a.pool, b.pool) for a, b in pairwise(parts)]
        back = NOWHERE if len(parts) == 1 else self._hop(parts[-1].pool, parts[0].pool)
        if back is None or None in hops:
            return None
        return Pipeline(
            seats=tuple(self._seats(parts)), hops=tuple(hop for hop in hops if hop is not None), back=back
        )

    def _seats(self, parts: Sequence[Part]) -> Iterator[Seat]:
        for part in parts:
            option = self._options[self._kinds[part.pool]][part.tp]
            yield Seat(group=self._tables.options[option].group, start=part.start, stop=part.stop)


def _parts(stages: Sequence[_Stage], classes: Sequence[tuple[Class, list[int]]]) -> Iterator[Part]:
    """A solution with a team's pools, those of a class in the order of the visits."""
    left = [iter(pools) for _, pools in classes]
    pool_of = dict[int, int]()
    for stage in stages:
        if stage.visit not in pool_of:
            pool_of[stage.visit] = next(left[stage.cls])
        yield Part(pool=pool_of[stage.visit], tp=stage.tp, start=stage.start, stop=stage.stop)


def _kind_of(pool: Pool) -> _Kind:
    group = group_like(pool.node, pool.device, 1)
    return _Kind(pool.device, pool.node.fabric, group.launch_s, group.step_s, pool.degrees)


def _alone(role: Role, output_tokens: int) -> tuple[tuple[Step, float], ...]:
    """What `Layout.alone_s` is the sum of. (A decode layout's is the quickest for any number of tokens.)"""
    match role:
        case "prefill":
            return ((Step("prefill"), 1.0),)
        case "decode":
            return ((Step("decode"), 1.0),)
        case "mixed":
            return (Step("prefill"), 1.0), (Step("decode"), output_tokens - 1.0)
