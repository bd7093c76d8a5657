"""Frames that wait for one connection, bounded in bytes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from hexmesh.wire.frames import Buffer, size_bytes

_JOINED_BYTES = 16 * 1024
"""Small frames are joined up to one TLS record."""


class _Waiting(NamedTuple):
    parts: list[Buffer]
    n_bytes: int
    queued_s: float


@dataclass(frozen=True, slots=True)
class OutboxRules:
    """`drops_oldest`: later messages repeat what earlier ones said, so the oldest go when it is full."""

    limit_bytes: int
    drops_oldest: bool


class Outbox:
    """A queue with one writer side (`put`) and one reader, the connection (`take`)."""

    def __init__(self, rules: OutboxRules) -> None:
        self._rules = rules
        self._waiting: deque[_Waiting] = deque()
        self.n_bytes = 0
        self.n_dropped = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, parts: list[Buffer], now_s: float) -> bool:
        """Queue one frame; False if there is no room. A frame over the limit fits an empty queue."""
        n_bytes = sum(size_bytes(part) for part in parts)
        if self._waiting and self.n_bytes + n_bytes > self._rules.limit_bytes:
            if not self._rules.drops_oldest:
                return False
            while self._waiting and self.n_bytes + n_bytes > self._rules.limit_bytes:
                self._drop_oldest()
        self._waiting.append(_Waiting(parts, n_bytes, now_s))
        self.n_bytes += n_bytes
        return True

    def take(self) -> list[Buffer]:
        """The next frame's parts, or several small frames as one; empty when nothing waits."""
        taken: list[Buffer] = []
        n_taken = 0
        while self._waiting and (not taken or n_taken + self._waiting[0].n_bytes <= _JOINED_BYTES):
            oldest = self._waiting.popleft()
            taken.extend(oldest.parts)
            n_taken += oldest.n_bytes
        self.n_bytes -= n_taken
        return [b"".join(taken)] if len(taken) > 1 and n_taken <= _JOINED_BYTES else taken

    def drop_older_than(self, time_s: float) -> None:
        """Forget what was queued before `time_s`."""
        while self._waiting and self._waiting[0].queued_s < time_s:
            self._drop_oldest()

    def clear(self) -> int:
        """Forget everything; how many frames that were."""
        n_frames = len(self._waiting)
        self._waiting.clear()
        self.n_bytes = 0
        return n_frames

    def _drop_oldest(self) -> None:
        self.n_bytes -= self._waiting.popleft().n_bytes
        self.n_dropped += 1
