"""Schedules that broke naive rules; `test_mutations` shows that they still bite.

Rows are those of the table of counter-examples in docs/coordination.md.
"""

from __future__ import annotations

from hexmesh.membership.outputs import Committed, Output
from hexmesh.wire.control import Beat, CertMessage, ControlMessage, Header
from tests.swarm.scenes import calm_mesh, is_orphan, leader_of
from tests.swarm.schedule import time_to_whole
from tests.swarm.world import HORIZON_S, Habits, Host, Weather, World, count_lease_moves


def test_row_1_two_coordinators_that_share_hosts_leave_each_others_alone() -> None:
    world = World(1, 5, Habits(request_every_s=None))
    world.cut = {("h0", "h1"), ("h1", "h0"), ("h0", "h4"), ("h4", "h0")}
    moves = count_lease_moves(world)
    world.boot_all()
    world.run_until(40)
    n_early = len(moves)
    world.run_until(160)
    assert len(moves) == n_early
    assert [host.name for host in world.alive() if is_orphan(world, host)] == []


def strand_one_way(seed: int) -> list[str]:
    """A host's link to its coordinator goes dead one way; returns who is in nobody's plan 15 s later."""
    world = calm_mesh(seed, 4)
    leader = leader_of(world)
    host = next(host for host in world.alive() if host is not leader)
    world.cut.add((host.name, leader.name))
    world.run_until(world.now_s + 15)
    return [host.name for host in world.alive() if is_orphan(world, host)]


def test_row_2_a_host_that_its_coordinator_cannot_hear_is_not_stranded() -> None:
    assert [strand_one_way(seed) for seed in range(6)] == [[]] * 6


def reuse_names(seed: int) -> None:
    """Coordinator and one host start again without disks while the third serves the old plan, cut off."""
    world = calm_mesh(seed, 3, Habits(drift=0, request_every_s=0.02))
    leader = leader_of(world)
    old, other = [host for host in world.alive() if host is not leader]
    world.cut = {(leader.name, old.name), (old.name, leader.name)}
    for host in (leader, other):
        world.crash(host.name)
    for host in (leader, other):
        world.boot(host.name, keep_disk=False)
    world.run_until(world.now_s + 12)


def test_row_3_names_are_never_used_twice() -> None:
    for seed in range(10):
        reuse_names(seed)


def overtake(seed: int) -> float | None:
    """Every other beat is late by up to 1.5 s; hosts restart. Returns when the mesh was whole again."""
    world = World(seed, 4, Habits(request_every_s=None))

    def delay_beats(src: str, dst: str, message: ControlMessage) -> float | None:
        is_late = isinstance(message, Beat) and world.rng.random() < 0.5
        return world.rng.uniform(0.06, 1.5) if is_late else None

    world.message_hook = delay_beats
    world.boot_all()
    for time_s in range(5, 25, 4):
        name = world.rng.choice(sorted(world.hosts))
        world.at(time_s, world.crash, name)
        world.at(time_s + 1.0, world.boot, name)
    world.run_until(25)
    return time_to_whole(world, 10, 3)


def test_row_5_overtaken_beats_do_not_wedge_the_mesh() -> None:
    assert [seed for seed in range(20) if overtake(seed) is None] == []


def kill_after_first_commit(seed: int) -> float:
    """The coordinator decides, one host hears of it, the coordinator dies: how long do stages disagree?"""
    world = calm_mesh(seed, 5, Habits(resets=False))
    world.weather = Weather(loss=0.0, stall=0.0)
    leader = leader_of(world)
    confidant = next(host.name for host in world.alive() if host is not leader)
    survivors = [host for host in world.alive() if host is not leader]

    def only_to_confidant(src: str, dst: str, message: ControlMessage) -> float | None:
        if src != leader.name or dst == confidant:
            return None
        is_news = isinstance(message, CertMessage) or (isinstance(message, Beat) and message.prep is None)
        return HORIZON_S if is_news else None

    def kill(now_s: float, host: str, output: Output) -> None:
        if isinstance(output, Committed) and host == confidant:
            world.after(0, world.crash, leader.name)

    world.message_hook = only_to_confidant
    world.observers.append(kill)
    world.call(leader, lambda m, t: m.replan("operator", t))
    assert world.run_until_true(lambda: leader.machine is None, world.now_s + 10, 0.01) is not None
    start_s = world.now_s
    epoch = world.hosts[confidant].machine.committed  # type: ignore[union-attr]
    agreed_s = world.run_until_true(
        lambda: all(host.machine is not None and host.machine.committed == epoch for host in survivors),
        start_s + 5,
        0.01,
    )
    return (start_s + 5 if agreed_s is None else agreed_s) - start_s


def test_row_6_hosts_tell_each_other_of_a_commit() -> None:
    assert max(kill_after_first_commit(seed) for seed in range(10)) < 0.3


def late_certificate(seed: int) -> None:
    """The coordinator decides and dies unheard; its certificate comes to a host that is another's by then."""
    world = calm_mesh(seed, 4, Habits(request_every_s=None))
    leader = leader_of(world)
    assert leader.machine is not None
    first = leader.machine.committed

    def hide_news(src: str, dst: str, message: ControlMessage) -> float | None:
        known = message.cur if isinstance(message, Beat) else getattr(message, "cert", None)
        return HORIZON_S if known is not None and known.epoch != first else None

    world.message_hook = hide_news
    world.call(leader, lambda m, t: m.replan("operator", t))
    machine = leader.machine
    assert world.run_until_true(lambda: machine.committed != first, world.now_s + 10, 0.01) is not None
    cert = machine.cert
    assert cert is not None
    world.crash(leader.name)
    survivors = world.alive()

    def granted() -> list[Host]:
        return [
            host for host in survivors if host.machine and host.machine.coordinator not in (None, leader.name)
        ]

    assert world.run_until_true(lambda: bool(granted()), world.now_s + 10, 0.001) is not None
    for host in granted():
        header = Header(src=leader.name, boot=leader.boot, to_boot=host.boot, hears=True)
        world.deliver(host.name, CertMessage(header=header, cert=cert))


def test_row_7_a_certificate_is_not_obeyed_under_another_coordinator() -> None:
    for seed in range(6):
        late_certificate(seed)


def lone_host_returns(seed: int) -> tuple[bool, int]:
    """One of nine is cut off for 10 s. Returns whether the coordinator stayed, and the lease moves after."""
    world = calm_mesh(seed, 9)
    leader = leader_of(world)
    lone = world.rng.choice([host.name for host in world.alive() if host is not leader])
    world.split({lone})
    world.run_until(world.now_s + 10)
    moves = count_lease_moves(world)
    world.cut.clear()
    world.run_until(world.now_s + 8)
    others = {host for _, host, _ in moves} - {lone}
    return world.leader() is leader, len(others)


def test_row_9_a_lone_host_coming_back_moves_nobody_else() -> None:
    assert [lone_host_returns(seed) for seed in range(6)] == [(True, 0)] * 6
