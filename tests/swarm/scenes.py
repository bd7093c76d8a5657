"""Scenes that several swarm tests set up: a calm mesh, a killed host, a graph of one-way links."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.swarm.schedule import is_whole, time_to_whole
from tests.swarm.world import Habits, Host, Weather, World, count_lease_moves

CALM = Weather(loss=0.005)


def calm_mesh(seed: int, n_hosts: int, habits: Habits = Habits()) -> World:  # noqa: B008
    """A mesh that started well: I8 holds."""
    world = World(seed, n_hosts, habits)
    world.weather = CALM
    for name in world.hosts:
        world.at(world.rng.uniform(0, 0.5), world.boot, name)
    assert time_to_whole(world, 15.0, 1.0) is not None, f"seed={seed}: no calm start"
    return world


def leader_of(world: World) -> Host:
    leader = world.leader()
    assert leader is not None
    return leader


def has_all_leases(world: World) -> bool:
    """One coordinator, and every live host leased to it by both accounts."""
    leader = world.leader()
    if leader is None or leader.machine is None:
        return False
    alive = world.alive()
    return leader.machine.held == {host.name: host.boot for host in alive} and all(
        host.machine is not None and host.machine.coordinator == leader.name for host in alive
    )


@dataclass(frozen=True, slots=True)
class FailOver:
    leases_s: float
    """Until one coordinator has all leases."""
    plan_s: float
    """Until all live hosts committed one epoch made for them."""


def fail_over(
    seed: int, n_hosts: int, *, kill_leader: bool, resets: bool, load_s: tuple[float, float]
) -> FailOver:
    """SIGKILL of the coordinator, or of another host, in a calm mesh."""
    world = calm_mesh(seed, n_hosts, Habits(resets=resets, load_s=load_s))
    leader = leader_of(world)
    others = [host.name for host in world.alive() if host is not leader]
    victim = leader.name if kill_leader else world.rng.choice(others)
    world.crash(victim)
    start_s = world.now_s
    leases_s = world.run_until_true(lambda: has_all_leases(world), start_s + 30)
    plan_s = world.run_until_true(lambda: is_whole(world), start_s + 30)
    assert leases_s is not None, f"seed={seed}: leases never settled"
    assert plan_s is not None, f"seed={seed}: never planned again"
    return FailOver(leases_s - start_s, plan_s - start_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    n_late_moves: int
    """Lease moves after `still_s`."""
    orphans: list[str]
    """Hosts that are in the plan of no coordinator that holds them."""


def settle_one_way_graph(
    seed: int, n_hosts: int, missing: float, *, still_s: float = 40.0, end_s: float = 100.0
) -> Settled:
    """A fixed random graph where a share `missing` of the directed links never works."""
    world = World(seed, n_hosts, Habits(request_every_s=None))
    rng = random.Random(seed)
    pairs = [(a, b) for a in world.hosts for b in world.hosts if a != b]
    world.cut = {pair for pair in pairs if rng.random() < missing}
    moves = count_lease_moves(world)
    for name in world.hosts:
        world.at(rng.uniform(0, 1), world.boot, name)
    world.run_until(end_s)
    return Settled(
        n_late_moves=sum(time_s > still_s for time_s, _, _ in moves),
        orphans=[host.name for host in world.alive() if is_orphan(world, host)],
    )


def is_orphan(world: World, host: Host) -> bool:
    """Whether no coordinator that holds the host has it in its plan."""
    machine = host.machine
    assert machine is not None
    if machine.coordinator is None:
        return True
    holder = world.hosts[machine.coordinator].machine
    return (
        holder is None
        or holder.held.get(host.name) != host.boot
        or machine.committed_hosts.get(host.name) != host.boot
        or machine.committed != holder.decided
    )
