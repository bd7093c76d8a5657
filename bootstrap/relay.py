"""Joins members that cannot dial each other. It passes on the ciphertext of their TLS and understands none of it.

Who may have how many circuits is the book's to say (`hexmesh.membership.circuits`). Only members get as far as
asking: the connection that asks is mutual TLS under the mesh's root.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import NoReturn

import msgspec

from daemon.peering.incoming import Incoming
from daemon.peering.splice import Splice
from hexmesh.errors import InvalidInput, Refused
from hexmesh.ids import NodeId, short
from hexmesh.membership.circuits import CircuitBook, Offer
from hexmesh.wire import codec
from hexmesh.wire.circuits import CircuitOffered, CircuitReady, OpenCircuit, TakeCircuit
from hexmesh.wire.peering import JOIN_LIMITS, PeerRefused

log = logging.getLogger("hexmesh.relay")

LAPSE_PERIOD_S = 0.5

_READY = b"".join(codec.PEERING.frame(CircuitReady(), limits=JOIN_LIMITS))


class Relay:
    """Owner of the circuits through this node. `send` queues a control message to a member."""

    def __init__(
        self,
        *,
        is_connected: Callable[[NodeId], bool],
        send: Callable[[NodeId, msgspec.Struct], None],
        rng: random.Random,
        book: CircuitBook | None = None,
    ) -> None:
        self._is_connected = is_connected
        self._send = send
        self._book = book if book is not None else CircuitBook(rng)
        self._openers: dict[bytes, Incoming] = {}
        self._splices: dict[bytes, Splice] = {}
        self._loop = asyncio.get_running_loop()
        self._n_past_bytes = 0

    @property
    def n_circuits(self) -> int:
        """Circuits that run."""
        return self._book.n_running

    @property
    def n_bytes(self) -> int:
        """All that was ever passed on."""
        return self._n_past_bytes + sum(splice.n_bytes for splice in self._splices.values())

    async def run(self) -> NoReturn:
        """Refuse those whose circuit nobody takes, for ever."""
        while True:
            await asyncio.sleep(LAPSE_PERIOD_S)
            for offer in self._book.lapsed(self._loop.time()):
                opener = self._openers.pop(offer.circuit)
                message = f"node {short(NodeId(offer.dst))} did not take the circuit"
                opener.refuse(PeerRefused(code="not_taken", message=message))

    def close(self) -> None:
        """End all circuits."""
        for splice in list(self._splices.values()):
            splice.close()

    def forget(self, node: NodeId) -> None:
        """The node is no member any more: end its circuits."""
        for offer in self._book.of(node):
            if (opener := self._openers.pop(offer.circuit, None)) is not None:
                opener.close()
            if (splice := self._splices.get(offer.circuit)) is not None:
                splice.close()

    def on_circuit(self, incoming: Incoming, request: OpenCircuit | TakeCircuit) -> None:
        """A member asks."""
        assert incoming.member is not None
        try:
            match request:
                case OpenCircuit():
                    self._open(incoming, incoming.member.node_id, NodeId(request.to))
                case TakeCircuit():
                    self._join(self._book.take(request.circuit, incoming.member.node_id), incoming)
        except Refused as error:
            log.info("circuit refused node=%s reason=%s", short(incoming.member.node_id), error.message)
            incoming.refuse(PeerRefused(code=error.code, message=error.message))

    def _open(self, incoming: Incoming, src: NodeId, dst: NodeId) -> None:
        is_connected = self._is_connected(dst)
        offer = self._book.open(src, dst, is_connected=is_connected, now_s=self._loop.time())
        self._openers[offer.circuit] = incoming
        incoming.lost.add_done_callback(lambda _: self._give_up(offer.circuit))
        self._send(dst, CircuitOffered(circuit=offer.circuit, src=src))

    def _give_up(self, circuit: bytes) -> None:
        if self._openers.pop(circuit, None) is not None:
            self._book.end(circuit)

    def _join(self, offer: Offer, taker: Incoming) -> None:
        opener = self._openers.pop(offer.circuit)
        try:
            one, from_one = opener.become_circuit()
        except InvalidInput as error:
            self._book.end(offer.circuit)
            opener.close()
            raise Refused(error.message, code="not_taken") from error
        try:
            other, from_other = taker.become_circuit()
        except InvalidInput:
            self._book.end(offer.circuit)
            one.close()
            raise

        def note_end(splice: Splice) -> None:
            self._n_past_bytes += splice.n_bytes
            self._splices.pop(offer.circuit, None)
            self._book.end(offer.circuit)

        self._splices[offer.circuit] = Splice(
            one,
            other,
            note_end,
            to_one=_READY + from_other,
            to_other=_READY + from_one,
        )
        log.debug("circuit joined src=%s dst=%s", short(NodeId(offer.src)), short(NodeId(offer.dst)))
