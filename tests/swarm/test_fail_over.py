"""How fast a calm mesh starts, and gets over the loss of a host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.swarm.scenes import CALM, calm_mesh, fail_over, leader_of
from tests.swarm.schedule import is_whole, time_to_whole
from tests.swarm.world import SIM_TIMERS, Habits, World

SHORT_LOAD_S = (0.01, 0.05)


def first_other_leader_s(seed: int, n_hosts: int, *, resets: bool) -> float:
    world = calm_mesh(seed, n_hosts, Habits(resets=resets))
    world.crash(leader_of(world).name)
    killed_s = world.now_s
    led_s = world.run_until_true(lambda: world.leader() is not None, killed_s + 20)
    assert led_s is not None, f"seed={seed}"
    return led_s - killed_s


@pytest.mark.parametrize(("resets", "limit_s"), [(False, 5.0), (True, 3.0)])
def test_a_killed_coordinator_is_replaced(resets: bool, limit_s: float) -> None:
    times_s = {seed: first_other_leader_s(seed, 2 + seed % 8, resets=resets) for seed in range(32)}
    assert {seed: time_s for seed, time_s in times_s.items() if time_s >= limit_s} == {}


@pytest.mark.parametrize(("resets", "p90_s"), [(False, 3.0), (True, 1.5)])
def test_all_leases_follow_the_next_coordinator(resets: bool, p90_s: float) -> None:
    overs = [
        fail_over(seed, 3 + seed % 7, kill_leader=True, resets=resets, load_s=SHORT_LOAD_S)
        for seed in range(40)
    ]
    assert sorted(over.leases_s for over in overs)[36] < p90_s
    assert max(over.plan_s for over in overs) < 6.0


def test_a_refused_connection_drops_a_dead_host_at_once() -> None:
    overs = [
        fail_over(seed, 3 + seed % 7, kill_leader=False, resets=True, load_s=SHORT_LOAD_S)
        for seed in range(20)
    ]
    assert max(over.leases_s for over in overs) <= 0.25
    assert max(over.plan_s for over in overs) < 2.5


@pytest.mark.parametrize(("n_hosts", "limit_s"), [(1, 3.5), (2, 4.0), (3, 4.5), (9, 5.5), (40, 9.0)])
def test_a_cold_start_leads_to_one_epoch(n_hosts: int, limit_s: float) -> None:
    for seed in range(10 if n_hosts < 10 else 1):
        world = World(seed, n_hosts, Habits(request_every_s=None))
        world.weather = CALM
        for name in world.hosts:
            world.at(world.rng.uniform(0, 0.5), world.boot, name)
        whole_s = time_to_whole(world, limit_s, 1.0)
        assert whole_s is not None, f"seed={seed} n_hosts={n_hosts}"


@pytest.mark.parametrize(("n_hosts", "limit_s"), [(1, 3.5), (3, 4.5), (9, 5.5)])
def test_a_host_listens_before_it_takes_part(n_hosts: int, limit_s: float) -> None:
    """As daemons do while they measure: the limit counts from when the last one is done."""
    listened_s = 4.0
    for seed in range(10):
        world = World(seed, n_hosts, Habits(request_every_s=None, listen_s=(0.0, listened_s)))
        world.weather = CALM
        for name in world.hosts:
            world.at(world.rng.uniform(0, 0.5), world.boot, name)
        whole_s = time_to_whole(world, 0.5 + listened_s + limit_s, 1.0)
        assert whole_s is not None, f"seed={seed} n_hosts={n_hosts}"


@pytest.mark.parametrize("keep_disk", [True, False])
def test_a_mesh_that_lost_all_hosts_at_once_starts_again(keep_disk: bool) -> None:
    for seed in range(8):
        world = calm_mesh(seed, 2 + seed, Habits(request_every_s=None, listen_s=(0.0, 1.0)))
        for name in world.hosts:
            world.crash(name)
        for name in world.hosts:
            world.boot(name, keep_disk=keep_disk)
        assert time_to_whole(world, 7.0, 1.0) is not None, f"seed={seed}"


def test_no_first_plan_before_enough_nodes_are_held() -> None:
    world = World(1, 3, Habits(min_nodes=3))
    world.boot("h0")
    world.boot("h1")
    world.run_until(10)
    assert [host.machine.committed for host in world.alive() if host.machine] == [None, None]
    world.boot("h2")
    assert world.run_until_true(lambda: is_whole(world), 16) is not None


@pytest.mark.parametrize("seed", range(8))
def test_a_calm_mesh_keeps_its_epoch(seed: int) -> None:
    world = calm_mesh(seed, 2 + seed)
    leader = leader_of(world)
    assert leader.machine is not None
    epoch, n_plans = leader.machine.committed, world.counts.n_plans
    world.run_until(world.now_s + 120)
    assert is_whole(world)
    assert (leader.machine.committed, world.counts.n_plans) == (epoch, n_plans)


@pytest.mark.parametrize("who", ["coordinator", "host"])
def test_a_leaving_host_is_planned_around_before_it_stops(who: str) -> None:
    world = calm_mesh(3, 4)
    leader = leader_of(world)
    other = next(host for host in world.alive() if host is not leader)
    leaver = leader if who == "coordinator" else other
    world.call(leaver, lambda m, t: m.leave(t))
    left_s = world.run_until_true(lambda: leaver.has_left, world.now_s + 10)
    assert left_s is not None
    world.crash(leaver.name)
    assert world.run_until_true(lambda: is_whole(world), world.now_s + 5) is not None
    assert leaver.name not in leader_of(world).machine.committed_hosts  # type: ignore[union-attr]


def test_a_hung_planner_does_not_hide_behind_a_beating_coordinator() -> None:
    world = calm_mesh(5, 4, Habits(timers=replace(SIM_TIMERS, plan_deadline_s=3.0)))
    hung = leader_of(world)
    world.hung.add(hung.name)
    world.crash(next(host.name for host in world.alive() if host is not hung))
    assert world.run_until_true(lambda: is_whole(world), world.now_s + 15) is not None
    assert leader_of(world) is not hung
