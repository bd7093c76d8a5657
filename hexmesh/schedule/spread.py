"""Among drafts that are about as good: more replicas, then fewer devices.

Measured speeds repeat to a few per cent, so rates that differ by less say nothing. A mesh with more replicas loses less
when a node dies, and a device that gains nothing is better left as a spare. From the best draft on, a mixed replica is
split in two (with what lies idle), as long as the rate of all stays within TOLERANCE of the best; then devices are
taken out on the same terms. Replicas of one phase are left alone: their numbers are balanced against each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Team, team_of
from hexmesh.planner.problem import Draft, Judged, Problem

TOLERANCE = 0.01
_MOST_SPLITS = 300
"""Ways to split one replica; with more, it is left whole."""


def spread(problem: Problem, best: Judged, tolerance: float = TOLERANCE) -> Judged:
    """A draft about as good as the best, of more replicas or fewer devices; `best` itself if there is none."""
    least = best.flow.requests_per_s * (1 - tolerance)
    for variants in (_splits, _shorter):
        chosen: Judged | None = best
        while chosen is not None:
            best = chosen
            judged = (problem.judge(draft) for draft in variants(problem, best.draft))
            good = [one for one in judged if one.flow.requests_per_s >= least]
            chosen = max(good, key=lambda one: one.flow.requests_per_s, default=None)
    return best


def _splits(problem: Problem, draft: Draft) -> Iterator[Draft]:
    """Drafts with one replica more."""
    idle = _idle(problem, draft)
    for at, layout in enumerate(draft):
        if layout.role != "mixed":
            continue
        counts = Counter(dict(team_of(layout.parts)))
        counts.update(idle)
        ways = _halves(dict(counts))
        for first, second in ways:
            pair = problem.layouts.best(first, "mixed"), problem.layouts.best(second, "mixed")
            if pair[0] is not None and pair[1] is not None:
                yield (*draft[:at], pair[0], pair[1], *draft[at + 1 :])


def _halves(counts: dict[int, int]) -> list[tuple[Team, Team]]:
    """The ways to deal out devices to two teams; none if there are too many."""
    pools = sorted(counts)
    n_ways = 1
    for pool in pools:
        n_ways *= counts[pool] + 1
    if n_ways > 2 * _MOST_SPLITS:
        return []
    found = []
    for taken in product(*(range(counts[pool] + 1) for pool in pools)):
        left = tuple(counts[pool] - n for pool, n in zip(pools, taken, strict=True))
        if any(taken) and taken <= left:
            found.append((_team(pools, taken), _team(pools, left)))
    return found


def _team(pools: list[int], counts: tuple[int, ...]) -> Team:
    return tuple((pool, n) for pool, n in zip(pools, counts, strict=True) if n)


def _shorter(problem: Problem, draft: Draft) -> Iterator[Draft]:
    """Drafts with one device less in one replica."""
    for at, layout in enumerate(draft):
        if layout.role != "mixed":
            continue
        team = team_of(layout.parts)
        for pool, _ in team:
            fewer = tuple((one, n - (one == pool)) for one, n in team if n > (one == pool))
            shorter = problem.layouts.best(fewer, "mixed") if fewer else None
            if shorter is not None:
                yield (*draft[:at], shorter, *draft[at + 1 :])


def _idle(problem: Problem, draft: tuple[Layout, ...]) -> Counter[int]:
    left = Counter(dict(problem.whole))
    for layout in draft:
        left.subtract(dict(team_of(layout.parts)))
    return +left
