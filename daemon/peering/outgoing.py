"""The connection by which one channel's messages reach one peer: dialled when wanted, redialled when lost."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from daemon.peering.address import Address
from daemon.peering.bulk import BulkSocket
from daemon.peering.connection import FrameConnection, Loss, loss_of, prepare_socket
from daemon.peering.greeting import LocalPeer, greeting_fault
from daemon.peering.outbox import Outbox, OutboxRules
from hexmesh.errors import InvalidInput, Lost, Refused
from hexmesh.identity.certificates import MemberIdentity, read_member
from hexmesh.ids import NodeId, short
from hexmesh.wire import codec
from hexmesh.wire.frames import Buffer, Frame
from hexmesh.wire.peering import JOIN_LIMITS, Channel, PeerHello, PeerRefused

CONNECT_S = 3.0
GREET_S = 5.0
INTEREST_S = 10.0
"""An outgoing connection that broke is redialled this long after the last message for it."""

STALE_S = 1.0
"""Control messages that waited longer than this for a connection are not sent: newer ones say more."""

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0


@dataclass(frozen=True, slots=True)
class DialFailure:
    """Why a dial came to nothing. `is_refused`: the host answered that nobody listens there."""

    loss: Loss
    is_refused: bool = False


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
        """Whom the certificate of the connection named, once one was up."""
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

    def send(self, parts: list[Buffer]) -> bool:
        """Queue a frame, and dial if there is no connection; False when the queue has no room."""
        if not self.outbox.put(parts, self._loop.time()):
            return False
        self.want()
        if self._connection is not None:
            self._connection.wake()
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

    def drop_connection(self) -> None:
        """Close the connection; a new one is made while it is wanted."""
        if self._connection is not None:
            self._connection.close()

    def close(self) -> None:
        """Stop for good."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.close()
        self.outbox.clear()

    async def run(self) -> None:
        """Dial, serve and redial until nobody wants the connection."""
        delay_s = _FIRST_DELAY_S
        while self._loop.time() < self._wanted_until_s:
            self._nudge.clear()
            failure = await self._dial_and_serve()
            if failure is None:
                delay_s = _FIRST_DELAY_S
                continue
            self._owner.on_dial_failed(self, failure)
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

    async def _dial_and_serve(self) -> DialFailure | None:
        """None once a connection was up and is lost again."""
        address = self._owner.address_of(self.node_id)
        if address is None:
            return DialFailure(Loss("closed", f"no address of node {short(self.node_id)} is known"))
        call = _Call(self.node_id, self.channel, address, self._local, self._owner)
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await connect_tcp(address)
            connection = FrameConnection(sock, self._context, call, JOIN_LIMITS, is_server=False)
        except OSError as error:
            return DialFailure(loss_of(error), is_refused=isinstance(error, ConnectionRefusedError))
        try:
            return await self._serve(call, connection)
        finally:
            self._connection = None
            connection.close()

    async def _serve(self, call: _Call, connection: FrameConnection) -> DialFailure | None:
        try:
            async with asyncio.timeout(GREET_S):
                greeted = await call.greeted
        except TimeoutError:
            return DialFailure(Loss("timeout", "the peer did not greet in time"))
        if isinstance(greeted, Loss):
            return DialFailure(greeted)
        if self.channel == "control":
            self.outbox.drop_older_than(self._loop.time() - STALE_S)
        self._connection, self.member = connection, call.member
        self._owner.on_link_up(self, greeted)
        connection.feed_from(self.outbox.take)
        loss = await call.lost
        self._connection = None
        self._owner.on_link_lost(self, loss)
        return None


class _Call:
    """One dial: owner of its connection's events. Its futures have results, never exceptions."""

    def __init__(
        self, node_id: NodeId, channel: Channel, address: Address, local: LocalPeer, judge: Judge
    ) -> None:
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[PeerHello | Loss] = loop.create_future()
        self.lost: asyncio.Future[Loss] = loop.create_future()
        self.member: MemberIdentity | None = None
        self._judge = judge
        self._node_id = node_id
        self._channel = channel
        self._address = address
        self._local = local

    def on_open(self, connection: FrameConnection) -> None:
        certificate = connection.peer_certificate()
        assert certificate is not None  # the context requires one
        try:
            self.member = read_member(certificate)
        except Refused as error:
            connection.close(Loss("tls", error.message))
            return
        found = self.member.node_id
        if found != self._node_id:
            message = f"{self._address} is node {short(found)}, not node {short(self._node_id)}"
            connection.close(Loss("tls", message))
            return
        if (refusal := self._judge.judge(self.member)) is not None:
            connection.close(Loss("tls", refusal.message))
            return
        connection.write(codec.PEERING.frame(self._local.hello(self._channel), limits=JOIN_LIMITS))

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        message = codec.PEERING.decode(frame.header)
        if isinstance(message, PeerHello) and not self.greeted.done():
            fault = greeting_fault(self._local, message, self._node_id)
            if fault is None:
                self.greeted.set_result(message)
                return
            message = fault
        if isinstance(message, PeerRefused):
            if message.proof:
                self._judge.on_proof(message.proof)
            connection.close(Loss("refused", _one_line(message)))
            return
        raise InvalidInput(f"unexpected {type(message).__name__} on an outgoing connection")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        if not self.greeted.done():
            self.greeted.set_result(loss)
        if not self.lost.done():
            self.lost.set_result(loss)


async def dial_bulk(
    local: LocalPeer, context: ssl.SSLContext, node_id: NodeId, address: Address, judge: Judge
) -> BulkSocket:
    """A greeted bulk connection to exactly that node. Raises Lost or Refused."""
    call = _Call(node_id, "bulk", address, local, judge)
    try:
        async with asyncio.timeout(CONNECT_S):
            sock = await connect_tcp(address)
        connection = FrameConnection(sock, context, call, JOIN_LIMITS, is_server=False)
    except OSError as error:
        raise Lost(f"{address}: {loss_of(error).message}", code="unreachable") from error
    try:
        async with asyncio.timeout(GREET_S):
            greeted = await call.greeted
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise Lost(f"{address} did not greet in time", code="unreachable") from error
        raise
    if isinstance(greeted, Loss):
        kind = Refused if greeted.kind in ("refused", "tls") else Lost
        raise kind(f"{address}: {greeted.message}", code="unreachable")
    if connection.is_closed:
        raise Lost(f"{address} hung up", code="unreachable")
    assert call.member is not None
    return BulkSocket(call.member, *connection.detach())


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


def _one_line(refusal: PeerRefused) -> str:
    return f"{refusal.message}; {refusal.next_step}" if refusal.next_step else refusal.message
