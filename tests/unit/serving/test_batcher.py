"""Continuous batching: what runs in a step, who goes first, who gives way, and how sequences end."""

from __future__ import annotations

import pytest

from hexmesh.errors import Busy, InvalidInput
from hexmesh.serving.batcher import Batcher, BatchLimits, Emission, MicroBatch
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.rows import wire_row
from hexmesh.wire.data import SampledToken, SamplingParams
from tests.unit.serving.fake_replica import sequence

Rows = list[tuple[str, int, int]]


def batcher(n_blocks: int = 64, block_tokens: int = 4, **limits: int) -> Batcher:
    return Batcher(BlockPool(n_blocks, block_tokens), BatchLimits(**limits))


def begin(batcher: Batcher, n_groups: int = 1) -> MicroBatch:
    batch = batcher.next_step(0.0, n_groups)
    assert batch is not None
    return batch


def end(batcher: Batcher, batch: MicroBatch, token_id: int = 7, now_s: float = 0.0) -> list[Emission]:
    awaited = batcher.awaited(batch.step) or []
    answers = [[SampledToken(token_id=token_id)] * n_wanted for n_wanted in awaited]
    return batcher.complete(batch.step, answers, now_s)


def rows_of(batch: MicroBatch) -> Rows:
    return [(row.sequence.id, row.start, row.n_tokens) for row in batch.rows]


def step(batcher: Batcher, token_id: int = 7) -> Rows:
    """Run one step; its rows as (sequence, start, n_tokens)."""
    batch = begin(batcher)
    end(batcher, batch, token_id)
    return rows_of(batch)


def test_a_prompt_is_computed_in_chunks_beside_the_decoding_sequences() -> None:
    served = batcher(step_tokens=6)
    served.submit(sequence("a", 3, max_tokens=5), 0.0)
    assert step(served) == [("a", 0, 3)]
    served.submit(sequence("b", 12), 0.0)
    assert step(served) == [("a", 3, 1), ("b", 0, 5)]
    assert step(served) == [("a", 4, 1), ("b", 5, 5)]
    assert step(served) == [("a", 5, 1), ("b", 10, 2)]
    assert step(served) == [("a", 6, 1), ("b", 12, 1)]
    assert step(served) == [("b", 13, 1)]


def test_a_late_request_joins_the_running_ones() -> None:
    served = batcher()
    for name in "abcd":
        served.submit(sequence(name, 4, max_tokens=50), 0.0)
    step(served)
    served.submit(sequence("late", 4), 0.0)
    assert ("late", 0, 4) in step(served)


def test_rows_name_positions_and_blocks() -> None:
    served = batcher(block_tokens=4)
    served.submit(sequence("a", 5), 0.0)
    (row,) = [wire_row(row) for row in begin(served).rows]
    assert (row.start, row.n_tokens, len(row.blocks)) == (0, 5, 2)
    assert row.sample == SamplingParams()


def test_a_stop_token_ends_a_sequence_and_frees_its_blocks() -> None:
    served = batcher()
    served.submit(sequence("a", 3, max_tokens=100, stop=frozenset({7})), 0.0)
    batch = begin(served)
    (emission,) = end(served, batch)
    assert (emission.sequence, emission.first, emission.finish_reason) == (batch.rows[0].sequence, 0, "stop")
    assert (served.pool.n_free, served.has_work) == (64, False)


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    served = batcher(n_blocks=4, block_tokens=4)
    served.submit(sequence("old", 6, max_tokens=8), 0.0)
    served.submit(sequence("young", 6, max_tokens=8), 0.0)
    finished: list[str] = []
    while served.has_work:
        finished += [done.sequence.id for done in end(served, begin(served)) if done.finish_reason]
    assert finished == ["old", "young"]
    assert served.pool.n_available == 4


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    served = batcher(n_blocks=2, block_tokens=4)
    with pytest.raises(InvalidInput, match=r"12 tokens.* holds 8"):
        served.submit(sequence("a", 8, max_tokens=4), 0.0)


def test_a_full_queue_is_busy() -> None:
    served = batcher(max_waiting=1)
    served.submit(sequence("a", 4), 0.0)
    with pytest.raises(Busy):
        served.submit(sequence("b", 4), 0.0)


def test_a_sequence_cancelled_in_flight_keeps_its_blocks_until_the_step_is_over() -> None:
    served = batcher()
    served.submit(sequence("a", 3), 0.0)
    batch = begin(served)
    assert served.cancel("a", 1)
    assert served.pool.n_used == 1
    assert end(served, batch) == []
    assert served.pool.n_used == 0


def test_two_attempts_of_a_sequence_are_cancelled_one_after_the_other() -> None:
    served = batcher()
    served.submit(sequence("a", 4), 0.0)
    batch = begin(served)
    assert served.cancel("a")
    served.submit(sequence("a", 4), 0.0)
    assert served.cancel("a")
    assert not served.cancel("a")
    end(served, batch)
    assert (served.has_work, served.pool.n_used) == (False, 0)


def test_an_older_attempts_cancel_does_not_touch_a_newer_one() -> None:
    served = batcher()
    newer = sequence("a", 4)
    newer.attempt = 2
    served.submit(newer, 0.0)
    assert not served.cancel("a", 1)
    assert served.sequences() == [newer]
