"""Every plan over a few named devices, one after the other: the oracle of exhaustive search. Shares no code with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise, permutations, product

from hexmesh.cluster import Cluster, Role
from hexmesh.planner.problem import Problem
from hexmesh.score import Capacities, ReplicaRates, best_flow
from hexmesh.score.pipeline import NOWHERE, Pipeline, Seat, group_of, hop_between
from hexmesh.score.plan_score import kv_layer_bytes

Named = tuple[str, int]
"""A device: (node, index)."""


@dataclass(frozen=True, slots=True)
class _Stage:
    node: str
    devices: tuple[int, ...]
    start: int
    stop: int


def best_rate(problem: Problem) -> float:
    """The most that any plan serves: all sets of disjoint teams, all roles, orders, groups and cuts."""
    cluster, capacities = problem.cluster, problem.capacities
    devices = [(node.id, device.index) for node in cluster.nodes for device in node.devices]

    @cache
    def rates(team: tuple[Named, ...]) -> tuple[ReplicaRates, ...]:
        """Of every layout in every role that does anything."""
        return tuple(
            rated
            for stages in _layouts(team, cluster, problem)
            for role in sorted(problem.roles)
            if (rated := _rates(stages, role, cluster, capacities)) is not None
        )

    best = 0.0
    for teams in _partitions(devices):
        for chosen in product(*(rates(team) for team in teams)):
            if best < _most(chosen):
                named = [
                    ReplicaRates(
                        name=f"r{at}",
                        role=one.role,
                        prefill=one.prefill,
                        decode=one.decode,
                        stages=one.stages,
                        uses=one.uses,
                    )
                    for at, one in enumerate(chosen)
                ]
                best = max(best, best_flow(named, cluster, kv_layer_bytes(capacities)).requests_per_s)
    return best


def _most(replicas: Sequence[ReplicaRates]) -> float:
    """The lesser of all prompts and all outputs: a plan below that need not be solved."""
    return min(sum(one.prefill for one in replicas), sum(one.decode for one in replicas))


def _partitions(devices: Sequence[Named]) -> Iterator[tuple[tuple[Named, ...], ...]]:
    """Every set of disjoint teams, the empty one left out."""
    found = [()] if not devices else list(_all(devices))
    yield from (teams for teams in found if teams)


def _all(devices: Sequence[Named]) -> Iterator[tuple[tuple[Named, ...], ...]]:
    if not devices:
        yield ()
        return
    first, rest = devices[0], devices[1:]
    yield from _all(rest)
    for n in range(len(rest) + 1):
        for others in combinations(rest, n):
            left = [device for device in rest if device not in others]
            for teams in _all(left):
                yield ((first, *others), *teams)


def _layouts(team: Sequence[Named], cluster: Cluster, problem: Problem) -> Iterator[tuple[_Stage, ...]]:
    n_layers = problem.spec.n_layers
    for groups in _groupings(team):
        if not all(_may_share(group, cluster, problem) for group in groups):
            continue
        for order in permutations(groups):
            for inner in combinations(range(1, n_layers), len(order) - 1):
                ends = [0, *inner, n_layers]
                yield tuple(
                    _Stage(group[0][0], tuple(index for _, index in group), ends[at], ends[at + 1])
                    for at, group in enumerate(order)
                )


def _groupings(team: Sequence[Named]) -> Iterator[tuple[tuple[Named, ...], ...]]:
    """Ways to group all of the team's devices."""
    if not team:
        yield ()
        return
    first, rest = team[0], team[1:]
    for n in range(len(rest) + 1):
        for others in combinations(rest, n):
            left = [device for device in rest if device not in others]
            for groups in _groupings(left):
                yield ((first, *others), *groups)


def _may_share(group: Sequence[Named], cluster: Cluster, problem: Problem) -> bool:
    """Devices of a stage are alike, of one host, and as many as the model splits into."""
    node = cluster.node(group[0][0])
    devices = [device for device in node.devices if (node.id, device.index) in group]
    figures = {(one.kind, one.budget_bytes, one.flops_per_s, one.bytes_per_s) for one in devices}
    return len(devices) == len(group) and len(figures) == 1 and problem.spec.splits_into(len(group))


def _rates(
    stages: tuple[_Stage, ...], role: Role, cluster: Cluster, capacities: Capacities
) -> ReplicaRates | None:
    nodes = [cluster.node(stage.node) for stage in stages]
    links = cluster.link_table()
    pipeline = Pipeline(
        seats=tuple(
            Seat(group=group_of(node, stage.devices), start=stage.start, stop=stage.stop)
            for node, stage in zip(nodes, stages, strict=True)
        ),
        hops=tuple(hop_between(a, b, links) for a, b in pairwise(nodes)),
        back=NOWHERE if len(nodes) == 1 else hop_between(nodes[-1], nodes[0], links),
    )
    prefill = capacities.prefill(pipeline).requests_per_s if role != "decode" else 0.0
    decode = capacities.decode(pipeline).requests_per_s if role != "prefill" else 0.0
    uses = capacities.mixed(pipeline).uses if role == "mixed" else ()
    if (role != "decode" and prefill == 0) or (role != "prefill" and decode == 0):
        return None
    if role == "mixed" and not uses:
        return None
    return ReplicaRates(name="", role=role, prefill=prefill, decode=decode, stages=stages, uses=uses)
