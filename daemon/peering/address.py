"""Where a daemon listens and where peers dial: host:port in text and out, ports in use."""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from hexmesh.errors import HexmeshError, InvalidInput

LOOPBACK = "127.0.0.1"
_BACKLOG = 128
_FAR_AWAY = ("192.0.2.1", 9)
"""For documentation only (RFC 5737): connecting a UDP socket to it sends nothing, and finds the route."""


class PortInUse(HexmeshError):
    """Somebody else listens where this daemon wants to."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or IP) and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it."""
        return is_loopback(self.host)


def parse_address(text: str) -> Address:
    """Address from "10.0.0.1:7701", "[fd00::1]:7701" or "host.example:7701". Raises InvalidInput."""
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 65536
    if not colon or not host or not is_port or (":" in host) != bracketed or any(c.isspace() for c in host):
        raise InvalidInput(
            f"{text!r} is not an address",
            code="bad_address",
            next_step="write HOST:PORT, such as 10.0.0.1:7701 or [fd00::1]:7701",
        )
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    """Whether a host name or IP means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def default_listen_host() -> str:
    """The IP by which this host is reached: that of its default route, else 127.0.0.1. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FAR_AWAY)
        except OSError:
            return LOOPBACK
        host = str(probe.getsockname()[0])
    return LOOPBACK if host == "0.0.0.0" else host


def listen_tcp(host: str, port: int, *, flag: str) -> socket.socket:
    """A listening, non-blocking socket; port 0 picks a free one. `flag` is what the user would change.

    Raises PortInUse, or InvalidInput for a host that is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _bind_failure(error, host, port, flag) from error
    listener.setblocking(False)
    return listener


def bound_address(listener: socket.socket) -> Address:
    """Where a listening socket listens."""
    host, port = listener.getsockname()[:2]
    return Address(host, port)


def _bind_failure(error: OSError, host: str, port: int, flag: str) -> HexmeshError:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} on {host} is in use",
            code="port_in_use",
            next_step=f"choose another with {flag}, or 0 for any free one",
        )
    if error.errno == errno.EACCES:
        return PortInUse(
            f"this user may not listen on port {port}",
            code="port_not_allowed",
            next_step=f"choose a port above 1023 with {flag}",
        )
    return InvalidInput(
        f"cannot listen on {host}: {error.strerror or error}",
        code="bad_listen_address",
        next_step="give an address of this host with --listen",
    )
