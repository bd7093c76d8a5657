"""This node's ends of circuits: dial the relay, and get a socket on which the other end's TLS can be spoken.

The relay is dialled as any member is, with mutual TLS; inside it runs the TLS of the two ends, so the relay
sees ciphertext and can stand in for neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from daemon.peering.address import Address
from daemon.peering.connection import FrameConnection, Loss, loss_of
from daemon.peering.outgoing import CONNECT_S, Judge, connect_tcp, why_not_node
from daemon.peering.splice import Splice
from hexmesh.errors import InvalidInput, Lost
from hexmesh.ids import NodeId, short
from hexmesh.membership.circuits import OFFER_S
from hexmesh.wire import codec
from hexmesh.wire.circuits import CircuitReady, OpenCircuit, TakeCircuit
from hexmesh.wire.frames import Frame
from hexmesh.wire.peering import JOIN_LIMITS, PeerRefused

ANSWER_S = OFFER_S + 1.0
"""A relay answers by then: it waits OFFER_S for the other end."""


class Circuits:
    """Owner of the connections to relays that carry circuits."""

    def __init__(self, context: ssl.SSLContext, judge: Judge) -> None:
        self._context = context
        self._judge = judge
        self._splices: set[Splice] = set()
        self._all_ended = asyncio.Event()

    async def drain(self, patience_s: float) -> None:
        """Let circuits whose ends here are closed pass on their last bytes."""
        if self._splices:
            self._all_ended.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._all_ended.wait()

    def close(self) -> None:
        """End all circuits."""
        for splice in list(self._splices):
            splice.close()

    async def dial(
        self, relay: NodeId, address: Address, request: OpenCircuit | TakeCircuit
    ) -> socket.socket:
        """A connected socket whose other end is the node at the circuit's far end.

        Raises Lost, with the reason, when the relay cannot be reached or refuses.
        """
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await connect_tcp(address)
            call = _RelayCall(relay, request, self._judge)
            connection = FrameConnection(sock, self._context, call, JOIN_LIMITS, is_server=False)
        except OSError as error:
            raise Lost(f"relay {short(relay)} at {address}: {loss_of(error).message}") from error
        try:
            async with asyncio.timeout(ANSWER_S):
                joined = await call.joined
        except TimeoutError:
            raise Lost(f"relay {short(relay)} did not answer in time") from None
        finally:
            connection.close()  # nothing happens to one that was detached
        if isinstance(joined, Loss):
            raise Lost(f"relay {short(relay)}: {joined.message}")
        return self._join(*joined)

    def _join(self, outer: ssl.SSLSocket, received: bytes) -> socket.socket:
        inner, far = socket.socketpair()
        inner.setblocking(False)
        far.setblocking(False)
        self._splices.add(Splice(outer, inner, self._note_end, to_other=received))
        return far

    def _note_end(self, splice: Splice) -> None:
        self._splices.discard(splice)
        if not self._splices:
            self._all_ended.set()


class _RelayCall:
    """One dial of a relay: owner of the connection's events until it becomes a circuit."""

    def __init__(self, relay: NodeId, request: OpenCircuit | TakeCircuit, judge: Judge) -> None:
        loop = asyncio.get_running_loop()
        self.joined: asyncio.Future[tuple[ssl.SSLSocket, bytes] | Loss] = loop.create_future()
        self._relay = relay
        self._request = request
        self._judge = judge

    def on_open(self, connection: FrameConnection) -> None:
        if (wrong := why_not_node(connection, self._relay, "its address", self._judge)) is not None:
            connection.close(wrong)
            return
        connection.write(codec.PEERING.frame(self._request, limits=JOIN_LIMITS))

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        message = codec.PEERING.decode(frame.header)
        if isinstance(message, PeerRefused):
            if message.proof:
                self._judge.on_proof(message.proof)
            connection.close(Loss("refused", message.message))
        elif isinstance(message, CircuitReady) and not self.joined.done():
            self.joined.set_result(connection.end_frames())
        else:
            raise InvalidInput(f"unexpected {type(message).__name__} from a relay")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        if not self.joined.done():
            self.joined.set_result(loss)
