"""Network namespaces through `ip`: made, configured, searched for processes and removed; and whether that works here.

A name says whose it is: pid and start time of the process that made it. So what a killed run left behind can be told
from what another run needs, and is removed by the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hexmesh.errors import HexmeshError, NotReady
from tools.netlab.tun import DEVICE

PREFIX = "hexlab"
FOLDER = Path("/run/netns")
_IP_TIMEOUT_S = 20.0
_GONE_TIMEOUT_S = 5.0
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_run_numbers = itertools.count()


def why_unavailable() -> HexmeshError | None:
    """Why no lab can be made here, with the next step; None when nothing speaks against it."""
    if shutil.which("ip") is None:
        return NotReady("a lab needs the command `ip`", next_step="apt-get install iproute2")
    if not _has_capabilities():
        return NotReady(
            "a lab needs root, or root in a user namespace of its own",
            next_step="run it as root, or: unshare -Urnm sh -c 'mount -t tmpfs tmpfs /run && exec \"$@\"' sh COMMAND",
        )
    return None


def new_prefix() -> str:
    """A beginning of names that no other lab has."""
    return f"{PREFIX}-{os.getpid()}-{_start_ticks(os.getpid())}-{next(_run_numbers)}-"


def make_namespace(name: str) -> Path:
    """A new namespace with loopback up."""
    ip("netns", "add", name)
    ip("-n", name, "link", "set", "lo", "up")
    return FOLDER / name


def configure_device(namespace: str, address: str, prefix_bits: int) -> None:
    """Give the lab's device in `namespace` its address and bring it up."""
    ip("-n", namespace, "address", "add", f"{address}/{prefix_bits}", "dev", DEVICE)
    ip("-n", namespace, "link", "set", DEVICE, "txqueuelen", "20000", "up")


def remove_namespace(name: str) -> None:
    """Kill what still runs in the namespace, wait for it to end, and remove it."""
    deadline_s = time.monotonic() + _GONE_TIMEOUT_S
    while (pids := pids_in(name)) and time.monotonic() < deadline_s:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(HexmeshError):  # somebody else removed it
        ip("netns", "delete", name)


def pids_in(name: str) -> list[int]:
    """Processes in the namespace, zombies of ours not counted."""
    try:
        return [int(pid) for pid in ip("netns", "pids", name).split() if int(pid) != os.getpid()]
    except HexmeshError:
        return []


def namespaces() -> list[str]:
    """Names of the existing ones of any lab."""
    return sorted(path.name for path in FOLDER.glob(f"{PREFIX}-*"))


def remove_orphans() -> None:
    """Remove the namespaces of runs whose process is gone, and what runs in them."""
    for name in namespaces():
        _, pid, start_ticks, *_ = name.split("-", 3)
        if _start_ticks(int(pid)) != int(start_ticks):
            remove_namespace(name)


def ip(*arguments: str) -> str:
    """What the command prints. Raises NotReady with its words."""
    return run_command(("ip", *arguments))


def run_command(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_IP_TIMEOUT_S)
    if done.returncode != 0:
        raise NotReady(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def _start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _has_capabilities() -> bool:
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    wanted = 1 << _CAP_NET_ADMIN | 1 << _CAP_SYS_ADMIN
    return int(effective, 16) & wanted == wanted
