"""Continuous batching: what runs in a step, and that blocks are never lost, doubled or leaked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.errors import Busy, InvalidInput
from hexmesh.serving.batcher import Batcher, BatchLimits
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.rows import wire_row
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import SampledToken, SamplingParams


def sequence(name: str, n_prompt: int, max_tokens: int = 4, stop: frozenset[int] = frozenset()) -> Sequence:
    return Sequence(
        id=name,
        attempt=1,
        tokens=list(range(100, 100 + n_prompt)),
        n_prompt=n_prompt,
        max_tokens=max_tokens,
        stop_token_ids=stop,
        sampling=SamplingParams(),
    )


def batcher(n_blocks: int = 64, block_tokens: int = 4, **limits: int) -> Batcher:
    return Batcher(BlockPool(n_blocks, block_tokens), BatchLimits(**limits))


def step(batcher: Batcher, token_id: int = 7) -> list[tuple[str, int, int]]:
    """Run one step; its rows as (sequence, start, n_tokens)."""
    rows = batcher.next_step()
    n_sampled = sum(row.reaches_end for row in rows)
    batcher.complete([SampledToken(token_id=token_id)] * n_sampled)
    return [(row.sequence.id, row.start, row.n_tokens) for row in rows]


def test_a_prompt_is_computed_in_chunks_beside_the_decoding_sequences() -> None:
    served = batcher(step_tokens=6)
    served.submit(sequence("a", 3, max_tokens=5))
    assert step(served) == [("a", 0, 3)]
    served.submit(sequence("b", 12))
    assert step(served) == [("a", 3, 1), ("b", 0, 5)]
    assert step(served) == [("a", 4, 1), ("b", 5, 5)]
    assert step(served) == [("a", 5, 1), ("b", 10, 2)]
    assert step(served) == [("a", 6, 1), ("b", 12, 1)]
    assert step(served) == [("b", 13, 1)]


def test_a_late_request_joins_the_running_ones() -> None:
    served = batcher()
    for name in "abcd":
        served.submit(sequence(name, 4, max_tokens=50))
    step(served)
    served.submit(sequence("late", 4))
    assert ("late", 0, 4) in step(served)


def test_rows_name_positions_and_blocks() -> None:
    served = batcher(block_tokens=4)
    served.submit(sequence("a", 5))
    (row,) = [wire_row(row) for row in served.next_step()]
    assert (row.start, row.n_tokens, len(row.blocks)) == (0, 5, 2)
    assert row.sample == SamplingParams()


def test_a_stop_token_ends_a_sequence_and_frees_its_blocks() -> None:
    served = batcher()
    served.submit(sequence("a", 4, max_tokens=100, stop=frozenset({7})))
    (row,) = served.next_step()
    (emission,) = served.complete([SampledToken(token_id=7)])
    assert (emission.sequence, emission.index, emission.finish_reason) == (row.sequence, 0, "stop")
    assert (served.pool.n_free, served.has_work) == (64, False)


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    served = batcher(n_blocks=4, block_tokens=4)
    served.submit(sequence("old", 7, max_tokens=8))
    served.submit(sequence("young", 7, max_tokens=8))
    finished: list[str] = []
    for _ in range(40):
        rows = served.next_step()
        emissions = served.complete([SampledToken(token_id=1)] * sum(row.reaches_end for row in rows))
        finished += [e.sequence.id for e in emissions if e.finish_reason]
    assert finished == ["old", "young"]
    assert served.pool.n_free == 4


def test_a_request_that_can_never_fit_is_refused_with_numbers() -> None:
    served = batcher(n_blocks=2, block_tokens=4)
    with pytest.raises(InvalidInput, match=r"12 tokens.* holds 8"):
        served.submit(sequence("a", 8, max_tokens=4))


def test_a_full_queue_is_busy() -> None:
    served = batcher(max_waiting=1)
    served.submit(sequence("a", 4))
    with pytest.raises(Busy):
        served.submit(sequence("b", 4))


def test_a_sequence_cancelled_in_flight_keeps_its_blocks_until_the_step_is_over() -> None:
    served = batcher()
    served.submit(sequence("a", 4))
    served.next_step()
    assert served.cancel("a", 1)
    assert served.pool.n_used == 1
    assert served.complete([SampledToken(token_id=1)]) == []
    assert served.pool.n_used == 0


def test_two_attempts_of_a_sequence_are_cancelled_one_after_the_other() -> None:
    served = batcher()
    served.submit(sequence("a", 4))
    served.next_step()
    assert served.cancel("a")
    served.submit(sequence("a", 4))
    assert served.cancel("a")
    assert not served.cancel("a")
    served.complete([SampledToken(token_id=1)])
    assert (served.has_work, served.pool.n_used) == (False, 0)


def test_an_older_attempts_cancel_does_not_touch_a_newer_one() -> None:
    served = batcher()
    newer = sequence("a", 4)
    newer.attempt = 2
    served.submit(newer)
    assert not served.cancel("a", 1)
    assert served.sequences() == [newer]


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=8),
    n_blocks=st.integers(8, 24),
    step_tokens=st.integers(4, 32),
    cancels=st.sets(st.integers(0, 7), max_size=3),
)
def test_every_sequence_ends_and_no_block_is_lost_or_shared(
    shapes: list[tuple[int, int]], n_blocks: int, step_tokens: int, cancels: set[int]
) -> None:
    served = Batcher(BlockPool(n_blocks, 4), BatchLimits(step_tokens=step_tokens, max_running=8))
    for index, (n_prompt, max_tokens) in enumerate(shapes):
        served.submit(sequence(str(index), n_prompt, max_tokens))
    outputs: dict[str, int] = {}
    for n_steps in range(600):
        rows = served.next_step()
        if not rows:
            break
        tables = [block for held in served.sequences() for block in held.blocks]
        assert len(tables) == len(set(tables)) == served.pool.n_used
        assert sum(row.n_tokens for row in rows) <= max(step_tokens, len(rows))
        if n_steps in cancels:
            served.cancel(str(n_steps))
        for emission in served.complete([SampledToken(token_id=1)] * sum(row.reaches_end for row in rows)):
            outputs[emission.sequence.id] = emission.index + 1
    assert (served.has_work, served.pool.n_free) == (False, n_blocks)
    for index, (_, max_tokens) in enumerate(shapes):
        if index not in cancels:
            assert outputs[str(index)] == max_tokens
