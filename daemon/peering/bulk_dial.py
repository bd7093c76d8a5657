"""Dialling for a bulk connection: it is greeted in the event loop, then a thread has it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from dataclasses import dataclass

from daemon.peering.address import Address
from daemon.peering.bulk import BulkSocket
from daemon.peering.connection import FrameConnection, Loss, loss_of
from daemon.peering.greeting import LocalPeer, greeting_fault
from daemon.peering.outgoing import (
    CONNECT_S,
    GREET_S,
    Judge,
    connect_tcp,
    member_of,
    one_line,
    why_not_node,
)
from hexmesh.errors import InvalidInput, Lost, Refused
from hexmesh.ids import NodeId
from hexmesh.wire import codec
from hexmesh.wire.frames import Frame
from hexmesh.wire.peering import JOIN_LIMITS, PeerHello, PeerRefused


@dataclass(frozen=True, slots=True)
class BulkDialler:
    """Who dials, and who knows whom not to talk to."""

    local: LocalPeer
    context: ssl.SSLContext
    judge: Judge

    async def dial(self, node_id: NodeId, address: Address, *, is_call_back: bool = False) -> BulkSocket:
        """A greeted connection to exactly that node. Raises Lost or Refused."""
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await connect_tcp(address)
        except OSError as error:
            raise Lost(f"{address}: {loss_of(error).message}", code="unreachable") from error
        return await self.greet(node_id, sock, str(address), is_call_back=is_call_back)

    async def greet(
        self, node_id: NodeId, sock: socket.socket, where: str, *, is_call_back: bool = False
    ) -> BulkSocket:
        """The same on a socket that is connected. Takes the socket. Raises Lost or Refused."""
        call = _BulkCall(self, node_id, where, is_call_back=is_call_back)
        try:
            connection = FrameConnection(sock, self.context, call, JOIN_LIMITS, is_server=False)
        except OSError as error:
            raise Lost(f"{where}: {loss_of(error).message}", code="unreachable") from error
        try:
            async with asyncio.timeout(GREET_S):
                greeted = await call.greeted
        except BaseException as error:
            connection.close()
            call.drop()
            if isinstance(error, TimeoutError):
                raise Lost(f"{where} did not greet in time", code="unreachable") from error
            raise
        if isinstance(greeted, Loss):
            kind = Refused if greeted.kind in ("refused", "tls") else Lost
            raise kind(f"{where}: {greeted.message}", code="unreachable")
        return greeted


class _BulkCall:
    """One dial: owner of its connection's events until that is given away."""

    def __init__(self, dialler: BulkDialler, node_id: NodeId, where: str, *, is_call_back: bool) -> None:
        self.greeted: asyncio.Future[BulkSocket | Loss] = asyncio.get_running_loop().create_future()
        self._dialler = dialler
        self._node_id = node_id
        self._where = where
        self._is_call_back = is_call_back

    def drop(self) -> None:
        """Nobody waits any more for what may just have come."""
        if self.greeted.done() and not self.greeted.cancelled():
            greeted = self.greeted.result()
            if isinstance(greeted, BulkSocket):
                greeted.close()

    def on_open(self, connection: FrameConnection) -> None:
        wrong = why_not_node(connection, self._node_id, self._where, self._dialler.judge)
        if wrong is not None:
            connection.close(wrong)
            return
        hello = self._dialler.local.hello("bulk", is_call_back=self._is_call_back)
        connection.write(codec.PEERING.frame(hello, limits=JOIN_LIMITS))

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        message = codec.PEERING.decode(frame.header)
        if isinstance(message, PeerHello):
            fault = greeting_fault(self._dialler.local, message, self._node_id)
            if fault is None:
                self._give_away(connection)
                return
            message = fault
        if isinstance(message, PeerRefused):
            if message.proof:
                self._dialler.judge.on_proof(message.proof)
            connection.close(Loss("refused", one_line(message)))
            return
        raise InvalidInput(f"unexpected {type(message).__name__} on an outgoing connection")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        if not self.greeted.done():
            self.greeted.set_result(loss)

    def _give_away(self, connection: FrameConnection) -> None:
        """At once: the bytes after the greeting may be the first question, which is not for the event loop."""
        sock = BulkSocket(member_of(connection), *connection.detach())
        if self.greeted.done():  # cancelled: nobody waits any more
            sock.close()
        else:
            self.greeted.set_result(sock)
