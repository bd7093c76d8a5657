"""Daemons on the hosts of a lab: `LocalMesh`, with each daemon on a network of its own."""

from __future__ import annotations

import http.client
import socket
import sys
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import urlsplit

from daemon.terminal.client import Client
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from tools.netlab.host import Host

_DAEMON = (sys.executable, "-m", "daemon")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabClient(Client):
    """Speaks to a daemon whose HTTP is on the loopback of its host: every connection is made inside."""

    host: Host

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        return _Connection(self.host, parts.hostname or "", parts.port or 80, timeout_s)


class _Connection(http.client.HTTPConnection):
    def __init__(self, inside: Host, address: str, port: int, timeout_s: float) -> None:
        super().__init__(address, port, timeout=timeout_s)
        self.inside = inside
        self.timeout_s = timeout_s
        self.sock: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self.inside.connect(self.host, self.port, timeout_s=self.timeout_s)


@dataclass(slots=True, kw_only=True)
class LabDaemon(LocalDaemon):
    """One daemon on a host."""

    host: Host

    @property
    def client(self) -> Client:
        return LabClient(url=self.url, host=self.host)


@dataclass(slots=True)
class LabMesh(LocalMesh):
    """Owner of the daemons, as `LocalMesh` is; a daemon is named after its host. Close it before the lab."""

    def start_on(
        self,
        host: Host,
        *flags: str,
        token: str | None = None,
        verb: Literal["join", "bootstrap"] = "join",
    ) -> LabDaemon:
        """Start a daemon on `host`, listening on its address; with a token it joins the first one. Does not wait."""
        self.program = (*host.program, *_DAEMON)
        flags = ("--listen", host.address, "--site", host.site, *flags)  # the last --listen counts
        local = LocalMesh.start(self, host.name, *flags, token=token, verb=verb)
        daemon = LabDaemon(
            name=local.name,
            folder=local.folder,
            process=local.process,
            started_s=local.started_s,
            host=host,
        )
        self.daemons = [daemon if other is local else other for other in self.daemons]
        return daemon

    def found_on(self, host: Host, *flags: str) -> LabDaemon:
        """Start the first daemon and wait until it is up."""
        daemon = self.start_on(host, *flags)
        self.await_up(daemon)
        return daemon

    def on(self, node_id: str) -> LabDaemon:
        """The daemon with this id."""
        return cast(LabDaemon, next(daemon for daemon in self.daemons if daemon.node_id == node_id))
