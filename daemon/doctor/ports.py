"""Can a daemon listen where it is told to? A port that this host's own daemon holds is as good as free."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.config import JoinOptions
from daemon.doctor.finding import Finding, failed, not_run, passed, warned
from daemon.doctor.listeners import find_listener, is_of
from daemon.peering.address import (
    PortInUse,
    is_loopback,
    listen_tcp,
)
from daemon.peering.listening import listen_host
from hexmesh.errors import HexmeshError, InvalidInput


@dataclass(frozen=True, slots=True)
class Port:
    """One of the daemon's three."""

    check: str
    flag: str
    host: str
    number: int


def check_listen_address(options: JoinOptions) -> Finding:
    host = listen_host(options)
    for address, flag in ((host, "--listen"), (options.http_listen, "--http-listen")):
        if (refused := _refusal(address)) is not None:
            return failed("listen address", refused.message, f"give an address of this machine with {flag}")
    if is_loopback(host) and options.advertise is None:
        return warned(
            "listen address", f"{host}: only this machine can join", "give --listen IP for a mesh of several"
        )
    others = f"; others dial {options.advertise}" if options.advertise else ""
    return passed("listen address", f"{host} is this machine's{others}")


def check_ports(options: JoinOptions, daemon_pid: int | None) -> list[Finding]:
    """One finding for each of HTTP, peer and DHT. Each port is listened on for a moment."""
    host = listen_host(options)
    return [
        _check_port(port, daemon_pid)
        for port in (
            Port("http port", "--http-port", options.http_listen, options.http_port),
            Port("peer port", "--peer-port", host, options.peer_port),
            Port("dht port", "--dht-port", host, options.dht_port),
        )
    ]


def _check_port(port: Port, daemon_pid: int | None) -> Finding:
    if port.number == 0:
        return passed(port.check, "any free one")
    try:
        listen_tcp(port.host, port.number, flag=port.flag).close()
    except InvalidInput:
        return not_run(port.check, f"{port.host} is not an address to listen on")
    except PortInUse as error:
        if error.code != "port_in_use":
            return failed(port.check, error.message, error.next_step)
        return _taken(port, daemon_pid)
    return passed(port.check, f"{port.number} on {port.host} is free")


def _taken(port: Port, daemon_pid: int | None) -> Finding:
    holder = find_listener(port.number)
    if daemon_pid is not None and holder is not None and is_of(holder.pid, daemon_pid):
        return passed(port.check, f"{port.number} is held by this host's own daemon, process {daemon_pid}")
    by = f" by {holder}" if holder is not None else ""
    return failed(
        port.check,
        f"port {port.number} on {port.host} is in use{by}",
        f"stop that, or choose another port with {port.flag}, or 0 for any free one",
    )


def _refusal(host: str) -> HexmeshError | None:
    try:
        listen_tcp(host, 0, flag="").close()
    except HexmeshError as error:
        return error
    return None
