"""What local searches do to partitions of devices into teams. No move makes a device, or loses one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

from hexmesh.planner.pools import Pool, Team

STRIDES = (1, 2, 4)
"""Devices of a pool that are moved at once, beside all of them: single moves do not get from TP groups of 3 and 5 to
two of 4."""


def joined(*teams: Team) -> Team:
    """All their devices."""
    counts = Counter[int]()
    for team in teams:
        counts.update(dict(team))
    return tuple(sorted(counts.items()))


def without(team: Team, taken: Team) -> Team:
    """What is left of a team that has all of `taken`."""
    counts = dict(team)
    for pool, n in taken:
        counts[pool] -= n
    return tuple((pool, n) for pool, n in sorted(counts.items()) if n)


def halved(team: Team) -> tuple[Team, Team]:
    """Half of each pool, rounded down, and the rest."""
    half = tuple((pool, n // 2) for pool, n in team if n >= 2)
    return half, without(team, half)


def torn(team: Team, rng: random.Random) -> tuple[Team, Team]:
    """Cut between two of its pools, in their order; a team of one pool anywhere."""
    if len(team) > 1:
        at = rng.randrange(1, len(team))
        return team[:at], team[at:]
    pool, n = team[0]
    first = rng.randrange(1, n) if n > 1 else 0
    return (((pool, first),), ((pool, n - first),)) if first else ((), team)


def handful(team: Team, rng: random.Random) -> Team:
    """Some of one of its pools, drawn by devices: a stride or all."""
    return some_of(pool_of_any(team, rng), team, rng)


def some_of(pool: int, team: Team, rng: random.Random) -> Team:
    """A stride of a pool that the team has, or all of it."""
    n = dict(team)[pool]
    return ((pool, rng.choice([*(stride for stride in STRIDES if stride < n), n])),)


def pool_of_any(team: Team, rng: random.Random) -> int:
    """The pool of one of its devices, all equally likely."""
    at = rng.randrange(sum(n for _, n in team))
    for pool, n in team:
        if at < n:
            return pool
        at -= n
    raise AssertionError


def room_bytes(team: Team, pools: tuple[Pool, ...]) -> int:
    """Memory of all its devices."""
    return sum(n * pools[pool].device.budget_bytes for pool, n in team)


def idle(whole: Team, teams: Iterable[Team]) -> Team:
    """What no team has."""
    return without(whole, joined(*teams))
