"""What can go wrong with a host or a link, how it is done to a mesh in a lab, and undone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

from tools.netlab.lab import Lab
from tools.netlab.mesh import LabDaemon, LabMesh

Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """The mesh that faults happen to."""

    lab: Lab
    mesh: LabMesh
    flags: tuple[str, ...]

    def daemon(self, host: str) -> LabDaemon:
        """The daemon that runs on a host now."""
        return next(one for one in self.mesh.daemons if isinstance(one, LabDaemon) and one.name == host)


def kill_host(scene: Scene, host: str, other: str) -> Undo:
    """As when the host loses power; it starts again with its state folder."""
    scene.daemon(host).kill_group()

    def restart() -> None:
        scene.mesh.await_up(scene.mesh.start_on(scene.lab.hosts[host], *scene.flags))

    return restart


def kill_worker(scene: Scene, host: str, other: str) -> Undo:
    """As when a device's driver crashes; the daemon must bring it back by itself."""
    signal_all(workers_of(scene.daemon(host)), signal.SIGKILL)
    return _nothing


def kill_p2pd(scene: Scene, host: str, other: str) -> Undo:
    """The DHT's process; the daemon must bring it back by itself."""
    signal_all(p2pd_of(scene.daemon(host)), signal.SIGKILL)
    return _nothing


def pause_host(scene: Scene, host: str, other: str) -> Undo:
    """As when a virtual machine is moved: nothing runs, no connection ends."""
    group = scene.daemon(host).process.pid
    os.killpg(group, signal.SIGSTOP)

    def resume() -> None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGCONT)

    return resume


def pause_worker(scene: Scene, host: str, other: str) -> Undo:
    """As when a device hangs."""
    workers = workers_of(scene.daemon(host))
    signal_all(workers, signal.SIGSTOP)
    return lambda: signal_all(workers, signal.SIGCONT)


def cut_pair(scene: Scene, host: str, other: str) -> Undo:
    """No packet passes between two hosts."""
    scene.lab.cut(host, other)
    return lambda: scene.lab.heal(host, other)


def cut_one_way(scene: Scene, host: str, other: str) -> Undo:
    """No packet passes from one host to another."""
    scene.lab.cut(host, other, one_way=True)
    return lambda: scene.lab.heal(host, other)


def isolate(scene: Scene, host: str, other: str) -> Undo:
    """As when the host's cable is pulled."""
    scene.lab.isolate(host)
    return lambda: scene.lab.heal(host)


FAULTS: tuple[Callable[[Scene, str, str], Undo], ...] = (
    kill_host,
    kill_worker,
    kill_p2pd,
    pause_host,
    pause_worker,
    cut_pair,
    cut_one_way,
    isolate,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One fault of a soak."""

    fault: Callable[[Scene, str, str], Undo]
    host: str
    other: str
    lasts_s: float
    pause_s: float

    @property
    def name(self) -> str:
        return self.fault.__name__.replace("_", " ")

    @contextmanager
    def happening(self, scene: Scene) -> Iterator[None]:
        """The fault, undone at the end."""
        undo = self.fault(scene, self.host, self.other)
        try:
            yield
        finally:
            undo()


def draw(rng: random.Random, hosts: list[str]) -> Plan:
    """A fault of any kind for any host, for a time between a blink and well past every lease."""
    host, other = rng.sample(hosts, 2)
    lasts_s = rng.choice((0.1, 0.5, 1.0, 2.0, 4.0, 8.0)) * rng.uniform(0.5, 1.5)
    return Plan(rng.choice(FAULTS), host, other, lasts_s, rng.uniform(0.2, 4.0))


def workers_of(daemon: LabDaemon) -> list[psutil.Process]:
    """The processes that compute: children of the workshop."""
    return [one for one in _below(daemon) if one.ppid() != daemon.process.pid and one.name() != "p2pd"]


def p2pd_of(daemon: LabDaemon) -> list[psutil.Process]:
    return [one for one in _below(daemon) if one.name() == "p2pd"]


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _below(daemon: LabDaemon) -> list[psutil.Process]:
    try:
        return psutil.Process(daemon.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _nothing() -> None:
    pass
