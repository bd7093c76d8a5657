"""Ways for two teams to trade devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hexmesh.planner.pools import Team


def handed_over(giver: Team, taker: Team) -> Iterator[tuple[Team, Team]]:
    """One, two, four or all devices of each of the giver's pools move to the taker.

    One alone seldom helps: what is gained lies on the far side of "3 and 5" between two even splits.
    """
    for pool, n_there in giver:
        for n in sorted({1, 2, 4, n_there}):
            if n <= n_there:
                yield _changed(giver, {pool: -n}), _changed(taker, {pool: n})


def swapped(a: Team, b: Team) -> Iterator[tuple[Team, Team]]:
    """One device of each, of different pools, change places."""
    for mine, _ in a:
        for theirs, _ in b:
            if mine != theirs:
                yield _changed(a, {mine: -1, theirs: 1}), _changed(b, {mine: 1, theirs: -1})


def joined(a: Team, b: Team) -> Team:
    """The devices of both."""
    return _changed(a, dict(b))


def _changed(team: Team, by: dict[int, int]) -> Team:
    counts = Counter(dict(team))
    counts.update(by)
    return tuple(sorted((pool, n) for pool, n in counts.items() if n > 0))
