"""All ways to form teams from counted devices: multisets of teams, devices left over allowed.

Devices of a pool cannot be told apart, so teams are vectors of counts, and each multiset is met once: teams are taken
in a fixed order, never going back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from hexmesh.planner.pools import Team

Counts = tuple[int, ...]
"""Devices by pool."""


def teams_within(sizes: Counts) -> Iterator[Team]:
    """Every team that the pools have devices for, the largest first."""
    every = product(*(range(size + 1) for size in sizes))
    for counts in sorted(every, key=lambda counts: (-sum(counts), counts)):
        if any(counts):
            yield tuple((pool, count) for pool, count in enumerate(counts) if count)


def n_teams_within(sizes: Counts) -> int:
    """How many those are."""
    found = 1
    for size in sizes:
        found *= size + 1
    return found - 1


def partitions(sizes: Counts, teams: Sequence[Team]) -> Iterator[tuple[int, ...]]:
    """Every non-empty multiset of `teams`, by rising index, that the pools have devices for."""
    yield from _further(list(sizes), teams, 0, ())


def _further(
    left: list[int], teams: Sequence[Team], first: int, taken: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    for at in range(first, len(teams)):
        if all(left[pool] >= count for pool, count in teams[at]):
            for pool, count in teams[at]:
                left[pool] -= count
            yield (*taken, at)
            yield from _further(left, teams, at, (*taken, at))
            for pool, count in teams[at]:
                left[pool] += count
