"""What a batcher is told, what it schedules, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import MAX_STEP_TOKENS, FinishReason, SampledToken

MAX_RUNNING = 8192
"""Sequences of one batcher: 32 micro-batches of 256."""


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much work one step and one queue may hold."""

    step_tokens: int = 256
    """Of decoding and prompts together. Prompts get a quarter of it at least, however many decode."""
    max_running: int = 256
    max_waiting: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= MAX_RUNNING or not 1 <= self.step_tokens <= MAX_STEP_TOKENS:
            raise ValueError(
                f"max_running {self.max_running} of {MAX_RUNNING} at most, step_tokens {self.step_tokens} "
                f"of {MAX_STEP_TOKENS} at most"
            )


class ScheduledRow(msgspec.Struct, frozen=True):
    """A sequence's part of a step in flight: its tokens from position `start` on, then its drafts."""

    sequence: Sequence
    start: int
    n_tokens: int
    n_wanted: int
    """How many tokens are to be drawn, after each of the row's last so many positions: 0 before a prompt's end."""
    drafts: tuple[int, ...] = ()

    @property
    def reaches_end(self) -> bool:
        return self.n_wanted > 0

    @property
    def token_ids(self) -> list[int]:
        """What the first stage embeds."""
        stop = self.start + self.n_tokens - len(self.drafts)
        return [*self.sequence.tokens[self.start : stop], *self.drafts]


class MicroBatch(msgspec.Struct, frozen=True):
    """The rows of one step, in order."""

    step: int
    rows: list[ScheduledRow]

    @property
    def n_tokens(self) -> int:
        return sum(row.n_tokens for row in self.rows)


class Emission(msgspec.Struct, frozen=True):
    """Tokens that a sequence just drew; `first` counts its output tokens from 0."""

    sequence: Sequence
    first: int
    tokens: list[SampledToken]
    finish_reason: FinishReason | None
