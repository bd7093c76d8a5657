"""A mesh of real coordination machines on a virtual clock and a fake network, judged after every event.

`World` is the driver that a daemon would be: it carries out outputs, loads plans after a while, plans (each
time other pipelines, the worst case for mixing), and runs requests through them. `judge` holds I1 to I7.
All randomness comes from one seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hexmesh.membership.coordination import Coordination
from hexmesh.membership.outputs import (
    Accepted,
    Committed,
    CoordinatorChanged,
    DropPrepared,
    LeaveComplete,
    Output,
    PersistTerm,
    PlanEnvelope,
    PlanWanted,
    ReleaseDraining,
    Send,
    StartPrepare,
)
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import Cert, ControlMessage, Epoch
from tests.swarm.judge import Judge

SIM_TIMERS = Timers(
    prep_timeout_s=8.0, quarantine_s=5.0, drain_s=3.0, flap_window_s=10.0, flap_s=0.5, flap_max_s=4.0
)
HORIZON_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What the network does to a message; the times are seconds."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.06)
    stall: float = 0.02
    stall_s: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How the hosts and their driver behave."""

    timers: Timers = SIM_TIMERS
    load_s: tuple[float, float] = (0.2, 1.0)
    plan_s: tuple[float, float] = (0.02, 0.15)
    drift: float = 0.03
    resets: bool = False
    """Whether a killed host's peers see their connection reset and a redial refused."""
    listen_s: tuple[float, float] | None = None
    """How long a host that starts only listens, as a daemon does while it measures; None: not at all."""
    min_nodes: int = 1
    relays: bool = False
    """Whether a control message whose link is cut goes through a third host, as over a relayed connection."""
    has_idle_hosts: bool = False
    """Whether a plan says which hosts have no part in it; it is then kept when they go."""
    request_every_s: float | None = 0.1
    n_steps: int = 3


class PipelinePlan(msgspec.Struct, frozen=True):
    """What the fake planner encodes: requests pass `stages` in order; `salt` tells plan objects apart."""

    stages: tuple[str, ...]
    hosts: dict[str, int]
    salt: int


@dataclass(slots=True)
class Host:
    """One machine room slot: what survives a restart, and the daemon that runs in it, if any."""

    name: str
    rate: float
    offset_s: float
    machine: Coordination | None = None
    boot: int = 0
    life: int = 0
    """Counts the starts; the world's own name for one run, also where boots are switched off."""
    disk_term: int = 0
    wake_s: float = HORIZON_S
    paused_until_s: float = 0.0
    takes_part: bool = True
    plans: dict[Epoch, bytes] = field(default_factory=dict)
    sequences: dict[tuple[int, int], Epoch] = field(default_factory=dict)
    loaded: set[Epoch] = field(default_factory=set)
    has_left: bool = False

    def local_s(self, now_s: float) -> float:
        return self.offset_s + self.rate * now_s

    def world_s(self, local_s: float) -> float:
        return (local_s - self.offset_s) / self.rate


@dataclass(slots=True)
class Attempt:
    """One attempt of a request: all stages that touch it must use one plan (I5)."""

    request: int
    number: int
    epoch: Epoch
    cert: Cert
    driver: str
    driver_life: int
    stages: tuple[str, ...]


@dataclass(slots=True)
class Counts:
    n_events: int = 0
    n_messages: int = 0
    n_commits: int = 0
    n_finished: int = 0
    n_requests: int = 0
    n_plans: int = 0


Observer = Callable[[float, str, Output], None]


