"""A host of a lab: where its programs run, and how this process reaches into it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tools.netlab.tun import enter_namespace

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Host:
    """One namespace with its address. Owner of the processes started through it."""

    name: str
    site: str
    address: str
    namespace: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def program(self) -> tuple[str, ...]:
        """What runs a command on this host; the process that it starts becomes the command."""
        return ("ip", "netns", "exec", self.namespace.name)

    def popen(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command here, in a process group of its own, silently; it ends with the lab."""
        process = subprocess.Popen(
            [*self.program, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, function: Callable[[], T]) -> T:
        """What `function` returns in a thread inside this host's network. Sockets that it makes stay there."""

        def enter_and_call() -> T:
            enter_namespace(str(self.namespace))
            return function()

        with ThreadPoolExecutor(1, thread_name_prefix=self.name) as pool:
            return pool.submit(enter_and_call).result()

    def connect(self, address: str, port: int, *, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """A TCP connection from this host."""

        def dial() -> socket.socket:
            connection = socket.socket()
            try:
                connection.settimeout(timeout_s)
                connection.connect((address, port))
            except BaseException:
                connection.close()
                raise
            return connection

        return self.run(dial)

    def listen(self, port: int = 0) -> socket.socket:
        """A listening TCP socket on this host's address."""
        return self.run(lambda: socket.create_server((self.address, port)))

    def sysctl(self, name: str, value: str) -> None:
        """Set one of this host's own network settings, such as net.ipv4.tcp_slow_start_after_idle."""
        path = Path("/proc/sys") / name.replace(".", "/")
        self.run(lambda: path.write_text(value))

    def kill_all(self) -> None:
        """SIGKILL to what was started here, with its process groups."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()
