"""What two members tell each other first on every connection, and what they make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from daemon.peering.tls import TlsFiles
from hexmesh import __version__
from hexmesh.errors import InvalidInput
from hexmesh.ids import NodeId, short
from hexmesh.wire.peering import MAX_TEXT, PROTOCOL_VERSION, Channel, PeerHello, PeerRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPeer:
    """This node as its peers see it. `address` is where they dial it, host:port."""

    node_id: NodeId
    boot: int
    name: str
    address: str
    tls: TlsFiles
    protocol_version: int = PROTOCOL_VERSION
    hexmesh_version: str = __version__
    clock: Callable[[], float] = time.time
    """Unix time as this host has it."""

    def __post_init__(self) -> None:
        check_name(self.name)

    def hello(self, channel: Channel, *, is_call_back: bool = False) -> PeerHello:
        """The first frame of a connection, with this moment's clock."""
        return PeerHello(
            protocol_version=self.protocol_version,
            hexmesh_version=self.hexmesh_version,
            node_id=self.node_id,
            boot=self.boot,
            name=self.name,
            clock_unix_s=self.clock(),
            channel=channel,
            address=self.address,
            is_call_back=is_call_back,
        )


def check_name(name: str) -> None:
    """Raise InvalidInput for a node's name that others would not take."""
    if not name or len(name) > MAX_TEXT or not name.isprintable():
        raise InvalidInput(
            f"a node's name has 1 to {MAX_TEXT} printable characters, not {name[:MAX_TEXT]!r}",
            code="bad_name",
            next_step="give another with --name",
        )


def greeting_fault(local: LocalPeer, hello: PeerHello, certified: NodeId) -> PeerRefused | None:
    """Why this node does not talk to the one that said `hello`; None if it does."""
    if hello.protocol_version != local.protocol_version:
        return PeerRefused(
            code="protocol_mismatch",
            message=(
                f"{hello.name} speaks protocol {hello.protocol_version} (hexmesh {hello.hexmesh_version}) "
                f"and {local.name} speaks protocol {local.protocol_version} (hexmesh {local.hexmesh_version})"
            ),
            next_step="run the same version of hexmesh on both",
        )
    if hello.node_id != certified:
        return PeerRefused(
            code="wrong_node",
            message=f"a certificate of node {short(certified)} was used by node {short(hello.node_id)}",
        )
    return None


def clock_difference_s(local: LocalPeer, hello: PeerHello) -> float:
    """How far the peer's clock is ahead of this host's, to within the time the greeting travelled."""
    return hello.clock_unix_s - local.clock()