class World:
    """Owner of the clock, the network and the hosts of one schedule."""

    def __init__(self, seed: int, n_hosts: int, habits: Habits = Habits()) -> None:
        self.rng = random.Random(seed)
        self.habits = habits
        self.weather = Weather()
        self.now_s = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.hung: set[str] = set()
        """Hosts whose planner never answers."""
        self.counts = Counts()
        self.judge = Judge(seed)
        self.observers: list[Observer] = []
        self.message_hook: Callable[[str, str, ControlMessage], float | None] | None = None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._n_pushed = 0
        self._n_boots = 0
        drift = habits.drift
        self.hosts = {
            name: Host(name, 1 + self.rng.uniform(-drift, drift), self.rng.uniform(0, 1000))
            for name in (f"h{i}" for i in range(n_hosts))
        }
        if habits.request_every_s is not None:
            self.at(1.0, self._new_request)

    # --- the clock ---

    def at(self, time_s: float, act: Callable[..., None], *args: Any) -> None:
        self._n_pushed += 1
        heapq.heappush(self._heap, (time_s, self._n_pushed, act, args))

    def after(self, delay_s: float, act: Callable[..., None], *args: Any) -> None:
        self.at(self.now_s + delay_s, act, *args)

    def run_until(self, end_s: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end_s:
            self.now_s, _, act, args = heapq.heappop(heap)
            self.counts.n_events += 1
            act(*args)
        self.now_s = end_s

    def run_until_true(self, claim: Callable[[], bool], end_s: float, step_s: float = 0.05) -> float | None:
        """The time when `claim` first held, looked at every `step_s`; None if it never did."""
        while self.now_s < end_s:
            if claim():
                return self.now_s
            self.run_until(min(end_s, self.now_s + step_s))
        return self.now_s if claim() else None

    # --- hosts ---

    def boot(self, name: str, *, keep_disk: bool = True) -> None:
        host = self.hosts[name]
        if host.machine is not None:
            return
        if not keep_disk:
            host.disk_term = 0
        self._n_boots += 1
        host.life = self._n_boots
        host.boot = self._draw_boot()
        host.takes_part = self.habits.listen_s is None
        host.plans, host.sequences, host.loaded, host.has_left = {}, {}, set(), False
        host.machine = Coordination(
            name,
            host.boot,
            rank=0,
            timers=self.habits.timers,
            sign=lambda payload: name.encode() + payload,
            verify=lambda node, payload, signature: signature == node.encode() + payload,
            highest_term_seen=host.disk_term,
            rng=random.Random(self.rng.random()),
            now_s=host.local_s(self.now_s),
            min_nodes=self.habits.min_nodes,
            takes_part=host.takes_part,
        )
        self.judge.note_boot(host)
        for other in self.hosts:
            if other != name:
                self._introduce(host, other)
        if self.habits.listen_s is not None:
            self.after(self.rng.uniform(*self.habits.listen_s), self._take_part, host, host.life)
        self._plan_wake(host)

    def _introduce(self, host: Host, other: str) -> None:
        self.call(host, lambda m, t: m.peer_reachable(other, t))

    def _draw_boot(self) -> int:
        return self._n_boots * 1000 + self.rng.randrange(1000)

    def _take_part(self, host: Host, life: int) -> None:
        if host.life == life and host.machine is not None:
            host.takes_part = True
            self.call(host, Coordination.take_part)

    def boot_all(self) -> None:
        for name in self.hosts:
            self.boot(name)

    def crash(self, name: str) -> None:
        host = self.hosts[name]
        if host.machine is None:
            return
        host.machine = None
        host.wake_s = HORIZON_S
        if self.habits.resets:
            for other in self.hosts.values():
                if other is not host and (name, other.name) not in self.cut:
                    self.after(self.rng.uniform(0.01, 0.1), self._refuse, other.name, other.life, name)

    def _refuse(self, name: str, life: int, gone: str) -> None:
        host = self.hosts[name]
        if host.life == life and self.hosts[gone].machine is None:
            self.call(host, lambda m, t: m.connection_refused(gone, t))

    def pause(self, name: str, length_s: float) -> None:
        """SIGSTOP, and SIGCONT later: what arrives in between waits."""
        host = self.hosts[name]
        host.paused_until_s = max(host.paused_until_s, self.now_s + length_s)

    def alive(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.machine is not None]

    def leader(self) -> Host | None:
        """The coordinator, if there is exactly one."""
        leaders = [host for host in self.alive() if host.machine is not None and host.machine.is_coordinator]
        return leaders[0] if len(leaders) == 1 else None

    # --- driving a machine ---

    def call(
        self,
        host: Host,
        act: Callable[[Coordination, float], list[Output]],
        message: ControlMessage | None = None,
    ) -> None:
        machine = host.machine
        if machine is None:
            return
        if host.paused_until_s > self.now_s:
            self.at(host.paused_until_s + 1e-4, self._call_later, host, host.life, act, message)
            return
        promised = machine.promised
        outputs = act(machine, host.local_s(self.now_s))
        self._carry_out(host, outputs)
        self.judge.check(host, promised, message, outputs)
        self._plan_wake(host)

    def _call_later(self, host: Host, life: int, act: Any, message: ControlMessage | None) -> None:
        if host.life == life:
            self.call(host, act, message)

    def _plan_wake(self, host: Host) -> None:
        machine = host.machine
        if machine is None:
            return
        wake_s = host.world_s(machine.next_wakeup_s(host.local_s(self.now_s)))
        wake_s = max(wake_s + 1e-4, self.now_s + 1e-3)
        if wake_s < host.wake_s - 1e-3:
            host.wake_s = wake_s
            self.at(wake_s, self._wake, host, host.life, wake_s)

    def _wake(self, host: Host, life: int, wake_s: float) -> None:
        if host.life != life or host.machine is None or host.wake_s != wake_s:
            return
        host.wake_s = HORIZON_S
        self.call(host, Coordination.tick)

    def _carry_out(self, host: Host, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Send():
                    self._send(host.name, output.to, output.message)
                case PlanWanted():
                    self.after(self.rng.uniform(*self.habits.plan_s), self._plan, host, host.life, output)
                case StartPrepare():
                    host.plans[output.epoch] = output.plan
                    host.loaded.add(output.epoch)
                    self.after(self._load_s(host), self._loaded, host, host.life, output.epoch)
                case DropPrepared():
                    host.loaded.discard(output.epoch)
                case Committed():
                    self.counts.n_commits += 1
                    if output.draining is not None:
                        self.after(self.rng.uniform(0.2, 4.0), self._drain, host, host.life, output.draining)
                case ReleaseDraining():
                    host.loaded.discard(output.epoch)
                    self._forget_sequences(host, output.epoch)
                case PersistTerm():
                    host.disk_term = output.term
                case LeaveComplete():
                    host.has_left = True
                case _:
                    pass
        if self.observers:
            for output in outputs:
                for observe in self.observers:
                    observe(self.now_s, host.name, output)

    def _load_s(self, host: Host) -> float:
        return self.rng.uniform(*self.habits.load_s)

    def _loaded(self, host: Host, life: int, epoch: Epoch) -> None:
        if host.life == life:
            self.call(host, lambda m, t: m.prepared_locally(epoch, t))

    def _drain(self, host: Host, life: int, epoch: Epoch) -> None:
        if host.life == life:
            self.call(host, lambda m, t: m.drained(epoch, t))

    def _plan(self, host: Host, life: int, wanted: PlanWanted) -> None:
        if host.life != life or host.name in self.hung:
            return
        self.counts.n_plans += 1
        stages = self.rng.sample(sorted(wanted.hosts), self.rng.randint(1, min(3, len(wanted.hosts))))
        plan = msgspec.msgpack.encode(PipelinePlan(tuple(stages), wanted.hosts, self.rng.randrange(2**40)))
        idle = frozenset(wanted.hosts) - frozenset(stages) if self.habits.has_idle_hosts else frozenset()
        envelope = PlanEnvelope(plan=plan, digest=str(hash(plan)), hosts=wanted.hosts, idle=idle)
        self.call(host, lambda m, t: m.plan_ready(wanted.request_id, envelope, t))

    # --- the network ---

    def _delay_s(self) -> float:
        if self.rng.random() < self.weather.stall:
            return self.rng.uniform(0.06, self.weather.stall_s)
        return self.rng.uniform(*self.weather.delay_s)

    def _is_lost(self, src: str, dst: str) -> bool:
        return (src, dst) in self.cut or self.rng.random() < self.weather.loss

    def _send(self, src: str, dst: str, message: ControlMessage) -> None:
        self.counts.n_messages += 1
        if self.message_hook is not None:
            delay_s = self.message_hook(src, dst, message)
            if delay_s is not None:
                if delay_s < HORIZON_S:
                    self.after(delay_s, self.deliver, dst, message)
                return
        if (src, dst) in self.cut and self.habits.relays:
            self._relay(src, dst, message)
            return
        if self._is_lost(src, dst):
            return
        self.after(self._delay_s(), self.deliver, dst, message)
        if self.weather.duplication and self.rng.random() < self.weather.duplication:
            self.after(self._delay_s(), self.deliver, dst, message)

    def _relay(self, src: str, dst: str, message: ControlMessage) -> None:
        """One hop through any live host that has both links: late, and now by this one, now by that."""
        able = [
            via.name
            for via in self.alive()
            if not {(src, via.name), (via.name, dst)} & self.cut and via.name not in (src, dst)
        ]
        if able:
            via = self.rng.choice(able)
            if not self._is_lost(src, via):
                self.after(self._delay_s(), self._pass_on, via, self.hosts[via].life, dst, message)

    def _pass_on(self, via: str, life: int, dst: str, message: ControlMessage) -> None:
        host = self.hosts[via]
        if host.life == life and host.machine is not None and not self._is_lost(via, dst):
            wait_s = max(0.0, host.paused_until_s - self.now_s)
            self.after(wait_s + self._delay_s(), self.deliver, dst, message)

    def deliver(self, dst: str, message: ControlMessage) -> None:
        host = self.hosts[dst]
        if host.machine is not None:
            self.call(host, lambda m, t: m.receive(message, t), message)

    def split(self, left: set[str]) -> None:
        """Cut all links between `left` and the others, both ways."""
        for a in self.hosts:
            for b in self.hosts:
                if (a in left) != (b in left):
                    self.cut.add((a, b))

    # --- requests: I5 ---

    def _new_request(self) -> None:
        assert self.habits.request_every_s is not None
        self.after(self.habits.request_every_s, self._new_request)
        alive = self.alive()
        if alive:
            self.counts.n_requests += 1
            self.open_attempt(self.rng.choice(alive), self.counts.n_requests, 1)

    def open_attempt(self, driver: Host, request: int, number: int) -> None:
        """Start an attempt of `request` in what the driver has committed."""
        machine = driver.machine
        if machine is None or number > 3 or machine.committed_plan is None:
            return
        assert machine.committed is not None
        assert machine.cert is not None
        stages = msgspec.msgpack.decode(machine.committed_plan, type=PipelinePlan).stages
        attempt = Attempt(request, number, machine.committed, machine.cert, driver.name, driver.life, stages)
        self._hop(driver.name, attempt, 0, 1)

    def _hop(self, src: str, attempt: Attempt, stage: int, k: int) -> None:
        if stage == len(attempt.stages):
            stage, k = 0, k + 1
        if k > self.habits.n_steps:
            self.counts.n_finished += 1
            return
        dst = attempt.stages[stage]
        if not self._is_lost(src, dst):
            self.after(self._delay_s(), self._step, dst, attempt, stage, k)

    def _step(self, name: str, attempt: Attempt, stage: int, k: int) -> None:
        host = self.hosts[name]
        machine = host.machine
        if machine is None or host.paused_until_s > self.now_s:
            return
        key = (attempt.request, attempt.number)
        promised = machine.promised
        verdict = machine.admit_epoch(
            attempt.epoch,
            known_epoch=host.sequences.get(key),
            k=k,
            cert=attempt.cert if k == 1 else None,
            now_s=host.local_s(self.now_s),
        )
        self._carry_out(host, verdict.outputs)
        self.judge.check(host, promised, None, verdict.outputs)
        self._plan_wake(host)
        if isinstance(verdict, Accepted):
            host.sequences[key] = attempt.epoch
            self.judge.note_step(host, key, attempt.epoch)
            self._hop(name, attempt, stage + 1, k)
        elif not self._is_lost(name, attempt.driver):
            self.after(self._delay_s(), self._refused, attempt, verdict.cert)

    def _refused(self, attempt: Attempt, cert: Cert | None) -> None:
        driver = self.hosts[attempt.driver]
        if driver.life != attempt.driver_life or driver.machine is None:
            return
        if cert is not None:
            self.call(driver, lambda m, t: m.learn_cert(cert, t))
        self.after(0.05, self.open_attempt, driver, attempt.request, attempt.number + 1)

    def _forget_sequences(self, host: Host, epoch: Epoch) -> None:
        host.sequences = {key: known for key, known in host.sequences.items() if known != epoch}


def count_messages(world: World) -> Counter[str]:
    """Fills as the world runs: how many messages of each kind were sent."""
    counts: Counter[str] = Counter()

    def observe(_now_s: float, _host: str, output: Output) -> None:
        if isinstance(output, Send):
            counts[type(output.message).__name__] += 1

    world.observers.append(observe)
    return counts


def count_lease_moves(world: World) -> list[tuple[float, str, str]]:
    """Fills as the world runs: (time, host, new holder) whenever a host's holder becomes another node."""
    moves: list[tuple[float, str, str]] = []
    last: dict[str, str] = {}

    def observe(now_s: float, host: str, output: Output) -> None:
        if isinstance(output, CoordinatorChanged) and output.node is not None:
            if last.get(host) != output.node:
                moves.append((now_s, host, output.node))
            last[host] = output.node

    world.observers.append(observe)
    return moves
