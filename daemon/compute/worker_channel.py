"""What a daemon, its workshop and its workers agree on beside the worker messages.

The workshop's messages go over a SOCK_SEQPACKET pair, one message a packet; a worker's end of its socket
travels with `SpawnWorker`. Importable without torch.
"""

from __future__ import annotations

import ctypes
import os
import signal

import msgspec

from hexmesh.wire.frames import FrameLimits

WORKER_FRAMES = FrameLimits(header_bytes=16 * 2**20, payload_bytes=2**30)
"""Headers name whole block tables; payloads are hidden states of one step."""

PACKET_BYTES = 64 * 1024
WORKER_TITLE = "hexmesh-worker"
WORKSHOP_TITLE = "hexmesh-shop"

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class SpawnWorker(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Fork a worker; its socket comes beside the message."""

    worker: int
    device: str
    threads: int
    cpu_affinity: list[int] | None


class KillWorker(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End a worker at once, if it still lives."""

    worker: int


class WorkerSpawned(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    worker: int
    pid: int


class WorkerExited(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a worker ended: like subprocess's returncode, minus the signal's number where a signal ended it."""

    worker: int
    returncode: int


WORKSHOP_REQUEST = SpawnWorker | KillWorker
WORKSHOP_REPLY = WorkerSpawned | WorkerExited


NO_DEVICE_STATUS = 69
"""Exit status of a worker whose device this host does not have."""


def describe_exit(returncode: int) -> str:
    """How a worker ended, in words."""
    if returncode == NO_DEVICE_STATUS:
        return "the host has no such device"
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def set_process_title(title: str) -> None:
    """What `ps` and `top` show as the command; at most 15 characters."""
    _prctl(_PR_SET_NAME, title.encode())


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")
