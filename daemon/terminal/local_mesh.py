"""Daemons on this machine, each with a state folder of its own: for the demo, the benches and the tests.

They run as on hosts of their own and in process groups of their own, so that a daemon and whatever it started can be
killed together. Nothing stays behind when the mesh is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from daemon.terminal.client import Client, read_admin_key
from daemon.verbs.wait import find_blocker
from hexmesh.errors import Lost, TimedOut

T = TypeVar("T")

UP_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 180.0
_POLL_S = 0.05
_SOURCE = Path(__file__).resolve().parents[2]
_LOG_LINES_SHOWN = 15


@dataclass(slots=True)
class LocalDaemon:
    """One daemon: a process and where its things are."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    started_s: float
    flags: tuple[str, ...] = ()
    """What it was started with, to be started so again."""
    up: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def url(self) -> str:
        return str(self.up["http_url"])

    @property
    def node_id(self) -> str:
        return str(self.up["node_id"])

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def client(self) -> Client:
        return Client(url=self.url)

    def get(self, path: str) -> Any:
        """The JSON of a read route."""
        return self.client.get_json(path)

    def fresh_token(self, *, uses: int = 1) -> str:
        """A token that admits `uses` nodes."""
        body = {"ttl_s": 600.0, "uses": uses}
        issued = json.loads(self.client.post("/admin/token", body, key=read_admin_key(self.state_dir)))
        return str(issued["token"])

    def last_log_lines(self, n_lines: int = _LOG_LINES_SHOWN) -> list[str]:
        try:
            return self.log.read_text(errors="replace").splitlines()[-n_lines:]
        except OSError:
            return []

    def terminate(self) -> None:
        """Ask for a clean leave."""
        if self.is_running:
            self.process.terminate()

    def kill(self) -> None:
        """SIGKILL to the daemon alone: its workers and p2pd must notice by themselves."""
        self.process.kill()
        self.process.wait()

    def kill_group(self) -> None:
        """SIGKILL to the daemon and whatever it started, as when its host loses power."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass(slots=True)
class LocalMesh:
    """Owner of the daemons and of their folder."""

    folder: Path
    program: tuple[str, ...] = (sys.executable, "-m", "daemon")
    """What a daemon is started with."""
    uninterrupted: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """Around what an interrupt must not tear in two, such as starting a process and noting it."""
    stop_timeout_s: float = 15.0
    """How long a clean leave may take before the daemon is killed with its workers."""
    daemons: list[LocalDaemon] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        *flags: str,
        token: str | None = None,
        peer: str | None = None,
        verb: Literal["join", "bootstrap"] = "join",
    ) -> LocalDaemon:
        """Start a daemon on free loopback ports; it founds a mesh, or joins or rejoins one. Does not wait."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "up.json").unlink(missing_ok=True)
        command = [*self.program, verb, "--name", name, "--listen", "127.0.0.1"]
        command += ["--http-port", "0", "--peer-port", "0", "--dht-port", "0"]
        command += ["--state-dir", str(folder / "state"), "--ready-file", str(folder / "up.json"), *flags]
        # What the person set for daemons of their own must not reach these.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HEXMESH_")}
        environ["HEXMESH_CONFIG"] = os.devnull
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH"))))
        if token is not None:
            command += ["--peer", peer or str(self.daemons[0].up["peer_addr"])]
            environ["HEXMESH_TOKEN"] = token
        with (folder / "log").open("ab") as log, self.uninterrupted():
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the caller's; and a daemon can be killed with its workers
            )
            daemon = LocalDaemon(
                name=name, folder=folder, process=process, started_s=time.monotonic(), flags=flags
            )
            self.daemons = [*(other for other in self.daemons if other.name != name), daemon]
        return daemon

    def restart(self, daemon: LocalDaemon) -> LocalDaemon:
        """Start a daemon that has ended on its state folder again: it rejoins. Does not wait."""
        return self.start(daemon.name, *daemon.flags)

    def found(self, name: str, *flags: str) -> LocalDaemon:
        """Start the first daemon and wait until it is up."""
        daemon = self.start(name, *flags)
        self.await_up(daemon)
        return daemon

    def join(self, name: str, *flags: str) -> LocalDaemon:
        """Start a daemon that joins the first one's mesh, and wait until it is up."""
        daemon = self.start(name, *flags, token=self.daemons[0].fresh_token())
        self.await_up(daemon)
        return daemon

    def await_up(self, daemon: LocalDaemon) -> None:
        """Wait for the daemon's line of JSON. Raises TimedOut, or Lost when it ended."""

        def find_up() -> dict[str, Any] | None:
            try:
                up: dict[str, Any] = json.loads((daemon.folder / "up.json").read_text())
            except FileNotFoundError:
                return None
            return up

        daemon.up = self.await_value(
            find_up, timeout_s=UP_TIMEOUT_S, what=f"{daemon.name} to come up", living=[daemon]
        )

    def await_ready(
        self,
        daemons: Sequence[LocalDaemon] | None = None,
        *,
        plan_reaches: int | None = None,
        timeout_s: float = READY_TIMEOUT_S,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Wait until all `daemons` are ready in one plan, over `plan_reaches` stages if given.

        `tell` gets each new blocker's text. Raises TimedOut, or Lost when one of them ended.
        """
        waiting_for = list(self.daemons if daemons is None else daemons)
        shown = ""

        def find_ready() -> bool | None:
            nonlocal shown
            blocker = _first_blocker(waiting_for) or _why_not_one_plan(waiting_for, plan_reaches)
            if blocker is not None and blocker != shown:
                shown = blocker
                tell(blocker)
            return True if blocker is None else None

        self.await_value(find_ready, timeout_s=timeout_s, what="the mesh to be ready", living=waiting_for)

    def await_value(
        self,
        find: Callable[[], T | None],
        *,
        timeout_s: float,
        what: str,
        living: Sequence[LocalDaemon] = (),
    ) -> T:
        """What `find` gives, once it is not None. Raises TimedOut, or Lost when one of `living` ended."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if (value := find()) is not None:
                return value
            for daemon in living:
                if not daemon.is_running:
                    raise Lost(f"{daemon.name} ended with exit code {daemon.process.returncode}")
            if time.monotonic() >= deadline_s:
                raise TimedOut(f"waited {timeout_s:.0f} s in vain for {what}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End every daemon, cleanly where that is quick, and delete the folder."""
        for daemon in self.daemons:
            daemon.terminate()
        deadline_s = time.monotonic() + self.stop_timeout_s
        try:
            for daemon in self.daemons:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.process.wait(timeout=max(deadline_s - time.monotonic(), 0.0))
        finally:
            with self.uninterrupted():
                for daemon in self.daemons:
                    daemon.kill_group()
                shutil.rmtree(self.folder, ignore_errors=True)


def _first_blocker(daemons: Sequence[LocalDaemon]) -> str | None:
    """Why the first one that is not ready is not."""
    for daemon in daemons:
        blocker = find_blocker(daemon.client, wants_ready=True, n_nodes=None, plan_id=None, timeout_s=5.0)
        if blocker is not None:
            return f"{daemon.name}: {blocker.message}"
    return None


def _why_not_one_plan(daemons: Sequence[LocalDaemon], plan_reaches: int | None) -> str | None:
    """Whether all are in the same plan, over that many stages."""
    topologies = [daemon.get("/admin/topology") for daemon in daemons]
    plans = {topology["plan_id"] for topology in topologies}
    if len(plans) > 1:
        return "the nodes do not have the same plan yet"
    n_stages = sum(len(replica["stages"]) for replica in topologies[0]["replicas"])
    if plan_reaches is not None and n_stages != plan_reaches:
        return f"the plan has {n_stages} stages, not {plan_reaches} yet"
    return None
