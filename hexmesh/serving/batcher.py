"""Continuous batching for one replica: which sequences run in the next step, and with how many tokens each.

A step takes a share of the sequences that decode and fills the rest of its token budget with chunks of prompts.
Several steps may be in flight, one behind the other; stages run them in the order of their numbers. A sequence
decodes only while nothing of it is in flight, but chunks of a prompt may follow each other closely. Blocks are taken
as sequences grow; when none is left the least important sequence that is not in flight gives its blocks back and is
computed again later (its tokens are kept, so nothing it emitted changes).

A row counts only if everything before it is known to be computed when it is answered. Else, and when its step is
lost, it is scheduled anew, and what later steps in flight bring for that sequence is void.

A sequence whose prompt another replica computed is taken up like any other, then waits for its KV, and decodes; should
it have to give way later, it is computed here. Where it was computed, its blocks stay leased until they were sent.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from hexmesh.errors import Busy, InvalidInput
from hexmesh.serving.admission import Admission
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.micro_batch import BatchLimits, Emission, MicroBatch, ScheduledRow
from hexmesh.serving.prefix import PrefixChain, first_link
from hexmesh.serving.sequence import Sequence
from hexmesh.serving.shares import prompt_shares
from hexmesh.serving.turnover import Turnover
from hexmesh.wire.data import MAX_STEP_ROWS, FinishReason, SampledToken

__all__ = ["BatchLimits", "Batcher", "Emission", "MicroBatch", "ScheduledRow"]

MAX_DECODE_ROWS = MAX_STEP_ROWS * 3 // 4
"""Of a step; there is room for some prompts beside them."""


@dataclass(frozen=True, slots=True)
class _Flight:
    batch: MicroBatch
    void: set[Sequence] = field(default_factory=set)
    """Their rows' results do not count."""


