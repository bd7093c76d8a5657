"""HexGen-2's search (arXiv 2502.07903): partition the fleet's graph, let a flow say what to swap, repeat.

From the paper:
1. Vertices are devices weighed by memory, edges are weighed by bandwidth. K groups, K = memory / a replica's memory:
   spectral partition, then Kernighan-Lin swaps under the memory that a replica needs (`spectral.py`).
2. Groups become vertices; a second partition, into prefill and decode, *maximises* the bandwidth cut, as KV crosses
   it.
3. Each group takes the best of its strategies: a prefill group that of least latency, a decode group that of most
   throughput.
4. A flow network from source to sink, a replica split into an edge of its rate, an edge from each prefill to each
   decode replica of the rate at which KV can cross; its maximum by preflow-push.
5. Edges at capacity are bottlenecks, those below have slack: devices are swapped from where there is slack to where
   there is none, and the rest is done anew, until the flow no longer grows.

What differs: strategies are exact (`Layouts`), not listed TP x PP; which side prefills is tried both ways; in step 5
devices are also handed over one-sidedly, and a group with slack may change its type, without which the types would
stay blind to FLOPs and workload; only swaps that gain are made in step 1. The network knows pairs, not the NICs that
pairs share, so what it ends with is judged by the flow program. `search_widely` is ours: every K from K / 2 up, and
prefill of most throughput.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, product
from typing import Literal

from hexmesh.papers.pd_flow import PdFlow, max_flow
from hexmesh.planner.exchanges import handed_over, swapped
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Team
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run
from hexmesh.planner.spectral import graph_of, partition, sides_of_most_cut
from hexmesh.score import handoff_bytes
from hexmesh.score.plan_score import kv_layer_bytes

Phase = Literal["prefill", "decode"]
MAX_K_TRIED = 6
"""Of the wide search, spread evenly."""
ROUND = 50
"""Proposals."""
MAX_FLOWS, MAX_EDGES = 800, 40_000
"""Networks solved for one K, fewer where they are large: solving one takes about the square of K."""


@dataclass(frozen=True, slots=True)
class Group:
    """Devices of one replica, and its type."""

    team: Team
    phase: Phase


Groups = tuple[Group, ...]


@dataclass(frozen=True)
class Network:
    """The flow network of some groups; a group without a layout has no replica."""

    groups: Groups
    layouts: tuple[Layout | None, ...]
    flow: PdFlow

    @property
    def value(self) -> float:
        """Requests per second."""
        return self.flow.value

    @property
    def draft(self) -> Draft:
        """Replicas that requests flow through."""
        return tuple(
            layout
            for at, layout in enumerate(self.layouts)
            if layout is not None and self.through[at] > 1e-9 * self.value
        )

    @cached_property
    def through(self) -> tuple[float, ...]:
        """Flow of every group."""
        sums = Counter[str]()
        for (source, target), flow in self.flow.flows.items():
            sums.update({source: flow, target: flow})
        return tuple(float(sums[str(at)]) for at in range(len(self.groups)))

    @cached_property
    def slack(self) -> tuple[float, ...]:
        """Rate that every group has left; a group without a replica has nothing to lose."""
        rates = (_rate(layout) for layout in self.layouts)
        return tuple(
            rate - flow if rate > 0 else float("inf") for rate, flow in zip(rates, self.through, strict=True)
        )


Proposals = Callable[[Network], Iterable[Groups]]
"""Other groups to try instead of a network's."""


@dataclass(frozen=True)
class Builder:
    """Makes networks; remembers how fast each pair of layouts hands over."""

    problem: Problem
    prefills_at_once: bool
    """Prefill groups are laid out for least latency, as in the paper, instead of most throughput."""
    _handoffs: dict[tuple[Layout, Layout], float] = field(default_factory=dict)

    def network(self, groups: Groups) -> Network:
        """Strategies, capacities and the largest flow."""
        layouts = tuple(self._layout(group) for group in groups)
        prefill = {at: layout for at, layout in enumerate(layouts) if layout and layout.role == "prefill"}
        decode = {at: layout for at, layout in enumerate(layouts) if layout and layout.role == "decode"}
        flow = max_flow(
            {str(at): layout.prefill for at, layout in prefill.items()},
            {str(at): layout.decode for at, layout in decode.items()},
            {
                (str(p), str(d)): self.handoff_rate(source, target)
                for p, source in prefill.items()
                for d, target in decode.items()
            },
        )
        return Network(groups, layouts, flow)

    def _layout(self, group: Group) -> Layout | None:
        layouts = self.problem.layouts
        if group.phase == "prefill" and self.prefills_at_once:
            return layouts.quickest(group.team, "prefill")
        return layouts.best(group.team, group.phase)

    def handoff_rate(self, source: Layout, target: Layout) -> float:
        """Requests per second whose KV can cross, each layer from its holder to its holder, all ways at once."""
        pair = (source, target)
        if pair not in self._handoffs:
            problem = self.problem
            ways = handoff_bytes(
                problem.held(source.parts), problem.held(target.parts), kv_layer_bytes(problem.capacities)
            )
            most = min(source.prefill, target.decode)
            self._handoffs[pair] = min(
                [most, *(_bytes_per_s(problem, way) / n_bytes for way, n_bytes in ways.items())]
            )
        return self._handoffs[pair]


