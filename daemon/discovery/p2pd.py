"""The p2pd child: hivemind's libp2p process, started and owned by us.

hivemind would start it itself, but its child outlives a daemon that is killed with SIGKILL. Ours gets
PR_SET_PDEATHSIG from a small wrapper between fork and exec, lies in a session of its own (Ctrl-C in a
terminal is for the daemon, which drains first), and its end is noticed at once. hivemind then connects to it
as to an existing p2pd.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hexmesh.errors import Lost, NotReady, TimedOut

log = logging.getLogger("hexmesh.p2pd")

START_PATIENCE_S = 15.0
STOP_PATIENCE_S = 2.0
_N_LAST_LINES = 20
_MAX_SOCKET_PATH = 100
"""The kernel allows 107 bytes."""

# The kernel kills the child when the thread that started it ends: the daemon starts it on its main thread.
# The parent may die before prctl, hence the look at the parent's id.
_WRAPPER = """
import ctypes, os, sys
if sys.platform.startswith("linux"):
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class P2pdOptions:
    """How the child is started. `listen` and `announce` are multiaddrs without a peer id."""

    identity_path: Path
    listen: str
    announce: str | None = None


@dataclass(frozen=True, slots=True)
class P2pd:
    """A running p2pd. Its control socket is for this user only."""

    process: asyncio.subprocess.Process
    control_socket: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    async def wait(self) -> str:
        """Wait until it ends; how it ended, in words."""
        code = await self.process.wait()
        return f"p2pd was killed by signal {-code}" if code < 0 else f"p2pd exited with status {code}"


def p2pd_path() -> Path:
    """The p2pd program in the hivemind package, found without importing it. Raises NotReady."""
    spec = importlib.util.find_spec("hivemind")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "hivemind_cli" / "p2pd"
        if path.is_file():
            return path
    raise NotReady("hivemind's p2pd is not installed", code="no_p2pd", next_step="pip install hivemind")


@asynccontextmanager
async def running_p2pd(options: P2pdOptions) -> AsyncIterator[P2pd]:
    """A p2pd that is ready, and is ended with the context. Raises Lost, TimedOut or NotReady."""
    with _control_socket(options.identity_path) as control_socket:
        process = await _start(_arguments(options, control_socket))
        lines: deque[str] = deque(maxlen=_N_LAST_LINES)
        ready = asyncio.get_running_loop().create_future()
        reader = asyncio.create_task(_read_output(process, lines, ready), name="p2pd-output")
        try:
            await _until_ready(ready, lines)
            yield P2pd(process, control_socket)
        finally:
            await _stop(process)
            reader.cancel()
            await asyncio.wait([reader])


@contextmanager
def _control_socket(identity_path: Path) -> Iterator[Path]:
    """Where p2pd listens for us: beside its key, or in a folder of its own where that path is too long.

    Beside the key it is found again, and so nothing piles up when daemons are killed.
    """
    beside = identity_path.absolute().with_name(f"{identity_path.name}.sock")
    if len(os.fsencode(beside)) <= _MAX_SOCKET_PATH:
        beside.unlink(missing_ok=True)
        try:
            yield beside
        finally:
            beside.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="hexmesh-dht-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "p2pd.sock"


def _arguments(options: P2pdOptions, control_socket: Path) -> list[str]:
    flags = {
        "id": options.identity_path,
        "listen": f"/unix{control_socket}",
        "hostAddrs": options.listen,
        "b": 0,
        "dhtServer": 1,
        "tls": 1,
        "connManager": 1,
        "idleTimeout": "30s",
        "relay": 0,
        "relayService": 0,
        "relayDiscovery": 0,
        "autoRelay": 0,
        "autonat": 0,
        "natPortMap": 0,
    }
    if options.announce is not None:
        flags["announceAddrs"] = options.announce
    return [str(p2pd_path()), *(f"-{name}={value}" for name, value in flags.items())]


async def _start(arguments: list[str]) -> asyncio.subprocess.Process:
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    environment["GOLOG_LOG_LEVEL"] = "error"
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-c", _WRAPPER, str(os.getpid())),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise Lost(f"p2pd cannot be started: {error}", code="p2pd_failed") from error


async def _read_output(
    process: asyncio.subprocess.Process, lines: deque[str], ready: asyncio.Future[bool]
) -> None:
    """Drain the child's output; `ready` becomes True when it serves, False when it ends before."""
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode(errors="replace").strip():
        lines.append(line)
        log.debug("p2pd says: %s", line)
        if line.startswith("Peer ID:") and not ready.done():
            ready.set_result(True)
    if not ready.done():
        ready.set_result(False)


async def _until_ready(ready: asyncio.Future[bool], lines: deque[str]) -> None:
    try:
        async with asyncio.timeout(START_PATIENCE_S):
            is_ready = await ready
    except TimeoutError:
        raise TimedOut(f"p2pd was not ready within {START_PATIENCE_S:.0f} s", code="p2pd_failed") from None
    if not is_ready:
        raise Lost(f"p2pd did not start: {' | '.join(lines) or 'it said nothing'}", code="p2pd_failed")


async def _stop(process: asyncio.subprocess.Process) -> None:
    _send_signal(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        _send_signal(process, signal.SIGKILL)
        await process.wait()


def _send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Not `process.send_signal`: that looks first whether a child has ended, and so takes its status from
    under asyncio's watcher when it has (CPython 3.11)."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
