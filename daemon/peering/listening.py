"""Where a daemon listens for peers when it is not told."""

from __future__ import annotations

from daemon.config import JoinOptions
from daemon.peering.address import LOOPBACK, default_listen_host, is_loopback, parse_address
from hexmesh.identity.tokens import parse_token


def listen_host(options: JoinOptions) -> str:
    """As told, or beside a peer on loopback, or by the default route. Raises InvalidInput for a bad peer or token."""
    if options.listen:
        return options.listen
    peer = options.peer or (parse_token(options.token).address if options.token else None)
    if peer is not None and is_loopback(parse_address(peer).host):
        return LOOPBACK
    return default_listen_host()
