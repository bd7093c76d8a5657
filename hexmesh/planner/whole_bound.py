"""A rate that no plan of whole replicas beats, for fleets of so few devices that all teams can be laid out.

What a replica of a team does, x prompts and y outputs a second, is bounded by its layouts, which are exact: x <= P,
y <= D, and along a ray y = k x it reaches no further than the best mixed layout of a workload with k times the outputs
(and the same contexts), as its stages, hops and round trip then do just what they do on the ray. Doing less of either
is always possible. So between two rays, x is at most that of the first and y that of the second: a corner. Every
replica is at or below one of its team's corners, and an integer program over how many replicas are at each bounds their
sum, handoffs between them left out.

Holds for the plans that searches make, whose groups are of like devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from itertools import pairwise
from typing import cast

import msgspec

from hexmesh.cluster import Cluster, Role
from hexmesh.planner.layouts import Layouts
from hexmesh.planner.partitions import n_teams_within, teams_within
from hexmesh.planner.pools import ROLES, Pool, Team
from hexmesh.score import Capacities
from hexmesh.score.program import Program
from hexmesh.workload import Slo
from hexmesh.workload.lengths import Lengths

MOST_TEAMS = 16
"""Eight like devices are eight."""
_NEXT_RAY = 1.08
_FURTHEST_RAY = 16.0
_ROUNDING = 1 + 1e-6
_GAP = 1e-6
_MAX_NODES = 3000
_LIMIT_S = 5.0

_Corner = tuple[float, float]
"""Prompts and outputs a second."""


class _Tilted(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths of which nothing but the means is asked."""

    prompt: float
    output: float
    mean_context: float


def whole_bound(
    cluster: Cluster, pools: tuple[Pool, ...], layouts: Layouts, capacities: Capacities, roles: Set[Role]
) -> float:
    """Requests per second; infinite where there are too many teams, or hosts that may not do everything.

    `layouts` are those of the pools.
    """
    sizes = tuple(pool.size for pool in pools)
    if n_teams_within(sizes) > MOST_TEAMS or any(pool.roles != set(ROLES) for pool in pools):
        return math.inf
    tilted = _tilted(capacities) if "mixed" in roles else {}
    rays = {ray: Layouts(cluster, pools, capacities) for ray, capacities in tilted.items()}
    program = Program()
    served = program.variable(1.0)
    for phase in ("prompts", "outputs"):
        program.balance(phase, served, -1.0)
        program.balance(phase, program.variable(), -1.0)
    for team in teams_within(sizes):
        for prompts, outputs in _corners(layouts, team, rays, roles):
            at = program.variable(is_integer=True)
            program.balance("prompts", at, prompts)
            program.balance("outputs", at, outputs)
            for pool, count in team:
                program.use(pool, at, count, sizes[pool])
    most = program.most_of_integers(gap=_GAP, max_nodes=_MAX_NODES, limit_s=_LIMIT_S)
    return max(0.0, most) * _ROUNDING


def _tilted(capacities: Capacities) -> dict[float, Capacities]:
    """With outputs in other numbers, by how many there are for a prompt, rising."""
    workload, n = capacities.workload, math.floor(math.log(_FURTHEST_RAY) / math.log(_NEXT_RAY))
    counts = sorted({max(1, round(workload.output_tokens * _NEXT_RAY**at)) for at in range(-n, n + 1)})
    found = dict[float, Capacities]()
    for output_tokens in counts:
        lengths = _Tilted(
            prompt=workload.prompt_tokens, output=output_tokens, mean_context=workload.mean_context
        )
        tilted = msgspec.structs.replace(
            workload, output_tokens=output_tokens, lengths=cast(Lengths, lengths), slo=Slo()
        )
        found[output_tokens / workload.output_tokens] = replace(capacities, workload=tilted)
    return found


def _corners(layouts: Layouts, team: Team, rays: Mapping[float, Layouts], roles: Set[Role]) -> list[_Corner]:
    """Those that no other is as good as in both."""
    prompts, outputs = _rate(layouts, team, "prefill"), _rate(layouts, team, "decode")
    found = set(_mixed_corners(team, rays, prompts, outputs))
    if "prefill" in roles:
        found.add((prompts, 0.0))
    if "decode" in roles:
        found.add((0.0, outputs))
    kept = list[_Corner]()
    for corner in sorted(found, reverse=True):
        if corner[1] > max((other[1] for other in kept), default=-1.0):
            kept.append(corner)
    return kept


def _mixed_corners(
    team: Team, rays: Mapping[float, Layouts], prompts: float, outputs: float
) -> Iterator[_Corner]:
    reached = [(_rate(layouts, team, "mixed"), ray) for ray, layouts in rays.items()]
    if any(rate for rate, _ in reached):
        for (first, _), (second, ray) in pairwise([(prompts, 0.0), *reached, (math.inf, 1.0)]):
            yield min(prompts, first), min(outputs, second * ray)


def _rate(layouts: Layouts, team: Team, role: Role) -> float:
    best = layouts.best(team, role)
    return 0.0 if best is None else best.requests_per_s * _ROUNDING
