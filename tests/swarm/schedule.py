"""Random schedules of faults, and how fast the mesh is whole again after them (I8)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec

from hexmesh.membership.coordination import Coordination
from tests.swarm.world import Counts, Habits, Host, PipelinePlan, Weather, World

HEALS_WITHIN_S = 12.0
"""The bound of I8: listening of up to 3 s and a pause that outlasts the faults by up to 6 s are inside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How much goes wrong, and for how long."""

    chaos_s: float = 25.0
    mean_gap_s: float = 1.2
    max_loss: float = 0.2
    max_duplication: float = 0.1
    pauses: bool = False
    heal_within_s: float = HEALS_WITHIN_S
    calm_s: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One schedule, all of it from its seed."""

    seed: int
    n_hosts: int
    faults: Faults
    habits: Habits

    @classmethod
    def draw(cls, seed: int) -> Case:
        """2 to 9 hosts; gentle or hard faults; pauses in a quarter; in half, hosts listen before they take part.

        In a quarter, what cannot go straight is relayed.
        In another half, plans say who has no part in them.
        """
        rng = random.Random(f"case {seed}")
        return cls(
            seed=seed,
            n_hosts=2 + seed % 8,
            faults=Faults(mean_gap_s=rng.choice([1.2, 1.2, 0.6, 0.3]), pauses=rng.random() < 0.25),
            habits=Habits(
                drift=rng.choice([0.0, 0.03, 0.1, 0.2]),
                listen_s=rng.choice([None, (0.0, 3.0)]),
                resets=rng.random() < 0.25,
                relays=rng.random() < 0.25,
                has_idle_hosts=rng.random() < 0.5,
            ),
        )

    def run(self) -> Outcome:
        return run_schedule(self.seed, self.n_hosts, self.faults, self.habits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    n_hosts: int
    healed_s: float | None
    """From the end of the faults until I8 held and stayed; None if it never did."""
    counts: Counts


def is_whole(world: World) -> bool:
    """I8: one coordinator, all leases, and one epoch of all live hosts on all of them."""
    leader = world.leader()
    alive = world.alive()
    if leader is None or leader.machine is None:
        return False
    boots = {host.name: host.boot for host in alive}
    machine = leader.machine
    if machine.committed is None or machine.decided != machine.committed or machine.held != boots:
        return False
    if not _suits(world, machine, boots):
        return False
    return all(
        host.machine is not None
        and host.machine.coordinator == leader.name
        and host.machine.committed == machine.committed
        for host in alive
    )


def _suits(world: World, machine: Coordination, boots: dict[str, int]) -> bool:
    """Whether the committed plan is for exactly these hosts, or lacks only hosts that had no part in it."""
    hosts = machine.committed_hosts
    if hosts == boots:
        return True
    assert machine.committed_plan is not None
    plan = msgspec.msgpack.decode(machine.committed_plan, type=PipelinePlan)
    return world.habits.has_idle_hosts and set(plan.stages) <= boots.keys() and boots.items() <= hosts.items()


def time_to_whole(world: World, within_s: float, calm_s: float) -> float | None:
    """Seconds from now until I8 holds and stays for `calm_s`; None if not within `within_s`."""
    start_s = world.now_s
    whole_since_s: float | None = None
    while world.now_s < start_s + within_s + calm_s:
        if not is_whole(world):
            whole_since_s = None
        elif whole_since_s is None:
            whole_since_s = world.now_s
        elif world.now_s - whole_since_s >= calm_s:
            return whole_since_s - start_s
        world.run_until(world.now_s + 0.05)
    return None


def run_schedule(
    seed: int,
    n_hosts: int,
    faults: Faults = Faults(),
    habits: Habits = Habits(),  # noqa: B008
) -> Outcome:
    """Faults for a while, then heal. Raises ViolationError with the seed when an invariant breaks."""
    world = World(seed, n_hosts, habits)
    world.weather = random_weather(world, faults)
    for name in world.hosts:
        world.at(world.rng.uniform(0, 1.5), world.boot, name)
    time_s = 1.5
    while time_s < faults.chaos_s:
        world.at(time_s, strike, world, faults)
        time_s += world.rng.expovariate(1 / faults.mean_gap_s)
    world.run_until(faults.chaos_s)
    heal(world)
    healed_s = time_to_whole(world, faults.heal_within_s, faults.calm_s)
    return Outcome(seed=seed, n_hosts=n_hosts, healed_s=healed_s, counts=world.counts)


def heal(world: World) -> None:
    """All hosts up, all links there, hardly any loss."""
    world.cut.clear()
    world.weather = Weather(loss=0.005)
    for host in world.alive():
        if host.machine is not None and host.machine.is_leaving:
            world.crash(host.name)
    for name in world.hosts:
        world.boot(name, keep_disk=world.rng.random() < 0.5)


def random_weather(world: World, faults: Faults) -> Weather:
    rng = world.rng
    return Weather(
        loss=rng.choice([0.0, 0.01, rng.uniform(0, faults.max_loss)]),
        duplication=rng.choice([0.0, rng.uniform(0, faults.max_duplication)]),
    )


def strike(world: World, faults: Faults) -> None:
    """One random fault, or the repair of one."""
    rng = world.rng
    names = sorted(world.hosts)
    acts: list[tuple[float, Any]] = [
        (3, lambda: world.crash(rng.choice(names))),
        (5, lambda: _restart_one(world)),
        (2, lambda: _kill_leader(world)),
        (3, lambda: world.cut.add((rng.choice(names), rng.choice(names)))),
        (2, lambda: world.split(set(rng.sample(names, rng.randint(1, len(names)))))),
        (3, world.cut.clear),
        (2, lambda: setattr(world, "weather", random_weather(world, faults))),
        (1, lambda: _force(world)),
        (1, lambda: _leave_one(world)),
    ]
    if faults.pauses:
        acts.append((2, lambda: world.pause(rng.choice(names), rng.uniform(0.5, 6.0))))
    rng.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()


def _restart_one(world: World) -> None:
    dead = [name for name, host in world.hosts.items() if host.machine is None]
    if dead:
        world.boot(world.rng.choice(dead), keep_disk=world.rng.random() < 0.6)


def _kill_leader(world: World) -> None:
    leader = world.leader()
    if leader is not None:
        world.crash(leader.name)


def _leave_one(world: World) -> None:
    """A host says that it leaves, and stops a while later, whether or not it was told that it may."""
    awake = [host for host in world.alive() if host.paused_until_s <= world.now_s]
    if awake:
        host = world.rng.choice(awake)
        world.call(host, lambda m, t: m.leave(t))
        world.after(world.rng.uniform(0.5, 5.0), _stop, world, host, host.life)


def _stop(world: World, host: Host, life: int) -> None:
    if host.life == life:
        world.crash(host.name)


def _force(world: World) -> None:
    alive = world.alive()
    if alive:
        world.call(world.rng.choice(alive), lambda m, t: m.replan("operator", t))
