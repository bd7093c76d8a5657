"""Ways between members where one cannot dial the other: calls back, and circuits through a relay.

A circuit is two connections to the relay, one from each end, that the relay joins byte by byte. On each the
member first says OpenCircuit or TakeCircuit; after CircuitReady the connection carries the TLS of the two ends.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from hexmesh.wire.peering import PROTOCOL_VERSION, Channel, Sentence, Text

CIRCUIT_ID_BYTES = 16

CircuitId = Annotated[bytes, msgspec.Meta(min_length=CIRCUIT_ID_BYTES, max_length=CIRCUIT_ID_BYTES)]


class OpenCircuit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First frame of a member's connection to a relay: join me to this node."""

    to: Text
    protocol_version: int = PROTOCOL_VERSION


class TakeCircuit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First frame of a member's connection to a relay: I am the other end of a circuit that was offered."""

    circuit: CircuitId
    protocol_version: int = PROTOCOL_VERSION


class CircuitReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From the relay, to both ends: what follows is the other end's."""


class CircuitOffered(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a relay on its control connection: `src` cannot dial you; take this circuit if you will."""

    circuit: CircuitId
    src: Text


class CallMe(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """I have messages for you on this channel and cannot dial you: dial me, I shall send on that connection.

    With "bulk" each CallMe is for one connection, whose hello has `is_call_back`.
    """

    channel: Channel


class Undialable(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """I cannot dial you at `address`; said on each control connection that had to be got in another way."""

    address: Text
    reason: Sentence


CIRCUIT_MESSAGE = OpenCircuit | TakeCircuit | CircuitReady
REACH_MESSAGE = CircuitOffered | CallMe | Undialable
