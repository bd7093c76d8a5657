"""What the processes of a mesh take: CPU time and memory, by kind of process. And what the daemons count themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import psutil

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh

IDLE_S = 3.0
"""How long an idle mesh is watched."""


def measure_idle(mesh: LocalMesh) -> dict[str, float]:
    """CPU seconds a second that each kind of process takes while nothing is asked."""
    before = cpu_seconds(mesh)
    time.sleep(IDLE_S)
    return {role: (after - before.get(role, 0.0)) / IDLE_S for role, after in cpu_seconds(mesh).items()}


def cpu_seconds(mesh: LocalMesh) -> dict[str, float]:
    """CPU seconds so far, by kind of process, summed over the mesh."""
    return _by_role(mesh, lambda process: sum(cpu_times_s(process)), sum)


def memory(mesh: LocalMesh) -> dict[str, float]:
    """Proportional set size in bytes by kind of process, mean over the mesh."""
    return _by_role(mesh, lambda process: float(process.memory_full_info().pss), lambda v: sum(v) / len(v))


def cpu_times_s(process: psutil.Process) -> tuple[float, float]:
    """User and system seconds of a process."""
    times = process.cpu_times()
    return times.user, times.system


def metrics_of(daemons: Sequence[LocalDaemon]) -> list[str]:
    """The lines of all their metrics."""
    return [line for daemon in daemons for line in daemon.client.get("/metrics").decode().splitlines()]


def metric(lines: Sequence[str], name: str, label: str = "") -> float:
    """Sum of a metric's series; of those alone that have `label`, such as `stage="0"`."""
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)


def _by_role(
    mesh: LocalMesh, figure: Callable[[psutil.Process], float], combine: Callable[[list[float]], float]
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for daemon in mesh.daemons:
        process = psutil.Process(daemon.process.pid)
        for one in [process, *process.children(recursive=True)]:
            found.setdefault(_role(one, process), []).append(figure(one))
    return {role: combine(values) for role, values in found.items()}


def _role(process: psutil.Process, daemon: psutil.Process) -> str:
    if process == daemon:
        return "daemon"
    name, command = process.name(), " ".join(process.cmdline())
    if "p2pd" in name or "p2pd" in command:
        return "p2pd"
    return "workshop" if process.ppid() == daemon.pid else "worker"