class Batcher:
    """Owns the waiting and running sequences of one replica; its pool may serve another batcher too."""

    def __init__(self, pool: BlockPool, limits: BatchLimits, model_id: str = "") -> None:
        self.pool = pool
        self.limits = limits
        self._model_id = model_id
        self._admission = Admission(pool)
        self._turnover = Turnover()
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        """Those running whose first token is yet to come, since they were taken up."""
        self._ready: dict[Sequence, None] = {}
        """Those decoding with nothing in flight, longest waiting first."""
        self._arriving: dict[Sequence, None] = {}
        """Those running whose KV is on its way; it counts as in flight, for it is written into their blocks."""
        self._to_fetch: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._in_flight: dict[int, _Flight] = {}
        self._last_step = 0
        self._n_submitted = 0
        self._next_deadline_s = math.inf
        """No sequence's deadline is before this."""

    @property
    def has_work(self) -> bool:
        return bool(self._admission.waiting or self._running or self._arriving or self._in_flight)

    @property
    def n_in_flight(self) -> int:
        """How many steps are in flight."""
        return len(self._in_flight)

    @property
    def n_decoding(self) -> int:
        """How many sequences draw one token after the other now."""
        return len(self._running) - len(self._prefilling) - len(self._arriving)

    @property
    def has_prompts(self) -> bool:
        """Whether prompts wait or are being computed."""
        return bool(self._prefilling or self._admission.waiting)

    @property
    def n_running(self) -> int:
        """How many sequences have blocks."""
        return len(self._running)

    @property
    def running(self) -> list[Sequence]:
        """Those with blocks, longest running first."""
        return list(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        """Those without, in the order in which they are looked at."""
        return list(self._admission.waiting)

    def sequences(self) -> list[Sequence]:
        """Everything that is wanted, running first."""
        return [*self._running, *self._admission.waiting]

    def awaited(self, step: int) -> list[int] | None:
        """How many tokens each row that asked must bring, in row order; None if no such step is in flight."""
        flight = self._in_flight.get(step)
        return None if flight is None else [row.n_wanted for row in flight.batch.rows if row.n_wanted]

    def counts(self, step: int, row: ScheduledRow) -> bool:
        """Whether what this row of a step brings counts if the step is completed now, such as scores of its prompt."""
        flight = self._in_flight.get(step)
        if flight is None or row.sequence.is_over or row.sequence in flight.void:
            return False
        return row.start == row.sequence.n_computed

    def submit(self, sequence: Sequence, now_s: float) -> None:
        """Queue a sequence; one of the same id is cancelled.

        Raises Busy when the queue is full, InvalidInput when it can never fit.
        """
        n_final = sequence.n_prompt + sequence.max_tokens
        if not self.pool.can_hold(n_final):
            raise InvalidInput(
                f"the request may grow to {n_final} tokens; this replica's KV pool holds "
                f"{self.pool.n_blocks * self.pool.block_tokens}",
                code="context_length_exceeded",
                next_step="ask for fewer max_tokens or send a shorter prompt",
            )
        self.cancel(sequence.id)
        n_waiting = len(self._admission.waiting)
        if n_waiting >= self.limits.max_waiting and not sequence.awaits_kv:  # that one was let in elsewhere
            raise Busy(
                f"{n_waiting} requests wait already",
                code="queue_full",
                next_step="try again shortly",
                retry_after_s=self._turnover.retry_after_s(now_s),
            )
        self._n_submitted += 1
        sequence.rank = (sequence.priority, self._n_submitted)
        sequence.prefix = PrefixChain(first_link(self._model_id, sequence.cache_salt))
        self._by_id[sequence.id] = sequence
        self._next_deadline_s = min(self._next_deadline_s, sequence.deadline_s)
        self._admission.add(sequence)

    def cancel(self, sequence_id: str, attempt: int | None = None) -> bool:
        """Forget a sequence (of that attempt); its blocks are free at once, or after the steps in flight."""
        sequence = self._by_id.get(sequence_id)
        if sequence is None or attempt not in (None, sequence.attempt):
            return False
        self._drop(sequence)
        return True

    def expire(self, now_s: float) -> list[Sequence]:
        """Drop what is past its deadline, and end the leases that are over; the sequences dropped."""
        self.pool.end_leases(now_s)
        if now_s < self._next_deadline_s:
            return []
        late = [sequence for sequence in self.sequences() if sequence.deadline_s <= now_s]
        for sequence in late:
            self._drop(sequence)
        self._next_deadline_s = min((held.deadline_s for held in self.sequences()), default=math.inf)
        return late

    def abandon(self) -> list[Sequence]:
        """Give up everything held, in flight too; the sequences that were still wanted."""
        held = self.sequences()
        for sequence in self._arriving:
            sequence.n_in_flight = 0
            self.pool.release(sequence.blocks)
        self._arriving.clear()
        self._to_fetch.clear()
        for flight in self._in_flight.values():
            for row in flight.batch.rows:
                row.sequence.n_in_flight = 0
                self.pool.release(row.sequence.blocks)
        self._in_flight.clear()
        for sequence in held:
            self._drop(sequence)
        return held

    def next_step(self, now_s: float, n_groups: int) -> MicroBatch | None:
        """The next step, or None if nothing can run now; the decoding sequences are spread over n_groups steps.

        None with nothing in flight and work left means that other users of the pool hold its blocks.
        """
        self.pool.end_leases(now_s)
        rows = self._decode_rows(min(-(-self.n_decoding // n_groups), MAX_DECODE_ROWS))
        self._take_up()
        n_decode_tokens = sum(row.n_tokens for row in rows)
        n_left = max(self.limits.step_tokens - n_decode_tokens, self.limits.step_tokens // 4, 1)
        rows += self._prompt_rows(n_left, MAX_STEP_ROWS - len(rows))
        if not rows:
            return None
        self._last_step += 1
        for row in rows:
            row.sequence.last_step = self._last_step
        batch = MicroBatch(self._last_step, rows)
        self._in_flight[batch.step] = _Flight(batch)
        return batch

    def complete(self, step: int, answers: list[list[SampledToken]], now_s: float) -> list[Emission]:
        """Take in a step's drawn tokens: one list for each row that asked, as `awaited` counts them."""
        flight = self._in_flight.pop(step, None)
        if flight is None:
            return []
        emissions = []
        drawn = iter(answers)
        for row in flight.batch.rows:
            answer = next(drawn) if row.n_wanted else None
            if not self._lands(row, flight):
                continue
            if row.start != row.sequence.n_computed:  # a step before it has not been answered
                self._schedule_anew(step, {row.sequence: row})
            elif answer is None:
                row.sequence.n_computed = row.start + row.n_tokens
                self._seal(row.sequence)
            else:
                emissions.append(self._emit(row, answer, now_s))
        return emissions

    def lose(self, step: int) -> None:
        """It will not be answered: its rows, and what follows on them, are computed again.

        Its blocks may go to others at once: should it run yet, then before the steps of those others.
        """
        flight = self._in_flight.pop(step, None)
        if flight is not None:
            landed = {row.sequence: row for row in flight.batch.rows if self._lands(row, flight)}
            self._schedule_anew(step, landed)

    def to_fetch(self) -> list[Sequence]:
        """Sequences that got blocks for KV from elsewhere, each told once: all from `n_computed` on is to be sent."""
        new, self._to_fetch = self._to_fetch, []
        return new

    def received(self, sequence: Sequence) -> None:
        """KV that was on its way lies in the sequence's blocks (or will never be sent, if nobody wants it any more)."""
        if sequence not in self._arriving:
            return  # given up
        del self._arriving[sequence]
        sequence.n_in_flight -= 1
        sequence.awaits_kv = False
        if sequence.is_over:
            self.pool.release(sequence.blocks)
            return
        sequence.n_computed = sequence.n_scheduled = len(sequence.tokens) - 1
        self._seal(sequence)
        self._ready[sequence] = None

    def steps_until_change(self) -> int:
        """How many rounds lie ahead in which nothing happens but that each running sequence draws one token.

        In none of them a sequence joins or gives way, and none ends before the last. A round is one step for each
        group. 0 when the next one is not known to be such, and always while a step is in flight.
        """
        if self._in_flight or self._prefilling or any(sequence.drafts for sequence in self._ready):
            return 0
        n_rounds = min((held.max_tokens - held.n_output for held in self._ready), default=0)
        has_place = self._admission.waiting and len(self._running) < self.limits.max_running
        if has_place and not self._admission.is_stuck(len(self._running)):
            return 0
        return bisect_left(range(1, n_rounds + 1), True, key=lambda n: not self._has_room_for(n))

    def advance(self, n_rounds: int, token: SampledToken, now_s: float) -> list[Emission]:
        """Do what so many of the rounds of `steps_until_change` would, each drawing `token`, which stops nobody.

        The emissions are those of the last round. O(running sequences and blocks they take), whatever n_rounds is.
        Where two draw the same answer to the same prompt, other cached blocks may be evicted than round by round.
        """
        assert 0 < n_rounds <= self.steps_until_change()
        self._last_step += n_rounds
        drawing, self._ready = list(self._ready), {}
        for sequence in drawing:
            sequence.tokens.extend([token.token_id] * (n_rounds - 1))
            is_grown = self.pool.grow(sequence.blocks, len(sequence.tokens))
            assert is_grown
        rows = [ScheduledRow(sequence, len(sequence.tokens) - 1, 1, 1) for sequence in drawing]
        return [self._emit(row, [token], now_s) for row in rows]

    def _has_room_for(self, n_rounds: int) -> bool:
        """Whether all that decode can draw n_rounds more tokens without anyone giving way."""
        pool = self.pool
        n_missing = sum(
            pool.blocks_for(len(held.tokens) + n_rounds - 1) - len(held.blocks) for held in self._ready
        )
        return n_missing <= pool.n_available

    def _lands(self, row: ScheduledRow, flight: _Flight) -> bool:
        """Count a row out of flight; whether what came of it matters."""
        sequence = row.sequence
        sequence.n_in_flight -= 1
        if sequence.is_over and not sequence.n_in_flight:
            self.pool.release(sequence.blocks)
        return not sequence.is_over and sequence not in flight.void

    def _schedule_anew(self, step: int, rows: dict[Sequence, ScheduledRow]) -> None:
        """Take these rows as not computed, and so whatever later steps in flight hold of their sequences."""
        for sequence, row in rows.items():
            sequence.n_scheduled = row.start
            if sequence not in self._prefilling:
                self._ready[sequence] = None
        for later, flight in self._in_flight.items():
            if later > step:
                flight.void.update(row.sequence for row in flight.batch.rows if row.sequence in rows)

    def _emit(self, row: ScheduledRow, drawn: list[SampledToken], now_s: float) -> Emission:
        sequence = row.sequence
        first = sequence.n_output
        if row.drafts:
            n_taken, finish_reason = _take(sequence, drawn, row.drafts)
            drawn = drawn[:n_taken]
        else:
            finish_reason = sequence.accept(drawn[0])
        sequence.n_computed = sequence.n_scheduled = len(sequence.tokens) - 1
        if sequence in self._prefilling:
            del self._prefilling[sequence]
        self._seal(sequence)
        if row.drafts:
            sequence.drafts = []
            self.pool.trim(sequence.blocks, len(sequence.tokens))
        if finish_reason is None:
            self._ready[sequence] = None
        else:
            if sequence.kept_s:
                self.pool.lease(sequence.lease_id, sequence.blocks, now_s + sequence.kept_s)
            self._drop(sequence)
            self._turnover.ended(now_s)
        return Emission(sequence, first, drawn, finish_reason)

    def _seal(self, sequence: Sequence) -> None:
        """Make the whole blocks that are computed known by name."""
        if not sequence.names_blocks:
            return
        block_tokens = self.pool.block_tokens
        while (stop := (sequence.n_sealed + 1) * block_tokens) <= sequence.n_computed:
            name = sequence.prefix.name(sequence.tokens, stop)
            if sequence.n_in_flight and self.pool.is_known(name):
                return  # its place is taken by the known one when no step reads the table
            if not self.pool.seal(sequence.blocks, sequence.n_sealed, name):
                return
            sequence.n_sealed += 1
            self._admission.sealed(name)

    def _decode_rows(self, share: int) -> list[ScheduledRow]:
        rows: list[ScheduledRow] = []
        n_spare = self.limits.step_tokens - share
        block_tokens = self.pool.block_tokens
        for sequence in list(self._ready):
            if len(rows) >= share:
                break
            if sequence not in self._ready:
                continue  # gave way to one before it
            n_tokens = len(sequence.tokens)
            drafts = self._drafts(sequence, n_spare) if sequence.drafts else ()
            if drafts and not self.pool.grow(sequence.blocks, n_tokens + len(drafts)):
                drafts = ()
            if n_tokens > len(sequence.blocks) * block_tokens and not self._make_room(sequence, n_tokens):
                continue
            n_spare -= len(drafts)
            del self._ready[sequence]
            sequence.n_scheduled = n_tokens + len(drafts)
            sequence.n_in_flight += 1
            n_new = 1 + len(drafts)
            rows.append(ScheduledRow(sequence, n_tokens - 1, n_new, n_new, drafts))
        return rows

    def _drafts(self, sequence: Sequence, n_spare: int) -> tuple[int, ...]:
        """What of its drafts is worth verifying now."""
        n_wanted = sequence.max_tokens - sequence.n_output - 1
        return tuple(sequence.drafts[: max(0, min(n_wanted, n_spare))])

    def _take_up(self) -> None:
        if not self._admission.waiting:
            return
        n_leaving = sum(sequence.kept_s > 0 for sequence in self._prefilling)
        for sequence in self._admission.admit(
            len(self._running), self.limits.max_running, self._last_step, n_leaving=n_leaving
        ):
            self._running[sequence] = None
            if sequence.awaits_kv:
                sequence.n_in_flight += 1
                self._arriving[sequence] = None
                self._to_fetch.append(sequence)
            else:
                self._prefilling[sequence] = None

    def _prompt_rows(self, n_left: int, most: int) -> list[ScheduledRow]:
        if not self._prefilling:
            return []
        prompts = [sequence for sequence in self._prefilling if sequence.n_to_schedule]
        rows = []
        for sequence, n_tokens in prompt_shares(prompts, n_left)[:most]:
            n_wanted = int(n_tokens == sequence.n_to_schedule)
            rows.append(ScheduledRow(sequence, sequence.n_scheduled, n_tokens, n_wanted))
            sequence.n_scheduled += n_tokens
            sequence.n_in_flight += 1
        return rows

    def _make_room(self, sequence: Sequence, n_tokens: int) -> bool:
        """Grow a sequence, at the cost of less important ones; False if it has to wait, or gave way itself."""
        while not self.pool.grow(sequence.blocks, n_tokens):
            last = max((held for held in self._running if not held.n_in_flight), key=_rank)
            if last is sequence and any(held.rank > sequence.rank for held in self._running):
                return False  # less important ones are in flight: their blocks come first
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self.pool.release(sequence.blocks)
        self._admission.add(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """It is not wanted any more."""
        sequence.is_over = True
        del self._by_id[sequence.id]
        if sequence in self._running:
            self._stop_running(sequence)
        else:
            self._admission.remove(sequence)
        if not sequence.n_in_flight:
            self.pool.release(sequence.blocks)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        self._ready.pop(sequence, None)
        self._admission.stop_making(sequence)


def _take(
    sequence: Sequence, drawn: Iterable[SampledToken], drafts: tuple[int, ...]
) -> tuple[int, FinishReason | None]:
    """Append drawn tokens as long as the drafts that they were drawn after held; how many, and whether it ends."""
    n_taken = 0
    for token in drawn:
        finish_reason = sequence.accept(token)
        n_taken += 1
        if finish_reason is not None:
            return n_taken, finish_reason
        if n_taken > len(drafts) or drafts[n_taken - 1] != token.token_id:
            break
    return n_taken, None


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
