"""No flapping while one link is half dead: what moves, how often, and whom it touches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest

from hexmesh.membership.outputs import BecameCoordinator, Output
from hexmesh.wire.control import ControlMessage
from tests.swarm.scenes import calm_mesh, leader_of
from tests.swarm.world import HORIZON_S, SIM_TIMERS, Habits, World, count_lease_moves

WATCHED_S = 60.0
LEASE_S = SIM_TIMERS.lease_s
SEEDS = range(10)
ENDS = ("coordinator to host", "host to coordinator", "host to host")

IsDead = Callable[[World], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What happened while messages from `src` to `dst` were lost."""

    ends: tuple[str, str]
    moves: list[tuple[float, str, str]]
    """(time, host, new holder)."""
    stands: list[tuple[float, str]]
    """(time, host that became coordinator)."""

    def n_moves(self) -> dict[str, int]:
        """Lease moves of every host that had any."""
        hosts = [host for _, host, _ in self.moves]
        return {host: hosts.count(host) for host in hosts}


def lose_one_way(seed: int, ends: str, is_dead: IsDead) -> Watched:
    """A calm mesh of 3 to 9 hosts in which one link loses messages in one direction when `is_dead`."""
    world = calm_mesh(seed, 3 + seed % 7, Habits(request_every_s=None))
    leader = leader_of(world).name
    one, other = (host.name for host in world.alive()[:3] if host.name != leader)
    src, dst = {ENDS[0]: (leader, one), ENDS[1]: (one, leader), ENDS[2]: (one, other)}[ends]

    def lose(a: str, b: str, _: ControlMessage) -> float | None:
        return HORIZON_S if (a, b) == (src, dst) and is_dead(world) else None

    stands: list[tuple[float, str]] = []

    def observe(now_s: float, host: str, output: Output) -> None:
        if isinstance(output, BecameCoordinator):
            stands.append((now_s, host))

    moves = count_lease_moves(world)
    world.message_hook = lose
    world.observers.append(observe)
    world.run_until(world.now_s + WATCHED_S)
    return Watched(ends=(src, dst), moves=moves, stands=stands)


def is_always_dead(_: World) -> bool:
    return True


def loses_most(world: World) -> bool:
    return world.rng.random() < 0.8


def flickers(world: World) -> bool:
    """Three seconds dead, three alive."""
    return world.now_s % 6 < 3


@pytest.mark.parametrize("ends", ENDS)
def test_a_link_dead_one_way_moves_one_lease_once(ends: str) -> None:
    for seed in SEEDS:
        watched = lose_one_way(seed, ends, is_always_dead)
        assert len(watched.moves) <= 1, f"seed={seed}: {watched.moves}"
        assert len(watched.stands) <= 1, f"seed={seed}: {watched.stands}"


@pytest.mark.parametrize("is_dead", [loses_most, flickers])
@pytest.mark.parametrize("ends", ENDS)
def test_a_link_that_comes_and_goes_moves_no_more_than_a_lease_a_lease_time(
    ends: str, is_dead: IsDead
) -> None:
    """The lease of a host at its end at that; and nobody stands twice within a lease."""
    for seed in SEEDS:
        watched = lose_one_way(seed, ends, is_dead)
        n_moves = watched.n_moves()
        assert set(n_moves) <= set(watched.ends), f"seed={seed}"
        assert max(n_moves.values(), default=0) <= WATCHED_S / LEASE_S, f"seed={seed}: {n_moves}"
        gaps_s = [later - sooner for (sooner, _), (later, _) in pairwise(watched.stands)]
        assert min(gaps_s, default=LEASE_S) >= 0.9 * LEASE_S, f"seed={seed}: {watched.stands}"
