"""What a daemon holds of the machine, so that before and after can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from daemon.terminal.local_mesh import LocalDaemon

FD_SLACK = 12
"""Connections come and go; what leaks does so with every fault."""
_LISTENS = "0A"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """Of one daemon and what it started."""

    processes: Counter[str]
    n_listening: int
    n_fds: int
    files: frozenset[str]
    rss_bytes: int
    blocks_used: int
    requests: int


def holdings(daemon: LocalDaemon) -> Holdings:
    """What a living daemon holds now."""
    process = psutil.Process(daemon.process.pid)
    children = [one for one in process.children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    status = daemon.get("/admin/status")
    blocks = status["kv_blocks"]
    return Holdings(
        processes=Counter(one.name() for one in children),
        n_listening=sum(1 for _ in _listening(process.pid)),
        n_fds=process.num_fds(),
        files=frozenset(str(path.relative_to(daemon.state_dir)) for path in daemon.state_dir.rglob("*")),
        rss_bytes=process.memory_info().rss,
        blocks_used=(blocks["used"] or 0) + (blocks["leased"] or 0) if blocks else 0,
        requests=status["requests_running"] + status["requests_waiting"],
    )


def leaks(before: Holdings, after: Holdings, known_files: Set[str]) -> list[str]:
    """What is held afterwards and was not before, in words. `known_files`: those that some daemon had at first."""
    found = []
    if after.processes != before.processes:
        found.append(f"processes {dict(after.processes)}, at first {dict(before.processes)}")
    if after.n_listening != before.n_listening:
        found.append(f"{after.n_listening} listening ports, at first {before.n_listening}")
    if after.n_fds > before.n_fds + FD_SLACK:
        found.append(f"{after.n_fds} open files, at first {before.n_fds}")
    if new := sorted(after.files - known_files):
        found.append(f"files {new}")
    if after.blocks_used:
        found.append(f"{after.blocks_used} KV blocks in use by nobody")
    if after.requests:
        found.append(f"{after.requests} requests of nobody")
    return found


def shared_memory() -> frozenset[str]:
    """Names in /dev/shm."""
    return frozenset(path.name for path in Path("/dev/shm").iterdir())


def _listening(pid: int) -> Iterator[str]:
    """Listening TCP sockets of the process's network; in a lab each host has one of its own."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            if line.split()[3] == _LISTENS:
                yield line
