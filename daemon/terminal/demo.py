"""A whole mesh on one machine, from nothing to an answer: what `make demo` shows.

Daemons run as they would on hosts of their own, each with its state folder, in two pretended sites, with so
little memory that the model fits no single node. Whatever happens, no process and no folder stays behind
(unless asked to keep the mesh): a daemon that does not end on SIGTERM in time is killed with its workers.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from daemon.terminal.client import Client
from daemon.terminal.local_mesh import LocalMesh
from daemon.verbs.ask import served_model, stream_chat
from hexmesh.errors import HexmeshError
from hexmesh.units import show_bytes

T = TypeVar("T")

MAX_ANSWER_TOKENS = 160

STOP_TIMEOUT_S = 10.0
_EXIT_FAILED = 1
_PROGRAM = (sys.executable, "-m", "daemon")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_demo(
    prompt: str,
    *,
    n_nodes: int,
    memory_bytes: int,
    keep: bool,
    program: tuple[str, ...] = _PROGRAM,
) -> int:
    """Run the demo and give its exit code. `program` is what a daemon is started with."""
    progress = Progress()
    is_kept = False
    with Interrupts() as interrupts, ExitStack() as cleanup:
        with interrupts.held():
            folder = Path(tempfile.mkdtemp(prefix="hexmesh-demo-"))
            mesh = LocalMesh(
                folder, program=program, uninterrupted=interrupts.held, stop_timeout_s=STOP_TIMEOUT_S
            )
            cleanup.callback(lambda: None if is_kept else _stop(mesh, progress))
        try:
            _build(mesh, n_nodes, memory_bytes, progress)
            _ask(mesh, prompt, progress)
            _show_topology(mesh)
            is_kept = keep
        except (HexmeshError, OSError) as error:
            _tell_failure(mesh, error)
            return _EXIT_FAILED
        if keep:
            _tell_kept(mesh)
    return 0


@dataclass(slots=True)
class Progress:
    """Lines for the person who watches, with the seconds since the start."""

    start_s: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        click.echo(f"{time.monotonic() - self.start_s:6.1f} s  {text}", err=True)


class Interrupts:
    """Ctrl-C, `kill` and a closed terminal as KeyboardInterrupt, never where it could lose a process."""

    def __init__(self) -> None:
        self._is_held = False
        self._is_pending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._interrupt) for number in _STOP_SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Interrupts come at the end of the block rather than in it."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._is_pending:
            raise KeyboardInterrupt

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._is_pending = True
        if not self._is_held:
            raise KeyboardInterrupt


def _build(mesh: LocalMesh, n_nodes: int, memory_bytes: int, progress: Progress) -> None:
    names = _names(n_nodes)
    progress.say(f"founding a mesh; each node may use {show_bytes(memory_bytes)}")
    flags = ["--device", "cpu", "--threads", "1", "--memory", str(memory_bytes), "--min-nodes", str(n_nodes)]
    (name, site), *others = names
    founder = mesh.found(name, "--site", site, *flags)
    progress.say(f"{name} is up at {founder.url}, in site {site}")
    for name, site in others:
        mesh.join(name, "--site", site, *flags)
        progress.say(f"{name} joined, in site {site}")
    mesh.await_ready(tell=lambda blocker: progress.say(f"waiting for {blocker}"))
    plan = founder.get("/admin/plan")
    progress.say(f"plan {plan['plan_id']} runs: every node can answer")


def _stop(mesh: LocalMesh, progress: Progress) -> None:
    progress.say("stopping the daemons")
    mesh.stop()


def _ask(mesh: LocalMesh, prompt: str, progress: Progress) -> None:
    """Put the question to a node that does not coordinate, as any client might."""
    coordinator = mesh.daemons[0].get("/admin/topology")["coordinator"]
    others = [daemon for daemon in mesh.daemons if daemon.node_id != coordinator]
    asked = others[-1] if others else mesh.daemons[0]
    role = "which is not the coordinator" if others else "the only node"
    progress.say(f"asking {asked.name}, {role}: {prompt}")
    show_answer(asked.client, prompt)


def show_answer(client: Client, prompt: str) -> None:
    """Put the question to a node; the answer appears as it comes."""
    body = {
        "model": served_model(client),
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0.0,
        "max_tokens": MAX_ANSWER_TOKENS,
    }
    click.echo()
    with closing(stream_chat(client, body)) as pieces:
        for piece in pieces:
            click.echo(piece, nl=False)
    click.echo("\n")


def _show_topology(mesh: LocalMesh) -> None:
    from daemon.verbs.reads import print_topology

    print_topology(mesh.daemons[0].client)
    click.echo()


def _names(n_nodes: int) -> list[tuple[str, str]]:
    """(name, site) of each node: two in Tokyo for each one in Osaka."""
    sites = ["osaka" if index % 3 == 2 else "tokyo" for index in range(n_nodes)]
    return [(f"{site}-{sites[: index + 1].count(site)}", site) for index, site in enumerate(sites)]


def _tell_failure(mesh: LocalMesh, error: Exception) -> None:
    said = error.one_line() if isinstance(error, HexmeshError) else str(error)
    click.echo(f"hexmesh: the demo failed: {said}", err=True)
    ended = [daemon for daemon in mesh.daemons if not daemon.is_running]
    for daemon in ended or mesh.daemons:
        click.echo(f"--- last lines of {daemon.name}", err=True)
        for line in daemon.last_log_lines():
            click.echo(f"    {line}", err=True)


def _tell_kept(mesh: LocalMesh) -> None:
    click.echo("The mesh stays up:")
    for daemon in mesh.daemons:
        click.echo(f"  {daemon.name:<10} {daemon.url}  pid {daemon.process.pid}")
    pids = " ".join(str(daemon.process.pid) for daemon in mesh.daemons)
    click.echo(f"Talk with it:  hexmesh chat --url {mesh.daemons[-1].url}")
    click.echo(f"Stop it:       kill {pids}; rm -r {mesh.folder}")
