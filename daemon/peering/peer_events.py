"""What a peer network is told and tells: its channels' limits, its owner's callbacks, its view of a peer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from daemon.peering.address import Address
from daemon.peering.bulk import BulkSocket
from daemon.peering.incoming import Incoming
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId
from hexmesh.membership.reach import Way
from hexmesh.wire.circuits import OpenCircuit, TakeCircuit
from hexmesh.wire.frames import FrameLimits
from hexmesh.wire.peering import Channel, JoinAccepted, JoinRefused, JoinRequest, PeerRefused

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRules:
    """How much one channel carries: largest frame received or sent, and what waits to be sent."""

    limits: FrameLimits
    queue_bytes: int
    drops_oldest: bool


CHANNELS: dict[Channel, ChannelRules] = {
    "control": ChannelRules(
        limits=FrameLimits(payload_bytes=16 * _MIB), queue_bytes=4 * _MIB, drops_oldest=True
    ),
    "data": ChannelRules(
        limits=FrameLimits(header_bytes=4 * _MIB), queue_bytes=64 * _MIB, drops_oldest=False
    ),
    "probe": ChannelRules(limits=FrameLimits(payload_bytes=_MIB), queue_bytes=64 * _MIB, drops_oldest=False),
    "bulk": ChannelRules(limits=FrameLimits(), queue_bytes=0, drops_oldest=False),
}


class CircuitRelay(Protocol):
    """Joins members' connections in pairs."""

    def on_circuit(self, incoming: Incoming, request: OpenCircuit | TakeCircuit) -> None: ...

    def forget(self, node: NodeId) -> None:
        """The node is no member any more, or everything with it is closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerEvents:
    """Synchronous callbacks, made in the event loop; they must not block.

    `on_message(peer, message, payload)`: the payload is the receiver's to keep. `on_peer_up` comes before a
    peer's first message. `on_peer_down(peer, reason)`: its last connection is gone, or it restarted.
    `on_refused(peer)`: its connections ended and its host answered a redial with "nobody listens", so the
    process is gone. `on_channel_lost(peer, channel, reason)`: messages sent on it may not have arrived.
    `on_bulk(socket)`: a member opened a bulk connection; the callee serves and closes it. None: none are taken.
    `on_path(peer, is_relayed)`: probes, or what answers them, take another path than before; whether probes go
    through a relay.
    `on_reach`: whether others can dial this node has changed. `admit` answers strangers that ask to join; None
    refuses them all. `judge(member)` says why a certificate that holds is refused all the same; it is asked at
    every handshake, and of live connections by `review`. `on_proof(revocation)`: a peer refused us and sent this
    as its reason; nothing about it is verified. `relay` answers members that ask for circuits; None refuses them all.
    """

    on_message: Callable[[NodeId, msgspec.Struct, memoryview], None]
    on_peer_up: Callable[[NodeId], None] = lambda node_id: None
    on_peer_down: Callable[[NodeId, str], None] = lambda node_id, reason: None
    on_refused: Callable[[NodeId], None] = lambda node_id: None
    on_channel_lost: Callable[[NodeId, Channel, str], None] = lambda node_id, channel, reason: None
    on_bulk: Callable[[BulkSocket], None] | None = None
    on_path: Callable[[NodeId, bool], None] = lambda node_id, is_relayed: None
    on_reach: Callable[[], None] = lambda: None
    admit: Callable[[JoinRequest], Awaitable[JoinAccepted | JoinRefused]] | None = None
    judge: Callable[[MemberIdentity], PeerRefused | None] = lambda member: None
    on_proof: Callable[[bytes], None] = lambda revocation: None
    relay: CircuitRelay | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerInfo:
    """A snapshot of what connections have told about a peer."""

    node_id: NodeId
    address: Address | None
    is_up: bool
    name: str
    boot: int | None
    hexmesh_version: str
    clock_difference_s: float | None
    """How far its clock is ahead of ours."""
    why_undialable: str | None
    """Why this node cannot dial it; None if it can, or has not tried."""
    undialable_s: float | None
    """For how long that is so."""
    way: Way | None
    """How control messages reach it now."""
