"""Moves on partitions: no device comes from nowhere, none is lost, and hosts do only what they may."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.planner.changes import Changes, Grouped, Nearby
from hexmesh.planner.moves import halved, handful, idle, joined, torn, without
from hexmesh.planner.pools import ROLES, Team
from tests.unit.planner.fleets import pools_like

TEAMS = st.dictionaries(st.integers(0, 6), st.integers(1, 9), min_size=1).map(
    lambda counts: tuple(sorted(counts.items()))
)


@given(TEAMS, TEAMS)
def test_joining_and_taking_away_are_opposites(a: Team, b: Team) -> None:
    assert without(joined(a, b), b) == a


@given(TEAMS, st.integers(0, 99))
def test_parts_of_a_team_are_the_team(team: Team, seed: int) -> None:
    rng = random.Random(seed)
    for parts in (halved(team), torn(team, rng)):
        assert joined(*parts) == team
        assert all(n > 0 for part in parts for _, n in part)
    taken = handful(team, rng)
    assert joined(taken, without(team, taken)) == team


def _state(rng: random.Random, whole: Team) -> tuple[list[Grouped], Team]:
    """Devices dealt out to teams at random, some of them to none."""
    counts = [Counter[int]() for _ in range(rng.randint(1, 5))]
    for pool, n in whole:
        for _ in range(n):
            if rng.random() < 0.9:
                rng.choice(counts)[pool] += 1
    teams = [(tuple(sorted(own.items())), rng.choice(ROLES)) for own in counts if own]
    return teams, idle(whole, (team for team, _ in teams))


@pytest.mark.parametrize("seed", range(20))
def test_changes_share_out_the_same_devices(seed: int) -> None:
    rng = random.Random(seed)
    pools = pools_like([rng.randint(1, 8) for _ in range(rng.randint(1, 6))])
    nearby = Nearby(pools)
    teams, spare = _state(rng, nearby.whole)
    changes = Changes(pools, frozenset(ROLES), teams, spare)
    drawn = [change for _ in range(400) if (change := changes.draw(nearby, rng)) is not None]
    assert len(drawn) > 100 or not teams
    for change in drawn:
        kept = [team for at, (team, _) in enumerate(teams) if at not in change.gone]
        come = [team for team, _ in change.come]
        left = Counter(dict(nearby.whole))
        left.subtract(Counter(dict(joined(*kept, *come))))
        assert min(left.values()) >= 0
        assert all(n > 0 for team in come for _, n in team)
        assert len(set(change.gone)) == len(change.gone)
