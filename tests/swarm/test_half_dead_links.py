"""No flapping while one link is half dead: what moves, how often, and whom it touches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from hexmesh.membership.outputs import BecameCoordinator, Output, PlanWanted
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import ControlMessage
from tests.swarm.scenes import calm_mesh, leader_of
from tests.swarm.schedule import HEALS_WITHIN_S, is_whole
from tests.swarm.world import HORIZON_S, SIM_TIMERS, Habits, World, count_lease_moves

WATCHED_S = 60.0
LEASE_S = SIM_TIMERS.lease_s
SEEDS = range(10)
LONG_SEEDS = range(5)
FLAPPING_S = 180.0
MOST_PLANS_A_MINUTE = 8
AS_SET = Timers()
DAMPED = replace(
    SIM_TIMERS,
    flap_window_s=AS_SET.flap_window_s,
    flap_s=AS_SET.flap_s,
    flap_max_s=AS_SET.flap_max_s,
)
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
    plans: list[tuple[float, int]]
    """(time, number of hosts) of every plan for more than the planning host alone."""

    def n_moves(self) -> dict[str, int]:
        """Lease moves of every host that had any."""
        hosts = [host for _, host, _ in self.moves]
        return {host: hosts.count(host) for host in hosts}


def lose_one_way(
    seed: int, ends: str, is_dead: IsDead, *, timers: Timers = SIM_TIMERS, watched_s: float = WATCHED_S
) -> Watched:
    """A calm mesh of 3 to 9 hosts in which one link loses messages in one direction when `is_dead`."""
    world = calm_mesh(seed, 3 + seed % 7, Habits(timers=timers, request_every_s=None))
    leader = leader_of(world).name
    one, other = (host.name for host in world.alive()[:3] if host.name != leader)
    src, dst = {ENDS[0]: (leader, one), ENDS[1]: (one, leader), ENDS[2]: (one, other)}[ends]

    def lose(a: str, b: str, _: ControlMessage) -> float | None:
        return HORIZON_S if (a, b) == (src, dst) and is_dead(world) else None

    stands: list[tuple[float, str]] = []
    plans: list[tuple[float, int]] = []
    start_s = world.now_s

    def observe(now_s: float, host: str, output: Output) -> None:
        if isinstance(output, BecameCoordinator):
            stands.append((now_s, host))
        elif isinstance(output, PlanWanted) and len(output.hosts) > 1:
            plans.append((now_s - start_s, len(output.hosts)))

    moves = count_lease_moves(world)
    world.message_hook = lose
    world.observers.append(observe)
    world.run_until(start_s + watched_s)
    return Watched(ends=(src, dst), moves=moves, stands=stands, plans=plans)


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


@pytest.mark.parametrize("is_dead", [loses_most, flickers])
@pytest.mark.parametrize("ends", ENDS)
def test_a_link_that_comes_and_goes_changes_few_plans(ends: str, is_dead: IsDead) -> None:
    """With the damping as daemons have it: a handful in the first minute, hardly any later."""
    for seed in LONG_SEEDS:
        watched = lose_one_way(seed, ends, is_dead, timers=DAMPED, watched_s=FLAPPING_S)
        by_minute = Counter(int(time_s // 60) for time_s, _ in watched.plans)
        assert max(by_minute.values(), default=0) <= MOST_PLANS_A_MINUTE, f"seed={seed}: {watched.plans}"
        assert by_minute[1] + by_minute[2] <= MOST_PLANS_A_MINUTE, f"seed={seed}: {watched.plans}"


def test_a_host_whose_link_works_again_is_planned_with_again() -> None:
    """Within the longest time that it may be left out, and not before it stayed for a while."""
    for seed in LONG_SEEDS:
        world = calm_mesh(seed, 3 + seed % 7, Habits(timers=DAMPED, request_every_s=None))
        leader = leader_of(world).name
        one = next(host.name for host in world.alive() if host.name != leader)
        ends_s = world.now_s + WATCHED_S

        def lose(a: str, b: str, _: ControlMessage, one: str = one, ends_s: float = ends_s) -> float | None:
            return HORIZON_S if a == one and world.now_s < ends_s and flickers(world) else None  # noqa: B023

        world.message_hook = lose
        world.run_until(ends_s + 2.0)
        assert not is_whole(world), f"seed={seed}: back at once"
        whole_s = world.run_until_true(lambda: is_whole(world), ends_s + DAMPED.flap_max_s + HEALS_WITHIN_S)  # noqa: B023
        assert whole_s is not None, f"seed={seed}: left out for good"
