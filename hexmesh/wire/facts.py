"""What members tell each other about themselves, and how they measure the links between them.

Signed records travel over peer connections as well as through the DHT, so that a dead DHT stops nothing.
Probe messages go over the "probe" channel; a probe is one stream of chunks, answered by reports.
"""

from __future__ import annotations

import msgspec


class Facts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A signed node record, the same bytes as in the DHT: the sender's own, or one that it passes on."""

    record: bytes


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer at once with a Pong of the same number."""

    n: int


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    n: int


class ProbeAsk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """May I fill the link to you for some seconds? A host takes part in one probe at a time.

    `is_urgent`: nothing is known of this link yet, so a short probe should not wait for a pause in the data.
    """

    probe: int
    is_urgent: bool = False


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Yes, or not before `retry_after_s`."""

    probe: int
    is_granted: bool
    retry_after_s: float = 0.0


class ProbeChunk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A part of the stream. Payload: any bytes."""

    probe: int
    is_last: bool


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`n_bytes` in all arrived within `elapsed_s` after the first chunk, which is not counted.

    Sent every few milliseconds, and for the last chunk. `is_enough`: requests need the link, stop.
    """

    probe: int
    n_bytes: int
    elapsed_s: float
    is_last: bool
    is_enough: bool = False


class ProbeEnd(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The asker is through (or gives up): the other side is free again."""

    probe: int


ProbeMessage = Ping | Pong | ProbeAsk | ProbeAnswer | ProbeChunk | ProbeReport | ProbeEnd
FACTS_MESSAGE = Facts | ProbeMessage
