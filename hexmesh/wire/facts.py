"""What members tell each other about themselves, and how they measure the links between them.

Signed records travel over peer connections as well as through the DHT, so that a dead DHT stops nothing.
Probe messages go over the "probe" channel; a window's bytes are the payloads of its chunks.
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
    """May I fill the link to you for about a second? A host takes part in one probe at a time."""

    probe: int


class ProbeAnswer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Yes, or not before `retry_after_s`."""

    probe: int
    is_granted: bool
    retry_after_s: float = 0.0


class ProbeChunk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A part of one window. Payload: any bytes. The last one is answered by a ProbeReport."""

    probe: int
    window: int
    is_last: bool


class ProbeReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The whole window has arrived, and how many bytes that was."""

    probe: int
    window: int
    n_bytes: int


class ProbeEnd(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The asker is through (or gives up): the other side is free again."""

    probe: int


ProbeMessage = Ping | Pong | ProbeAsk | ProbeAnswer | ProbeChunk | ProbeReport | ProbeEnd
PROBE_MESSAGE = ProbeMessage
FACTS_MESSAGE = Facts | ProbeMessage
