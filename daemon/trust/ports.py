"""The ports that a node listened on before: with `--peer-port 0` it comes back where others look for it."""

from __future__ import annotations

import logging

import msgspec

from daemon.peering.address import PortInUse, listen_tcp

progress = logging.getLogger("hexmesh.progress")


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Bound ports; 0 is not known."""

    peer: int = 0
    http: int = 0
    dht: int = 0


def port_to_bind(host: str, asked: int, before: int, *, flag: str) -> int:
    """The port asked for; if any free one will do, the one used before, unless somebody else has it now."""
    if asked or not before:
        return asked
    try:
        listen_tcp(host, before, flag=flag).close()
    except PortInUse:
        progress.warning("port %d, used before, is taken now: %s gets another", before, flag)
        return 0
    return before