def _bytes_per_s(problem: Problem, way: tuple[str, str]) -> float:
    link = problem.links.get(way)
    return 0.0 if link is None else link.bytes_per_s


def _rate(layout: Layout | None) -> float:
    if layout is None:
        return 0.0
    return layout.prefill if layout.role == "prefill" else layout.decode


def search(run: Run) -> None:
    """As published: one K, prefill of least latency."""
    most = most_groups(run.problem)
    _search(run, [max(2, most)], Builder(run.problem, prefills_at_once=True), "hexgen2")


def search_widely(run: Run) -> None:
    """Several K from K / 2 up, prefill of most throughput."""
    most = max(2, most_groups(run.problem))
    fewest = max(2, most // 2)
    step = max(1, -(-(most - fewest + 1) // MAX_K_TRIED))
    counts = sorted({*range(most, fewest - 1, -step), fewest}, reverse=True)
    _search(run, counts, Builder(run.problem, prefills_at_once=False), "hexgen2-wide")


def _search(run: Run, group_counts: Iterable[int], builder: Builder, by: str) -> None:
    if not {"prefill", "decode"} <= run.problem.roles:
        run.notes.append("hexgen2 needs prefill and decode replicas, which were not asked for")
        return
    for n_groups in group_counts:
        improve(run, first_network(builder, n_groups), builder, guided, by)
        if run.is_over:
            return


def most_groups(problem: Problem) -> int:
    """K: how many replicas the fleet's memory holds, by the bytes alone."""
    return int(sum(pool.size * pool.device.budget_bytes for pool in problem.pools) // replica_bytes(problem))


def replica_bytes(problem: Problem) -> float:
    """Weights, and KV for the sequences at once that the workload names."""
    workload, costs = problem.workload, problem.capacities.costs
    kv = workload.max_concurrent_sequences * problem.capacities.model.kv_bytes(workload.mean_context)
    return costs.weight_bytes(0, costs.spec.n_layers) + kv


def first_network(builder: Builder, n_groups: int) -> Network:
    """Phase 1 and its flow: groups, their types as most bandwidth is cut, either way round."""
    graph = graph_of(builder.problem)
    teams = partition(graph, n_groups, replica_bytes(builder.problem))
    sides = sides_of_most_cut(graph, teams)
    networks = [builder.network(_typed(teams, sides, first)) for first in (True, False)]
    return max(networks, key=lambda network: network.value)


def _typed(teams: Sequence[Team], sides: Sequence[bool], prefills: bool) -> Groups:
    return tuple(
        Group(team, "prefill" if side == prefills else "decode")
        for team, side in zip(teams, sides, strict=True)
    )


def improve(run: Run, network: Network, builder: Builder, propose: Proposals, by: str) -> Network:
    """Swap until no proposal lets more flow through; first and last are offered.

    Proposals are looked at in rounds, and the best of the first round with a gain is taken.
    """
    left = max(2 * ROUND, min(MAX_FLOWS, MAX_EDGES // len(network.groups) ** 2))
    _offer(run, network, by)
    proposals = iter(propose(network))
    while left > 0 and not run.is_over:
        tried = [builder.network(groups) for groups in islice(proposals, min(ROUND, left))]
        if not tried:
            break
        left -= len(tried)
        best = max(tried, key=lambda found: found.value)
        if best.value > network.value * (1 + 1e-6):
            network, proposals = best, iter(propose(best))
    _offer(run, network, by)
    return network


def _offer(run: Run, network: Network, by: str) -> None:
    if network.draft:
        run.offer(network.draft, by)


def guided(network: Network) -> Iterator[Groups]:
    """Swaps from where there is slack to what holds the flow up, the most slack to the least first."""
    givers = sorted(range(len(network.groups)), key=lambda at: -network.slack[at])
    takers = givers[::-1]
    for giver in givers:
        yield retyped(network.groups, giver)
    ranks = sorted(product(range(len(givers)), repeat=2), key=sum)
    for giver, taker in ((givers[a], takers[b]) for a, b in ranks):
        if giver != taker:
            yield from _traded(network.groups, giver, taker)


def retyped(groups: Groups, at: int) -> Groups:
    """One group does the other phase."""
    phase: Phase = "decode" if groups[at].phase == "prefill" else "prefill"
    return _replaced(groups, {at: Group(groups[at].team, phase)})


def _traded(groups: Groups, giver: int, taker: int) -> Iterator[Groups]:
    mine, theirs = groups[giver], groups[taker]
    yield _replaced(groups, {giver: Group(mine.team, theirs.phase), taker: Group(theirs.team, mine.phase)})
    for trade in (swapped, handed_over):
        for a, b in trade(mine.team, theirs.team):
            yield _replaced(groups, {giver: Group(a, mine.phase), taker: Group(b, theirs.phase)})


def _replaced(groups: Groups, by: Mapping[int, Group]) -> Groups:
    """Groups that gave all they had are gone."""
    changed = (by.get(at, group) for at, group in enumerate(groups))
    return tuple(group for group in changed if group.team)
