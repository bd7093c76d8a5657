"""A relay's book of circuits: who may have one more, which are offered, which run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from hexmesh.errors import Refused
from hexmesh.ids import short
from hexmesh.wire.circuits import CIRCUIT_ID_BYTES

MAX_OF_MEMBER = 64
"""Circuits that one member opened, offered ones included."""
MAX_CIRCUITS = 512
OFFER_S = 5.0
"""An offer that was not taken by then has lapsed."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A circuit that waits for its other end, or runs."""

    circuit: bytes
    src: str
    dst: str
    until_s: float


class CircuitBook:
    """Owner of the book. A circuit is in it from its offer to its end."""

    def __init__(
        self, rng: random.Random, *, max_of_member: int = MAX_OF_MEMBER, max_circuits: int = MAX_CIRCUITS
    ) -> None:
        self._rng = rng
        self._max_of_member = max_of_member
        self._max_circuits = max_circuits
        self._offered: dict[bytes, Offer] = {}
        self._running: dict[bytes, Offer] = {}

    def __len__(self) -> int:
        return len(self._offered) + len(self._running)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def open(self, src: str, dst: str, *, is_connected: bool, now_s: float) -> Offer:
        """A new offer to `dst`. Raises Refused with the reason that `src` is told."""
        if src == dst:
            raise Refused("a circuit joins two nodes", code="bad_circuit")
        if not is_connected:
            raise Refused(f"node {short(dst)} is not connected to this relay", code="not_connected")
        if len(self) >= self._max_circuits:
            raise Refused(f"this relay has {len(self)} circuits and takes no more", code="relay_full")
        n_own = sum(offer.src == src for book in (self._offered, self._running) for offer in book.values())
        if n_own >= self._max_of_member:
            raise Refused(
                f"node {short(src)} has {n_own} circuits here and may not have more", code="too_many_circuits"
            )
        offer = Offer(self._rng.randbytes(CIRCUIT_ID_BYTES), src, dst, now_s + OFFER_S)
        self._offered[offer.circuit] = offer
        return offer

    def take(self, circuit: bytes, node: str) -> Offer:
        """`node` takes an offer that was made to it. Raises Refused."""
        offer = self._offered.get(circuit)
        if offer is None or offer.dst != node:
            raise Refused("there is no such offer", code="no_such_circuit")
        del self._offered[circuit]
        self._running[circuit] = offer
        return offer

    def end(self, circuit: bytes) -> None:
        """The circuit is over, or its opener gave up."""
        self._offered.pop(circuit, None)
        self._running.pop(circuit, None)

    def lapsed(self, now_s: float) -> list[Offer]:
        """Offers that nobody took in time; they are no longer in the book."""
        return self._remove(lambda offer: offer.until_s <= now_s and offer.circuit in self._offered)

    def of(self, node: str) -> list[Offer]:
        """Every circuit and offer with this node at an end, taken out of the book: it was removed."""
        return self._remove(lambda offer: node in (offer.src, offer.dst))

    def _remove(self, is_over: Callable[[Offer], bool]) -> list[Offer]:
        over = [offer for book in (self._offered, self._running) for offer in book.values() if is_over(offer)]
        for offer in over:
            self.end(offer.circuit)
        return over
