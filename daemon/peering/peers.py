"""Connections between members: messages out and in, and who is up, down or gone.

One-way messages, no replies and no waiting: `send` queues and returns; what arrives is handed to `on_message`
as it comes, in order within one (peer, channel). A message may be lost when its connection is; senders repeat
themselves (control) or are told (`on_channel_lost`). An exception out of a callback, other than InvalidInput,
is a bug of its owner and goes to the loop's exception handler.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec

from daemon.complaints import Complaints
from daemon.peering.acceptor import Acceptor
from daemon.peering.address import Address, bound_address, parse_address
from daemon.peering.bulk import BulkSocket
from daemon.peering.bulk_dial import BulkDialler
from daemon.peering.bulk_ways import BulkWays
from daemon.peering.connection import Loss, prepare_socket
from daemon.peering.crowd import oldest_of_the_crowd
from daemon.peering.greeting import LocalPeer, clock_difference_s
from daemon.peering.incoming import Incoming
from daemon.peering.outbox import OutboxRules
from daemon.peering.outgoing import MOVED, DialFailure, Outgoing
from daemon.peering.peer_events import CHANNELS, ChannelRules, PeerEvents, PeerInfo
from daemon.peering.tls import client_context, load_certificate, server_context
from daemon.peering.ways import Ways
from hexmesh.errors import Busy, HexmeshError, InvalidInput, Lost
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, short
from hexmesh.membership.reach import OwnReach, Way
from hexmesh.wire import codec
from hexmesh.wire.circuits import CallMe, CircuitOffered, OpenCircuit, TakeCircuit, Undialable
from hexmesh.wire.frames import Buffer, Frame, FrameLimits, frame_parts
from hexmesh.wire.peering import (
    MAX_CLOCK_DIFFERENCE_S,
    Channel,
    JoinAccepted,
    JoinRefused,
    JoinRequest,
    PeerHello,
    PeerRefused,
)

__all__ = ["CHANNELS", "ChannelRules", "PeerEvents", "PeerInfo", "PeerNetwork"]

_log = logging.getLogger("hexmesh.peers")

_MAX_STRANGERS = 16
_MAX_UNGREETED = 256
_LAST_WORDS_S = 0.5


@dataclass(slots=True)
class _Peer:
    node_id: NodeId
    address: Address | None = None
    outgoing: dict[Channel, Outgoing] = field(default_factory=dict)
    incoming: dict[Channel, Incoming] = field(default_factory=dict)
    hello: PeerHello | None = None
    clock_difference_s: float | None = None
    is_up: bool = False
    path: tuple[bool, bool] = (False, False)
    """Whether probes there, and back, go through a relay."""
    is_suspect: bool = False
    """A connection of it ended by the other side, and no new one has proved that its process lives."""

    @property
    def is_connected(self) -> bool:
        return bool(self.incoming) or any(link.is_up for link in self.outgoing.values())


class PeerNetwork:
    """Owns the listening socket and all connections. `async with`: entered means listening.

    `decode` reads what members send; give that of a wider union to send more kinds of messages.
    """

    def __init__(
        self,
        local: LocalPeer,
        listener: socket.socket,
        events: PeerEvents,
        *,
        decode: Callable[[Buffer], msgspec.Struct] = codec.MEMBER.decode,
        channels: dict[Channel, ChannelRules] = CHANNELS,
    ) -> None:
        self._local = local
        self._listener = listener
        self.address = bound_address(listener)
        """Where this node listens."""
        self._events = events
        self._decode = decode
        self._channels = channels
        self._peers: dict[NodeId, _Peer] = {}
        self._accepted: dict[Incoming, None] = {}
        """Oldest first."""
        self._server_context = server_context(local.tls)
        self._client_context = client_context(local.tls)
        self._ways = Ways(self, self._client_context, events.on_reach)
        dialler = BulkDialler(local, self._client_context, self)
        self._bulk = BulkWays(self, self._ways, dialler, events.on_bulk)
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaints = Complaints()
        self._is_open = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._group.__aenter__()
        self._is_open = True
        self._acceptor = Acceptor(self._listener, self._welcome)
        self.start(self._ways.keep_checking())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_open = False
        self._acceptor.close()
        self._bulk.abort()
        for peer in self._peers.values():
            for link in peer.outgoing.values():
                link.close()
        for incoming in list(self._accepted):
            incoming.close()
        if error is None:
            await self._ways.drain(_LAST_WORDS_S)
        self._ways.close()
        for task in list(self._tasks):
            task.cancel()
        if isinstance(error, asyncio.CancelledError):
            await self._group.__aexit__(kind, error, traceback)
        else:  # the body's own failure stays what it is
            await self._group.__aexit__(None, None, None)

    def send(
        self, node_id: NodeId, message: msgspec.Struct, payload: Buffer = b"", channel: Channel = "control"
    ) -> None:
        """Queue a message and return; a connection is made if there is none. To this node itself: deliver it.

        The payload must not change until it is sent. Control messages are dropped where they cannot be sent.
        On the other channels raises Busy when the queue is full and Lost when the peer is unknown.
        """
        if node_id == self._local.node_id:
            self._loop.call_soon(self._events.on_message, node_id, message, _own_copy(payload))
            return
        peer = self._peers.get(node_id)
        if not self._is_open or peer is None or peer.address is None:
            if channel != "control":
                raise Lost(f"no way to node {short(node_id)} is known", code="unknown_peer")
            return
        parts = frame_parts(codec.encode(message), payload, self._channels[channel].limits)
        if not self._link(peer, channel).send(parts):
            raise Busy(f"the queue to node {short(node_id)} is full", code="peer_queue_full")

    def connect(self, node_id: NodeId, channel: Channel = "control") -> None:
        """Dial a peer whose address is known before there is anything to say."""
        peer = self._peers.get(node_id)
        if self._is_open and peer is not None and peer.address is not None:
            self._link(peer, channel).want()

    def learn_address(self, node_id: NodeId, host: str, port: int) -> None:
        """Where a peer is dialled from now on."""
        if node_id == self._local.node_id:
            return
        peer = self._peers.setdefault(node_id, _Peer(node_id))
        if peer.address == (address := Address(host, port)):
            return
        peer.address = address
        self._ways.direct(node_id).look_again()
        for link in peer.outgoing.values():
            if not link.is_up:
                link.retry_now()

    @property
    def reach(self) -> OwnReach:
        """Who dials this node, and who cannot."""
        return self._ways.reach

    def learn_reach(self, node_id: NodeId, *, is_relay: bool, is_dialable: bool) -> None:
        """What a peer's record says: whether it joins circuits, and whether others can dial it."""
        if node_id == self._local.node_id:
            return
        self._ways.learn(node_id, is_relay=is_relay, is_dialable=is_dialable)

    def forget(self, node_id: NodeId) -> None:
        """Close everything with a peer and drop what is known of it, without telling; it may come back."""
        self._bulk.abort(lambda member: member.node_id == node_id)
        self._ways.forget(node_id)
        if self._events.relay is not None:
            self._events.relay.forget(node_id)
        peer = self._peers.pop(node_id, None)
        if peer is None:
            return
        for link in peer.outgoing.values():
            link.close()
        for incoming in list(peer.incoming.values()):
            incoming.close()

    def review(self) -> None:
        """Judge anew who is connected, and close the connections of those that are refused by now."""
        for incoming in list(self._accepted):
            if incoming.member is not None and self._is_refused(incoming.member):
                incoming.close()
        for peer in list(self._peers.values()):
            for link in peer.outgoing.values():
                if link.is_up and link.member is not None and self._is_refused(link.member):
                    link.drop_connection()
        self._bulk.abort(self._is_refused)

    def reload_certificate(self) -> None:
        """Show the certificate that the files hold now, on connections made from now on."""
        load_certificate(self._server_context, self._local.tls)
        load_certificate(self._client_context, self._local.tls)

    async def open_bulk(self, node_id: NodeId) -> BulkSocket:
        """A connection to a peer for blocking use in a thread; the caller closes it. Raises Lost or Refused."""
        if not self._is_open:
            raise Lost("this node leaves", code="leaving")
        return await self._bulk.open(node_id)

    def queued_bytes(self, node_id: NodeId, channel: Channel) -> int:
        """What waits to be sent to a peer."""
        peer = self._peers.get(node_id)
        link = peer.outgoing.get(channel) if peer is not None else None
        return link.outbox.n_bytes if link is not None else 0

    def peers(self) -> list[PeerInfo]:
        """A snapshot of everybody known."""
        return [self._info(peer) for peer in self._peers.values()]

    def peer(self, node_id: NodeId) -> PeerInfo | None:
        """A snapshot of one peer."""
        peer = self._peers.get(node_id)
        return self._info(peer) if peer is not None else None

    def _info(self, peer: _Peer) -> PeerInfo:
        hello, direct, control = peer.hello, self._ways.direct(peer.node_id), peer.outgoing.get("control")
        return PeerInfo(
            node_id=peer.node_id,
            address=peer.address,
            is_up=peer.is_up,
            name=hello.name if hello is not None else "",
            boot=hello.boot if hello is not None else None,
            hexmesh_version=hello.hexmesh_version if hello is not None else "",
            clock_difference_s=peer.clock_difference_s,
            why_undialable=None if direct.is_open else direct.reason,
            undialable_s=direct.closed_s(self._loop.time()),
            way=control.way if control is not None and control.is_up else None,
        )

    async def flush(self, timeout_s: float) -> bool:
        """Wait until live connections have sent what is queued, before leaving; False if time ran out."""
        stop_s = self._loop.time() + timeout_s
        while any(link.has_unsent for peer in self._peers.values() for link in peer.outgoing.values()):
            if self._loop.time() >= stop_s:
                return False
            await asyncio.sleep(0.002)
        return True

    # What links and accepted connections report.

    def address_of(self, node_id: NodeId) -> Address | None:
        peer = self._peers.get(node_id)
        return peer.address if peer is not None else None

    def is_up(self, node_id: NodeId) -> bool:
        peer = self._peers.get(node_id)
        return peer is not None and peer.is_up

    def incoming_of(self, node_id: NodeId) -> Mapping[Channel, Incoming]:
        peer = self._peers.get(node_id)
        return peer.incoming if peer is not None else {}

    def outgoing_of(self, node_id: NodeId) -> Iterable[Outgoing]:
        peer = self._peers.get(node_id)
        return peer.outgoing.values() if peer is not None else ()

    def way_of(self, link: Outgoing) -> Way:
        return self._ways.way_of(link)

    async def called_back(self, link: Outgoing) -> Incoming:
        return await self._ways.called_back(link)

    async def open_circuit(self, link: Outgoing) -> socket.socket:
        return await self._ways.open_circuit(link.node_id, link.n_failures // 2)

    def on_link_up(self, link: Outgoing, hello: PeerHello) -> None:
        peer = self._peers.get(link.node_id)
        if peer is None:
            return
        self._greeted(peer, hello, link)
        self._ways.came_up(link)
        self._note_path(peer)

    def on_link_lost(self, link: Outgoing, loss: Loss) -> None:
        if loss is MOVED:
            return
        if link.channel != "control":
            link.outbox.clear()
        peer = self._peers.get(link.node_id)
        if not self._is_open or peer is None:
            return
        self._events.on_channel_lost(link.node_id, link.channel, loss.message)
        self._lost(peer, loss)

    def on_dial_failed(self, link: Outgoing, failure: DialFailure) -> None:
        peer = self._peers.get(link.node_id)
        if not self._is_open or peer is None:
            return
        if failure.loss.kind in ("tls", "refused", "protocol") or failure.way != "direct":
            self.complain(short(link.node_id), failure.loss.message)
        is_news = not self._ways.direct(peer.node_id).was_closed_before(self._loop.time())
        if failure.way == "direct":
            self._ways.dial_failed(peer.node_id, failure.loss)
        has_untried_way = link.n_failures == 1 and self.way_of(link) != failure.way
        if link.channel != "control" and not has_untried_way and link.outbox.clear():
            self._events.on_channel_lost(link.node_id, link.channel, failure.loss.message)
        if failure.is_refused and is_news and peer.is_suspect and not peer.is_connected:
            peer.is_suspect = False
            _log.info("peer gone node=%s reason=its host refuses connections", short(peer.node_id))
            self._events.on_refused(peer.node_id)

    def on_frame_back(self, link: Outgoing, frame: Frame) -> None:
        self._hear(link.node_id, frame)

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        return self._events.judge(member)

    def on_proof(self, revocation: bytes) -> None:
        self._events.on_proof(revocation)

    def may_enter(self, stranger: Incoming) -> bool:
        strangers = [other for other in self._accepted if other.is_stranger]
        if len(strangers) < _MAX_STRANGERS:
            return True
        idlest = oldest_of_the_crowd([other for other in strangers if other.is_idle])
        if idlest is None or idlest.source == stranger.source:
            return False
        idlest.make_room()
        return True

    def limits_of(self, channel: Channel) -> FrameLimits:
        return self._channels[channel].limits

    def on_member(self, incoming: Incoming, hello: PeerHello) -> None:
        assert incoming.member is not None
        node_id = incoming.member.node_id
        peer = self._peers.setdefault(node_id, _Peer(node_id))
        older = peer.incoming.pop(incoming.channel, None)
        if older is not None:
            older.close()
        self._greeted(peer, hello)
        peer.incoming[incoming.channel] = incoming
        self._ways.arrived(node_id, is_relayed=incoming.is_relayed)
        self._note_path(peer)

    def on_bulk_member(self, incoming: Incoming) -> None:
        self._accepted.pop(incoming, None)
        self._bulk.accept(incoming)

    def on_member_frame(self, incoming: Incoming, frame: Frame) -> None:
        assert incoming.member is not None
        self._hear(incoming.member.node_id, frame)

    def on_circuit(self, incoming: Incoming, request: OpenCircuit | TakeCircuit) -> None:
        if self._events.relay is None:
            refusal = PeerRefused(
                code="no_relay", message="this node relays for nobody", next_step="run hexmesh bootstrap"
            )
            incoming.refuse(refusal)
        else:
            self._events.relay.on_circuit(incoming, request)

    def on_became_circuit(self, incoming: Incoming) -> None:
        self._accepted.pop(incoming, None)

    def on_join_request(self, stranger: Incoming, request: JoinRequest) -> None:
        self.start(self._admit(stranger, request))

    def on_incoming_lost(self, incoming: Incoming, loss: Loss) -> None:
        self._accepted.pop(incoming, None)
        if not self._is_open:
            return
        if loss.kind in ("tls", "protocol", "timeout"):
            who = short(incoming.member.node_id) if incoming.member is not None else "unknown"
            self.complain(who, loss.message)
        if incoming.member is None:
            return
        peer = self._peers.get(incoming.member.node_id)
        if peer is not None and peer.incoming.get(incoming.channel) is incoming:
            del peer.incoming[incoming.channel]
            self._note_path(peer)
            self._lost(peer, loss)

    def _is_refused(self, member: MemberIdentity) -> bool:
        refusal = self._events.judge(member)
        if refusal is not None:
            self.complain(short(member.node_id), refusal.message)
        return refusal is not None

    def complain(self, who: str, reason: str) -> None:
        """Say once a minute why nothing comes of a connection: the other side may try again for ever."""
        if self._complaints.is_news(who, reason, self._loop.time()):
            _log.warning("no connection node=%s reason=%s", who, reason)

    def _hear(self, node_id: NodeId, frame: Frame) -> None:
        """A message of a member: about connections, or for the owner."""
        match message := self._decode(frame.header):
            case CallMe(channel="bulk"):
                self._bulk.call_back(node_id)
            case CallMe():
                self.connect(node_id, message.channel)
            case Undialable() if message.address != self._local.address:
                pass  # it is about to learn the present one
            case Undialable() | CircuitOffered():
                self._ways.receive(node_id, message)
            case _:
                self._events.on_message(node_id, message, frame.payload)

    # How a peer comes and goes.

    def _greeted(self, peer: _Peer, hello: PeerHello, link: Outgoing | None = None) -> None:
        """A connection with the peer is up: note what it said, and who is up for the first time."""
        if peer.hello is not None and peer.hello.boot != hello.boot:
            self._restarted(peer, link)
        peer.is_suspect = False
        peer.hello = hello
        peer.clock_difference_s = clock_difference_s(self._local, hello)
        if abs(peer.clock_difference_s) > MAX_CLOCK_DIFFERENCE_S and not peer.is_up:
            _log.warning(
                "clocks differ node=%s by_s=%.1f next_step=synchronise both with NTP",
                short(peer.node_id),
                peer.clock_difference_s,
            )
        if hello.address:
            self._learn_from(peer, hello.address)
        if not peer.is_up:
            peer.is_up = True
            self._ways.direct(peer.node_id).look_again()
            _log.info("peer up node=%s name=%s", short(peer.node_id), hello.name)
            self._events.on_peer_up(peer.node_id)

    def _note_path(self, peer: _Peer) -> None:
        """A round trip changes with the way there and with the way back, and those change at different times."""
        there, back = peer.outgoing.get("probe"), peer.incoming.get("probe")
        path = (
            there.is_relayed if there is not None and there.is_up else peer.path[0],
            back is not None and back.is_relayed,
        )
        if path != peer.path:
            peer.path = path
            self._events.on_path(peer.node_id, path[0])

    def _learn_from(self, peer: _Peer, address: str) -> None:
        try:
            found = parse_address(address)
        except InvalidInput:
            return
        self.learn_address(peer.node_id, found.host, found.port)

    def _restarted(self, peer: _Peer, newest: Outgoing | None) -> None:
        """What is left of the connections with the former boot leads nowhere."""
        self._down(peer, "it restarted")
        for incoming in list(peer.incoming.values()):
            incoming.close()
        for link in peer.outgoing.values():
            if link is not newest:
                link.drop_connection()

    def _lost(self, peer: _Peer, loss: Loss) -> None:
        if not peer.is_connected:
            self._down(peer, loss.message)
        if loss.is_peers_doing and peer.address is not None:
            peer.is_suspect = True
            link = self._link(peer, "control")
            if not link.is_up:
                link.retry_now()

    def _down(self, peer: _Peer, reason: str) -> None:
        if peer.is_up:
            peer.is_up = False
            _log.info("peer down node=%s reason=%s", short(peer.node_id), reason)
            self._events.on_peer_down(peer.node_id, reason)

    def _link(self, peer: _Peer, channel: Channel) -> Outgoing:
        link = peer.outgoing.get(channel)
        if link is None:
            rules = self._channels[channel]
            link = peer.outgoing[channel] = Outgoing(
                peer.node_id,
                channel,
                OutboxRules(rules.queue_bytes, rules.drops_oldest),
                self._local,
                self._client_context,
                self,
                lambda link: self.start(link.run()),
            )
        return link

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Accepting.

    def _welcome(self, sock: socket.socket) -> None:
        waiting = [incoming for incoming in self._accepted if not incoming.is_member]
        if len(waiting) >= _MAX_UNGREETED:
            idlest = oldest_of_the_crowd([incoming for incoming in waiting if incoming.is_idle])
            if idlest is None:
                sock.close()
                return
            idlest.make_room()
        try:
            prepare_socket(sock)
        except OSError:  # it hung up already
            sock.close()
            return
        self._accept(sock)

    def _accept(self, sock: socket.socket, *, is_relayed: bool = False) -> None:
        """Speak to who dialled, on a socket that is ready."""
        try:
            incoming = Incoming(sock, self._server_context, self._local, self, is_relayed=is_relayed)
        except OSError:  # it hung up already
            sock.close()
            return
        self._accepted[incoming] = None

    def accept_circuit(self, sock: socket.socket) -> None:
        self._accept(sock, is_relayed=True)

    async def _admit(self, stranger: Incoming, request: JoinRequest) -> None:
        if self._events.admit is None:
            reply: JoinAccepted | JoinRefused = JoinRefused(
                code="not_admitting", message="this node does not admit others"
            )
        else:
            try:
                reply = await self._events.admit(request)
            except HexmeshError as error:
                reply = JoinRefused(code=error.code, message=error.message, next_step=error.next_step)
        stranger.answer(reply)


def _own_copy(payload: Buffer) -> memoryview:
    """A payload that its receiver may keep and write to, as one that came over a socket."""
    return memoryview(bytearray(memoryview(payload).cast("B") if payload else b""))
