"""How a command line finds the daemon of the same state folder: `run.json`, there while the daemon runs.

The daemon is the file's only writer. A file that a killed daemon left behind is ignored, by its pid.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path

RUN_FILE = "run.json"
ADMIN_KEY_FILE = "admin.key"


@dataclass(frozen=True, slots=True)
class Run:
    """A running daemon."""

    pid: int
    http_url: str


def write_run(state_dir: Path, run: Run) -> None:
    """Make the daemon known to command lines that use `state_dir`."""
    write_whole(state_dir / RUN_FILE, json.dumps({"pid": run.pid, "http_url": run.http_url}) + "\n")


def read_run(state_dir: Path) -> Run | None:
    """The daemon that runs on `state_dir`, or None."""
    try:
        document = json.loads((state_dir / RUN_FILE).read_text(encoding="utf-8"))
        run = Run(pid=int(document["pid"]), http_url=str(document["http_url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run if is_alive(run.pid) else None


def remove_run(state_dir: Path, pid: int) -> None:
    """Forget the daemon `pid`; the file of another one stays."""
    run = read_run(state_dir)
    if run is None or run.pid == pid:
        with contextlib.suppress(OSError):
            (state_dir / RUN_FILE).unlink()


def local_http_url(http_listen: str, port: int) -> str:
    """The URL by which this machine reaches an HTTP server that listens on `http_listen`."""
    address = ipaddress.ip_address(http_listen)
    if address.is_unspecified:
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    return f"http://{f'[{address}]' if address.version == 6 else address}:{port}"


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing; for its owner alone, as a ready file holds a token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    with open(
        os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
    unfinished.replace(path)
