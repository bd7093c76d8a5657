"""Continuous batching for one replica: which sequences run in the next step, and with how many tokens each.

Every step takes all sequences that decode, one token each, then fills the rest of its token budget with chunks
of prompts, oldest first. Blocks are taken as sequences grow; when none is left the youngest sequence gives its
blocks back and is computed again later (its tokens are kept, so nothing it emitted changes). One step is in
flight at a time: `next_step` and `complete` alternate.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hexmesh.errors import Busy, InvalidInput
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import FinishReason, SampledToken


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How much work one step and one queue may hold."""

    step_tokens: int = 256
    max_running: int = 32
    max_waiting: int = 64


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """A sequence's part of the step in flight."""

    sequence: Sequence
    start: int
    n_tokens: int

    @property
    def reaches_end(self) -> bool:
        return self.start + self.n_tokens == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Emission:
    """A token that a sequence just drew; `index` counts its output tokens from 0."""

    sequence: Sequence
    index: int
    token: SampledToken
    finish_reason: FinishReason | None


class Batcher:
    """Owns the waiting and running sequences of one replica and its block pool."""

    def __init__(self, pool: BlockPool, limits: BatchLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._in_flight: list[ScheduledRow] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def n_awaited_tokens(self) -> int:
        """How many tokens the step in flight must bring."""
        return sum(row.reaches_end for row in self._in_flight)

    def sequences(self) -> list[Sequence]:
        """Everything this batcher holds, running first."""
        return [*self.running, *self.waiting]

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Busy when the queue is full, InvalidInput when it can never fit."""
        n_final = sequence.n_prompt + sequence.max_tokens
        if not self.pool.can_hold(n_final):
            raise InvalidInput(
                f"the request may grow to {n_final} tokens; this replica's KV pool holds "
                f"{self.pool.n_blocks * self.pool.block_tokens}",
                code="context_length_exceeded",
                next_step="ask for fewer max_tokens or send a shorter prompt",
            )
        if len(self.waiting) >= self.limits.max_waiting:
            raise Busy(
                f"{len(self.waiting)} requests wait already", code="queue_full", next_step="try again shortly"
            )
        self.waiting.append(sequence)

    def cancel(self, sequence_id: str, attempt: int | None = None) -> bool:
        """Forget a sequence (of that attempt); its blocks are free at once, or after the step in flight."""
        for sequence in self.sequences():
            is_meant = sequence.id == sequence_id and attempt in (None, sequence.attempt)
            if is_meant and not sequence.cancelled:
                sequence.cancelled = True
                if all(row.sequence is not sequence for row in self._in_flight):
                    self._drop(sequence)
                return True
        return False

    def next_step(self) -> list[ScheduledRow]:
        """The rows of the next step, in order; empty when there is nothing to compute."""
        assert not self._in_flight, "a step is in flight"
        rows = self._decode_rows()
        n_left = self.limits.step_tokens - len(rows)
        rows += self._prefill_rows(n_left, {id(row.sequence) for row in rows})
        self._in_flight = rows
        return rows

    def complete(self, sampled: list[SampledToken]) -> list[Emission]:
        """Take in the step's drawn tokens: one for each row that reached its sequence's end, in row order."""
        rows, self._in_flight = self._in_flight, []
        drawn = iter(sampled)
        emissions = []
        for row in rows:
            sequence = row.sequence
            sequence.n_computed = row.start + row.n_tokens
            token = next(drawn) if row.reaches_end else None
            if sequence.cancelled:
                self._drop(sequence)
            elif token is not None:
                emissions.append(self._emit(sequence, token))
        return emissions

    def abandon(self) -> list[Sequence]:
        """Give up everything held, in flight too; the sequences that were still wanted."""
        held = [sequence for sequence in self.sequences() if not sequence.cancelled]
        self._in_flight = []
        for sequence in self.sequences():
            self._drop(sequence)
        return held

    def _emit(self, sequence: Sequence, token: SampledToken) -> Emission:
        finish_reason = sequence.accept(token)
        if finish_reason is not None:
            self._drop(sequence)
        return Emission(sequence, sequence.n_output - 1, token, finish_reason)

    def _decode_rows(self) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for sequence in list(self.running):
            if sequence.n_to_compute != 1 or sequence not in self.running:
                continue
            if self._make_room(sequence, len(sequence.tokens), {id(row.sequence) for row in rows}):
                rows.append(ScheduledRow(sequence, sequence.n_computed, 1))
        return rows

    def _prefill_rows(self, n_left: int, scheduled: set[int]) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        for sequence in list(self.running):
            if n_left > 0 and id(sequence) not in scheduled and sequence.n_to_compute > 1:
                n_tokens = min(n_left, sequence.n_to_compute)
                if self.pool.grow(sequence.blocks, sequence.n_computed + n_tokens):
                    rows.append(ScheduledRow(sequence, sequence.n_computed, n_tokens))
                    n_left -= n_tokens
        while n_left > 0 and self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            if not self.pool.grow(sequence.blocks, len(sequence.tokens)):
                break
            self.running.append(self.waiting.popleft())
            n_tokens = min(n_left, sequence.n_to_compute)
            rows.append(ScheduledRow(sequence, 0, n_tokens))
            n_left -= n_tokens
        return rows

    def _make_room(self, sequence: Sequence, n_tokens: int, scheduled: set[int]) -> bool:
        """Grow a running sequence, at the cost of younger ones where blocks ran out."""
        while not self.pool.grow(sequence.blocks, n_tokens):
            youngest = self.running[-1]
            if id(youngest) in scheduled:
                return False
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.n_computed = 0
        self.waiting.appendleft(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
