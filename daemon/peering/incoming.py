"""One accepted connection: a member that greets and then sends, or asks for a circuit; or a stranger.

A stranger may only ask to join.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Literal, Protocol

import msgspec

from daemon.peering.bulk import BulkSocket
from daemon.peering.connection import FrameConnection, Loss
from daemon.peering.greeting import LocalPeer, greeting_fault
from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.certificates import MemberIdentity, read_member
from hexmesh.wire import codec
from hexmesh.wire.circuits import OpenCircuit, TakeCircuit
from hexmesh.wire.frames import Frame, FrameLimits
from hexmesh.wire.peering import (
    JOIN_LIMITS,
    JOIN_REPLY_LIMITS,
    Channel,
    JoinAccepted,
    JoinRefused,
    JoinRequest,
    MeshRoot,
    PeerHello,
    PeerRefused,
    WantRoot,
)

GREET_S = 5.0
STRANGER_S = 10.0
"""A stranger has joined, or been refused, by then."""


_State = Literal["handshake", "greeting", "member", "circuit", "stranger", "joining", "refused"]


class IncomingOwner(Protocol):
    """The switchboard that accepted the connection."""

    def judge(self, member: MemberIdentity) -> PeerRefused | None:
        """Why the member is refused although its certificate holds; None if it is not."""

    def may_enter(self, stranger: Incoming) -> bool:
        """Whether there is room for one more stranger."""

    def limits_of(self, channel: Channel) -> FrameLimits: ...

    def on_member(self, incoming: Incoming, hello: PeerHello) -> None: ...

    def on_bulk_member(self, incoming: Incoming) -> None: ...

    def on_member_frame(self, incoming: Incoming, frame: Frame) -> None: ...

    def on_circuit(self, incoming: Incoming, request: OpenCircuit | TakeCircuit) -> None:
        """A member wants a circuit on this connection: `become_circuit` or `refuse`."""

    def on_became_circuit(self, incoming: Incoming) -> None:
        """Nothing more will be heard of it."""

    def on_join_request(self, stranger: Incoming, request: JoinRequest) -> None: ...

    def on_incoming_lost(self, incoming: Incoming, loss: Loss) -> None: ...


class Incoming:
    """Owns one accepted socket until it is lost."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        local: LocalPeer,
        owner: IncomingOwner,
        *,
        is_relayed: bool = False,
    ) -> None:
        """Raises OSError when the other side has hung up already."""
        self.member: MemberIdentity | None = None
        self.hello: PeerHello | None = None
        self.channel: Channel = "control"
        self.is_relayed = is_relayed
        """Whether it came as a circuit."""
        self._local = local
        self._owner = owner
        self._state: _State = "handshake"
        self._has_shown_root = False
        self.source = _source_of(sock)
        """The address that it comes from; one that fills the waiting room makes room itself."""
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[Loss] = self._loop.create_future()
        self.connection = FrameConnection(sock, context, self, JOIN_LIMITS, is_server=True)
        self._deadline = self._loop.call_later(GREET_S, self._run_late)

    @property
    def is_member(self) -> bool:
        """Whether the greeting is done, so that messages may come, or a circuit."""
        return self._state in ("member", "circuit")

    @property
    def is_stranger(self) -> bool:
        return self._state in ("stranger", "joining")

    @property
    def is_idle(self) -> bool:
        """Whether nothing is known of it yet that would be lost: no greeting, no request to join."""
        return self._state in ("handshake", "greeting", "stranger", "refused")

    def close(self) -> None:
        self.connection.close()

    def become_circuit(self) -> tuple[ssl.SSLSocket, bytes]:
        """The socket, for good; and what was received on it already. Raises InvalidInput."""
        detached = self.connection.end_frames()
        self._owner.on_became_circuit(self)
        return detached

    def make_room(self) -> None:
        """Close, for others wait to be heard."""
        self.connection.close(Loss("timeout", "closed before it spoke, to make room for others"))

    def detach(self) -> BulkSocket:
        """Give a greeted connection away to a thread."""
        assert self.member is not None
        return BulkSocket(self.member, *self.connection.detach())

    def answer(self, reply: JoinAccepted | JoinRefused) -> None:
        """The end of the joining dialogue."""
        self._say(reply)
        self.connection.close_when_sent()

    def on_open(self, connection: FrameConnection) -> None:
        certificate = connection.peer_certificate()
        if certificate is None:
            self._open_stranger()
            return
        try:
            self.member = read_member(certificate)
        except Refused as error:
            connection.close(Loss("tls", error.message))
            return
        self._state = "greeting"
        if (refusal := self._owner.judge(self.member)) is not None:
            self.refuse(refusal)

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        match self._state:
            case "member":
                self._owner.on_member_frame(self, frame)
            case "greeting":
                self._greet(codec.PEERING.decode(frame.header))
            case "stranger":
                self._hear_stranger(codec.PEERING.decode(frame.header))
            case "handshake" | "circuit" | "joining" | "refused":
                raise InvalidInput("a frame out of turn")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        self._deadline.cancel()
        self.lost.set_result(loss)
        self._owner.on_incoming_lost(self, loss)

    def _open_stranger(self) -> None:
        if not self._owner.may_enter(self):
            self.refuse(
                PeerRefused(
                    code="too_many_strangers",
                    message="too many hosts are joining now",
                    next_step="try again in some seconds",
                )
            )
            return
        self._state = "stranger"
        self._deadline.cancel()
        self._deadline = self._loop.call_later(STRANGER_S, self._run_late)

    def _greet(self, message: msgspec.Struct) -> None:
        assert self.member is not None
        if isinstance(message, OpenCircuit | TakeCircuit):
            self._begin_circuit(message)
            return
        if not isinstance(message, PeerHello):
            raise InvalidInput(f"{type(message).__name__} before a greeting")
        fault = greeting_fault(self._local, message, self.member.node_id)
        if fault is not None:
            self.refuse(fault)
            return
        self._deadline.cancel()
        self._state = "member"
        self.hello = message
        self.channel = message.channel
        self.connection.allow(self._owner.limits_of(message.channel))
        self._say(self._local.hello(message.channel))
        if message.channel == "bulk":
            self._owner.on_bulk_member(self)
        else:
            self._owner.on_member(self, message)

    def _begin_circuit(self, request: OpenCircuit | TakeCircuit) -> None:
        if request.protocol_version != self._local.protocol_version:
            message = f"this node speaks protocol {self._local.protocol_version}"
            self.refuse(PeerRefused(code="protocol_mismatch", message=message))
            return
        self._deadline.cancel()  # from here on the relay's own deadlines hold
        self._state = "circuit"
        self._owner.on_circuit(self, request)

    def _hear_stranger(self, message: msgspec.Struct) -> None:
        match message:
            case WantRoot():
                if self._has_shown_root:  # its answer is many times as long, and nobody needs it twice
                    raise InvalidInput("the root was asked for twice")
                self._has_shown_root = True
                self._say(MeshRoot(root=self._local.tls.root_der, clock_unix_s=self._local.clock()))
            case JoinRequest():
                self._state = "joining"
                self._owner.on_join_request(self, message)
            case _:
                self.refuse(
                    PeerRefused(
                        code="no_certificate",
                        message="only members of this mesh may talk to it, and this connection showed no certificate",
                        next_step="join it with a token",
                    )
                )

    def refuse(self, refusal: PeerRefused) -> None:
        """Say why not, and close."""
        self._state = "refused"
        self._say(refusal)
        self.connection.close_when_sent()

    def _say(self, message: PeerHello | PeerRefused | MeshRoot | JoinAccepted | JoinRefused) -> None:
        self.connection.write(codec.PEERING.frame(message, limits=JOIN_REPLY_LIMITS))

    def _run_late(self) -> None:
        self.connection.close(Loss("timeout", "the other side did not speak in time"))


def _source_of(sock: socket.socket) -> str:
    try:
        name = sock.getpeername()
    except OSError:
        return ""
    return str(name[0]) if name else "a relay"  # an end of a circuit has no name
