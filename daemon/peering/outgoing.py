"""The connection by which one channel's messages reach one peer: got when wanted, got again when lost.

It is dialled; or, where the peer cannot be dialled, it is one that the peer dialled (connections carry frames
both ways), or a circuit through a relay.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, assert_never

from daemon.peering.address import Address
from daemon.peering.connection import CLOSED_HERE, FrameConnection, Loss, loss_of, prepare_socket
from daemon.peering.greeting import LocalPeer, greeting_fault
from daemon.peering.incoming import Incoming
from daemon.peering.outbox import Outbox, OutboxRules
from hexmesh.errors import InvalidInput, Lost, Refused
from hexmesh.identity.certificates import MemberIdentity, read_member
from hexmesh.ids import NodeId, short
from hexmesh.membership.reach import Way
from hexmesh.wire import codec
from hexmesh.wire.frames import Buffer, Frame, FrameLimits
from hexmesh.wire.peering import JOIN_LIMITS, Channel, PeerHello, PeerRefused

CONNECT_S = 3.0
GREET_S = 5.0
INTEREST_S = 10.0
"""An outgoing connection that broke is redialled this long after the last message for it."""

STALE_S = 1.0
"""Control messages that waited longer than this for a connection are not sent: newer ones say more."""

MOVED = Loss("closed", "its messages take another way now")
"""Nothing was under way when the connection was left."""

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class DialFailure:
    """Why no connection was got. `is_refused`: the host answered a dial with "nobody listens here"."""

    loss: Loss
    is_refused: bool = False
    way: Way = "direct"


class Judge(Protocol):
    """Who knows which members were removed."""

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        """Why the member is refused although its certificate holds; None if it is not."""

    def on_proof(self, revocation: bytes) -> None:
        """The peer says that this was why it refused us."""


class NoVerdicts:
    """The judge of a node that is about to come into the mesh: those inside judge it."""

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        return None

    def on_proof(self, revocation: bytes) -> None:
        pass


class OutgoingOwner(Judge, Protocol):
    """The switchboard that a link belongs to."""

    def address_of(self, node_id: NodeId) -> Address | None: ...

    def limits_of(self, channel: Channel) -> FrameLimits: ...

    def way_of(self, link: Outgoing) -> Way:
        """How to get a connection now."""

    async def called_back(self, link: Outgoing) -> Incoming:
        """The connection that the peer made for this channel, asked for if there is none. Raises Lost."""

    async def open_circuit(self, link: Outgoing) -> socket.socket:
        """A socket with the peer at its other end. Raises Lost."""

    def on_frame_back(self, link: Outgoing, frame: Frame) -> None:
        """The peer, which does not dial this node for this channel, sent on the same connection."""

    def on_link_up(self, link: Outgoing, hello: PeerHello) -> None: ...

    def on_link_lost(self, link: Outgoing, loss: Loss) -> None: ...

    def on_dial_failed(self, link: Outgoing, failure: DialFailure) -> None: ...


class Outgoing:
    """Owns the queue and the connection of (peer, channel). `spawn` starts its task in the owner's group."""

    def __init__(
        self,
        node_id: NodeId,
        channel: Channel,
        rules: OutboxRules,
        local: LocalPeer,
        context: ssl.SSLContext,
        owner: OutgoingOwner,
        spawn: Callable[[Outgoing], asyncio.Task[None]],
    ) -> None:
        self.node_id = node_id
        self.channel = channel
        self.outbox = Outbox(rules)
        self._local = local
        self._context = context
        self._owner = owner
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._connection: FrameConnection | None = None
        self.member: MemberIdentity | None = None
        """Whom the certificate of the present connection, or the last one, names."""
        self._ended: asyncio.Future[Loss] = self._loop.create_future()
        self._moved_s = 0.0
        self.way: Way = "direct"
        """How the present connection, or the last one, was got."""
        self.is_relayed = False
        """Whether that is through a relay."""
        self.n_failures = 0
        """Tries since there was a connection."""
        self.failed: Way | None = None
        """The last of them."""
        self._task: asyncio.Task[None] | None = None
        self._wanted_until_s = 0.0
        self._nudge = asyncio.Event()

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    @property
    def has_unsent(self) -> bool:
        """Whether a live connection still has something to write."""
        return self._connection is not None and (len(self.outbox) > 0 or self._connection.has_unsent)

    def is_quiet(self, for_s: float) -> bool:
        """Whether nothing waits, and nothing was sent or received here for so long."""
        return not self.has_unsent and self._loop.time() - self._moved_s > for_s

    def send(self, parts: list[Buffer]) -> bool:
        """Queue a frame, and dial if there is no connection; False when the queue has no room.

        What takes part in a step is written at once.
        """
        now_s = self._loop.time()
        connection = self._connection
        is_written = (
            connection is not None
            and self.channel == "data"
            and not len(self.outbox)
            and connection.write_now(parts)
        )
        if not is_written and not self.outbox.put(parts, now_s):
            return False
        self.want()
        self._moved_s = now_s
        if connection is not None and not is_written:
            connection.wake()
        return True

    def want(self) -> None:
        """Keep the connection, or keep trying to get one, for INTEREST_S from now."""
        self._wanted_until_s = self._loop.time() + INTEREST_S
        if self._task is None or self._task.done():
            self._task = self._spawn(self)

    def retry_now(self) -> None:
        """Do not sit out the pause between two dials."""
        self._nudge.set()
        self.want()

    def drop_connection(self, loss: Loss = CLOSED_HERE) -> None:
        """Let the connection go; a new one is made while it is wanted."""
        if self._connection is not None and not self._ended.done():
            self._connection.stop_feeding()  # what comes now waits for the next one
            self._ended.set_result(loss)

    def close(self) -> None:
        """Stop for good."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None and self.way != "accepted":
            self._connection.close()
        self.outbox.clear()

    async def run(self) -> None:
        """Connect, serve and connect again until nobody wants the connection."""
        delay_s = _FIRST_DELAY_S
        while self._loop.time() < self._wanted_until_s:
            self._nudge.clear()
            failure = await self._connect_and_serve()
            if failure is None:
                delay_s = _FIRST_DELAY_S
                self.n_failures, self.failed = 0, None
                continue
            self.n_failures, self.failed = self.n_failures + 1, failure.way
            self._owner.on_dial_failed(self, failure)
            if self.n_failures == 1 and self._owner.way_of(self) != failure.way:
                continue
            await self._pause(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def _pause(self, delay_s: float) -> None:
        if self._nudge.is_set():
            delay_s = _FIRST_DELAY_S
            self._nudge.clear()
        try:
            async with asyncio.timeout(delay_s):
                await self._nudge.wait()
        except TimeoutError:
            return

    async def _connect_and_serve(self) -> DialFailure | None:
        """None once a connection was up and is lost again."""
        way = self._owner.way_of(self)
        try:
            match way:
                case "direct":
                    return await self._dial()
                case "accepted" | "call_back":
                    return await self._borrow(await self._owner.called_back(self))
                case "circuit":
                    sock = await self._owner.open_circuit(self)
                    return await self._greet_and_serve(sock, "its end of a circuit", "circuit")
                case _:
                    assert_never(way)
        except Lost as error:
            return DialFailure(Loss("closed", error.message), way=way)

    async def _dial(self) -> DialFailure | None:
        address = self._owner.address_of(self.node_id)
        if address is None:
            return DialFailure(Loss("closed", f"no address of node {short(self.node_id)} is known"))
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await connect_tcp(address)
        except OSError as error:
            return DialFailure(loss_of(error), is_refused=isinstance(error, ConnectionRefusedError))
        return await self._greet_and_serve(sock, str(address), "direct")

    async def _greet_and_serve(self, sock: socket.socket, where: str, way: Way) -> DialFailure | None:
        call = _Call(self, self._owner, where, way)
        try:
            connection = FrameConnection(sock, self._context, call, JOIN_LIMITS, is_server=False)
        except OSError as error:
            return DialFailure(loss_of(error), way=way)
        try:
            return await self._serve_call(call)
        finally:
            self._connection = None
            connection.close()

    async def _serve_call(self, call: _Call) -> DialFailure | None:
        try:
            async with asyncio.timeout(GREET_S):
                greeted = await call.greeted
        except TimeoutError:
            return DialFailure(Loss("timeout", "the peer did not greet in time"), way=call.way)
        if isinstance(greeted, Loss):
            return DialFailure(greeted, way=call.way)
        await self._serve()
        return None

    async def _borrow(self, incoming: Incoming) -> DialFailure | None:
        """Send on a connection that the peer dialled."""
        assert incoming.hello is not None
        self.carried_by(incoming.connection, incoming.hello, "accepted", is_relayed=incoming.is_relayed)
        ended = self._ended
        incoming.lost.add_done_callback(lambda lost: _end(ended, lost.result()))
        try:
            await self._serve()
        finally:
            incoming.connection.stop_feeding()
            self._connection = None
        return None

    async def _serve(self) -> None:
        loss = await self._ended
        self._connection = None
        self._owner.on_link_lost(self, loss)

    # What its dial, or the connection that it borrows, reports.

    def carried_by(
        self, connection: FrameConnection, hello: PeerHello, way: Way, *, is_relayed: bool
    ) -> None:
        """Messages go out on `connection` from now on."""
        if self.channel == "control":
            self.outbox.drop_older_than(self._loop.time() - STALE_S)
        self._ended = self._loop.create_future()
        self.way, self.is_relayed = way, is_relayed
        self._connection, self.member = connection, member_of(connection)
        self._owner.on_link_up(self, hello)
        connection.feed_from(self.outbox.take)

    def heard_back(self, frame: Frame) -> None:
        """A frame came on the connection that this side dialled."""
        self._moved_s = self._loop.time()
        self._owner.on_frame_back(self, frame)

    def hello(self) -> PeerHello:
        return self._local.hello(self.channel)

    def fault_of(self, hello: PeerHello) -> PeerRefused | None:
        return greeting_fault(self._local, hello, self.node_id)

    def limits(self) -> FrameLimits:
        return self._owner.limits_of(self.channel)


class _Call:
    """One dial: owner of its connection's events. `greeted` has a result, never an exception."""

    def __init__(self, link: Outgoing, judge: Judge, where: str, way: Way) -> None:
        self.greeted: asyncio.Future[PeerHello | Loss] = asyncio.get_running_loop().create_future()
        self.way = way
        self._link = link
        self._judge = judge
        self._where = where

    def on_open(self, connection: FrameConnection) -> None:
        if (wrong := why_not_node(connection, self._link.node_id, self._where, self._judge)) is not None:
            connection.close(wrong)
            return
        connection.write(codec.PEERING.frame(self._link.hello(), limits=JOIN_LIMITS))

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        if self.greeted.done():
            self._link.heard_back(frame)
            return
        message = codec.PEERING.decode(frame.header)
        if isinstance(message, PeerHello):
            fault = self._link.fault_of(message)
            if fault is None:
                connection.allow(self._link.limits())
                self.greeted.set_result(message)
                self._link.carried_by(connection, message, self.way, is_relayed=self.way == "circuit")
                return
            message = fault
        if isinstance(message, PeerRefused):
            if message.proof:
                self._judge.on_proof(message.proof)
            connection.close(Loss("refused", one_line(message)))
            return
        raise InvalidInput(f"unexpected {type(message).__name__} on an outgoing connection")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        if self.greeted.done():
            self._link.drop_connection(loss)
        else:
            self.greeted.set_result(loss)


