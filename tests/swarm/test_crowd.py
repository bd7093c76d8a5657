"""A hundred nodes on the virtual clock: they elect, get over a death, and are quiet. `-s` shows the figures."""

from __future__ import annotations

from collections import Counter

from tests.swarm.scenes import CALM, FailOver, has_all_leases, leader_of
from tests.swarm.schedule import is_whole
from tests.swarm.world import Habits, World, count_lease_moves, count_messages

N_HOSTS = 100
QUIET_S = 60.0


def test_a_hundred_nodes_elect_replan_and_stay_quiet() -> None:
    world = World(1, N_HOSTS, Habits(request_every_s=None, listen_s=(0.0, 1.0)))
    world.weather = CALM
    sent, moves = count_messages(world), count_lease_moves(world)
    for name in world.hosts:
        world.at(world.rng.uniform(0, 0.5), world.boot, name)

    start = measure(world, sent, "cold start")
    assert start.leases_s < 8.0
    assert start.plan_s < 10.0

    world.run_until(world.now_s + 3)
    leader = leader_of(world)
    world.crash(next(host.name for host in world.alive() if host is not leader))
    assert measure(world, sent, "a host died").plan_s < 5.0
    assert leader_of(world) is leader

    world.crash(leader.name)
    assert measure(world, sent, "the coordinator died").plan_s < 8.0

    world.run_until(world.now_s + 5)
    n_moves, n_plans, before = len(moves), world.counts.n_plans, Counter(sent)
    world.run_until(world.now_s + QUIET_S)
    tell("quiet", QUIET_S, sent - before)
    assert is_whole(world)
    assert (len(moves), world.counts.n_plans) == (n_moves, n_plans)
    assert sum((sent - before).values()) / QUIET_S < 40 * N_HOSTS
    assert set(sent - before) <= {"Hello", "Beat", "Ack", "Nack"}


def measure(world: World, sent: Counter[str], what: str) -> FailOver:
    """Until one coordinator has all leases, and until all follow one plan."""
    start_s, before = world.now_s, Counter(sent)
    leases_s = world.run_until_true(lambda: has_all_leases(world), start_s + 20)
    plan_s = world.run_until_true(lambda: is_whole(world), start_s + 20)
    assert leases_s is not None, what
    assert plan_s is not None, what
    tell(f"{what}: leases {leases_s - start_s:.2f} s, plan", plan_s - start_s, sent - before)
    return FailOver(leases_s - start_s, plan_s - start_s)


def tell(what: str, length_s: float, sent: Counter[str]) -> None:
    by_kind = ", ".join(f"{kind} {n / length_s:.1f}" for kind, n in sent.most_common())
    print(f"{what} {length_s:.2f} s; {sum(sent.values()) / length_s:.0f} messages/s: {by_kind}")
