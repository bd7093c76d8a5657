"""A whole mesh on one machine, from nothing to an answer: what `make demo` shows.

Daemons run as they would on hosts of their own, each with its state folder, in two pretended sites, with so
little memory that the model fits no single node. Whatever happens, no process and no folder stays behind
(unless asked to keep the mesh): a daemon that does not end on SIGTERM in time is killed with its workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from daemon.client import Client, read_admin_key
from daemon.verbs.ask import served_model, stream_chat
from daemon.verbs.wait import find_blocker
from hexmesh.errors import HexmeshError, Lost, TimedOut
from hexmesh.units import show_bytes

T = TypeVar("T")

MAX_ANSWER_TOKENS = 160

_UP_TIMEOUT_S = 60.0
_READY_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1
_LOG_LINES_SHOWN = 15
_EXIT_FAILED = 1
_PROGRAM = (sys.executable, "-m", "daemon")
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SOURCE = Path(__file__).resolve().parents[1]


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
            mesh = LocalMesh(folder, memory_bytes, n_nodes, program, interrupts)
            cleanup.callback(lambda: None if is_kept else mesh.stop(progress))
        try:
            _build(mesh, progress)
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


@dataclass(slots=True)
class LocalDaemon:
    """One daemon of the demo: a process and where its things are."""

    name: str
    site: str
    folder: Path
    process: subprocess.Popen[bytes]
    up: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def client(self) -> Client:
        return Client(url=self.up["http_url"])

    def last_log_lines(self) -> list[str]:
        try:
            return self.log.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        except OSError:
            return []


@dataclass(slots=True)
class LocalMesh:
    """Owns the demo's daemons and its folder."""

    folder: Path
    memory_bytes: int
    n_nodes: int
    program: tuple[str, ...]
    interrupts: Interrupts
    daemons: list[LocalDaemon] = field(default_factory=list)

    def start(self, name: str, site: str, token: str | None = None) -> LocalDaemon:
        """Start a daemon; with a token it joins the first one's mesh."""
        folder = self.folder / name
        folder.mkdir()
        command = [*self.program, "join", "--name", name, "--site", site, "--device", "cpu"]
        command += ["--threads", "1", "--memory", str(self.memory_bytes), "--min-nodes", str(self.n_nodes)]
        command += ["--listen", "127.0.0.1", "--http-port", "0", "--peer-port", "0", "--dht-port", "0"]
        command += ["--state-dir", str(folder / "state"), "--ready-file", str(folder / "up.json")]
        # What the person set for daemons of their own must not reach these.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HEXMESH_")}
        environ["HEXMESH_CONFIG"] = os.devnull
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH"))))
        if token is not None:
            command += ["--peer", self.daemons[0].up["peer_addr"]]
            environ["HEXMESH_TOKEN"] = token
        with (folder / "log").open("wb") as log, self.interrupts.held():
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours; and the workers can be killed with their daemon
            )
            self.daemons.append(LocalDaemon(name=name, site=site, folder=folder, process=process))
        return self.daemons[-1]

    def await_up(self, daemon: LocalDaemon) -> None:
        """Wait for the daemon's line of JSON. Raises TimedOut, or Lost when a daemon ended."""

        def find_up() -> dict[str, Any] | None:
            try:
                up: dict[str, Any] = json.loads((daemon.folder / "up.json").read_text())
            except FileNotFoundError:
                return None
            return up

        daemon.up = self.await_value(find_up, timeout_s=_UP_TIMEOUT_S, what=f"{daemon.name} to come up")

    def await_value(self, find: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
        """What `find` gives, once it is not None. Raises TimedOut, or Lost when a daemon ended."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if (value := find()) is not None:
                return value
            for daemon in self.daemons:
                if (code := daemon.process.poll()) is not None:
                    raise Lost(f"{daemon.name} ended with exit code {code}")
            if time.monotonic() >= deadline_s:
                raise TimedOut(f"waited {timeout_s:.0f} s in vain for {what}")
            time.sleep(_POLL_S)

    def stop(self, progress: Progress) -> None:
        """End every daemon and delete the folder; a second Ctrl-C shortens the wait to nothing."""
        if self.daemons:
            progress.say("stopping the daemons")
        for daemon in self.daemons:
            if daemon.process.poll() is None:
                daemon.process.terminate()
        deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        try:
            for daemon in self.daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.process.wait(timeout=max(deadline_s - time.monotonic(), 0.0))
        finally:
            with self.interrupts.held():
                for daemon in self.daemons:
                    _kill_group(daemon.process)
                shutil.rmtree(self.folder, ignore_errors=True)


def _build(mesh: LocalMesh, progress: Progress) -> None:
    names = _names(mesh.n_nodes)
    progress.say(f"founding a mesh; each node may use {show_bytes(mesh.memory_bytes)}")
    founder = mesh.start(*names[0])
    mesh.await_up(founder)
    progress.say(f"{founder.name} is up at {founder.up['http_url']}, in site {founder.site}")
    for name, site in names[1:]:
        daemon = mesh.start(name, site, _fresh_token(founder))
        mesh.await_up(daemon)
        progress.say(f"{name} joined, in site {site}")
    shown = ""

    def find_ready() -> bool | None:
        nonlocal shown
        for daemon in mesh.daemons:
            blocker = find_blocker(daemon.client, wants_ready=True, n_nodes=None, plan_id=None, timeout_s=5.0)
            if blocker is not None:
                if blocker.message != shown:
                    progress.say(f"waiting: {blocker.message}")
                    shown = blocker.message
                return None
        return True

    mesh.await_value(find_ready, timeout_s=_READY_TIMEOUT_S, what="the mesh to be ready")
    plan = founder.client.get_json("/admin/plan")
    progress.say(f"plan {plan['plan_id']} runs: every node can answer")


def _ask(mesh: LocalMesh, prompt: str, progress: Progress) -> None:
    """Put the question to a node that does not coordinate, as any client might."""
    coordinator = mesh.daemons[0].client.get_json("/admin/topology")["coordinator"]
    others = [daemon for daemon in mesh.daemons if daemon.up["node_id"] != coordinator]
    asked = others[-1] if others else mesh.daemons[0]
    role = "which is not the coordinator" if others else "the only node"
    progress.say(f"asking {asked.name}, {role}: {prompt}")
    messages = [{"role": "user", "content": prompt}]
    body = {
        "model": served_model(asked.client),
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": MAX_ANSWER_TOKENS,
    }
    click.echo()
    with closing(stream_chat(asked.client, body)) as pieces:
        for piece in pieces:
            click.echo(piece, nl=False)
    click.echo("\n")


def _show_topology(mesh: LocalMesh) -> None:
    from daemon.verbs.reads import print_topology

    print_topology(mesh.daemons[0].client)
    click.echo()


def _fresh_token(founder: LocalDaemon) -> str:
    key = read_admin_key(founder.folder / "state")
    issued = json.loads(founder.client.post("/admin/token", {"ttl_s": 600.0, "uses": 1}, key=key))
    return str(issued["token"])


def _names(n_nodes: int) -> list[tuple[str, str]]:
    """(name, site) of each node: two in Tokyo for each one in Osaka."""
    sites = ["osaka" if index % 3 == 2 else "tokyo" for index in range(n_nodes)]
    return [(f"{site}-{sites[: index + 1].count(site)}", site) for index, site in enumerate(sites)]


def _tell_failure(mesh: LocalMesh, error: Exception) -> None:
    said = error.one_line() if isinstance(error, HexmeshError) else str(error)
    click.echo(f"hexmesh: the demo failed: {said}", err=True)
    ended = [daemon for daemon in mesh.daemons if daemon.process.poll() is not None]
    for daemon in ended or mesh.daemons:
        click.echo(f"--- last lines of {daemon.name}", err=True)
        for line in daemon.last_log_lines():
            click.echo(f"    {line}", err=True)


def _tell_kept(mesh: LocalMesh) -> None:
    click.echo("The mesh stays up:")
    for daemon in mesh.daemons:
        click.echo(f"  {daemon.name:<10} {daemon.up['http_url']}  pid {daemon.process.pid}")
    pids = " ".join(str(daemon.process.pid) for daemon in mesh.daemons)
    click.echo(f"Talk with it:  hexmesh chat --url {mesh.daemons[-1].up['http_url']}")
    click.echo(f"Stop it:       kill {pids}; rm -r {mesh.folder}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a daemon and whatever it started, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