def _end(ended: asyncio.Future[Loss], loss: Loss) -> None:
    if not ended.done():
        ended.set_result(loss)


def member_of(connection: FrameConnection) -> MemberIdentity:
    """Whom a member's certificate names. Raises Refused."""
    certificate = connection.peer_certificate()
    assert certificate is not None  # a client's context requires one, and a server asked before
    return read_member(certificate)


def why_not_node(connection: FrameConnection, node_id: NodeId, where: str, judge: Judge) -> Loss | None:
    """Why the one that was dialled is not `node_id`, or is refused; None when all is well."""
    try:
        member = member_of(connection)
    except Refused as error:
        return Loss("tls", error.message)
    if member.node_id != node_id:
        return Loss("tls", f"{where} is node {short(member.node_id)}, not node {short(node_id)}")
    refusal = judge.judge(member)
    return Loss("tls", refusal.message) if refusal is not None else None


async def connect_tcp(address: Address) -> socket.socket:
    """A connected socket, ready for FrameConnection. Raises OSError."""
    loop = asyncio.get_running_loop()
    failure: OSError = OSError(f"no address found for {address.host}")
    for family, where in await _resolve(address):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            prepare_socket(sock)
            await loop.sock_connect(sock, where)
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


async def _resolve(address: Address) -> list[tuple[int, tuple[str, int]]]:
    try:
        version = ipaddress.ip_address(address.host).version
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM
        )
        return [(family, (str(where[0]), int(where[1]))) for family, _, _, _, where in found]
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    return [(family, (address.host, address.port))]


def one_line(refusal: PeerRefused) -> str:
    """Why not, and what to do next."""
    return f"{refusal.message}; {refusal.next_step}" if refusal.next_step else refusal.message
