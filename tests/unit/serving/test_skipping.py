"""A simulator may skip rounds in which nothing changes: the same comes out as step by step."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.serving.batcher import Batcher, BatchLimits, Emission
from hexmesh.serving.blocks import BlockPool
from hexmesh.wire.data import SampledToken
from tests.unit.serving.fake_replica import sequence

TOKEN = SampledToken(token_id=7)
Event = tuple[int, str, str, int]


def filled(shapes: list[tuple[int, int]], n_blocks: int, block_tokens: int, max_running: int) -> Batcher:
    limits = BatchLimits(step_tokens=16, max_running=max_running)
    batcher = Batcher(BlockPool(n_blocks, block_tokens), limits)
    for index, (n_prompt, max_tokens) in enumerate(shapes):
        if batcher.pool.can_hold(n_prompt + max_tokens):
            batcher.submit(sequence(str(index), n_prompt, max_tokens), 0.0)
    return batcher


def one_round(batcher: Batcher, n_groups: int) -> list[Emission]:
    """Every sequence that can draws one token."""
    emissions = []
    batches = [batch for _ in range(n_groups) if (batch := batcher.next_step(0.0, n_groups)) is not None]
    for batch in batches:
        awaited = batcher.awaited(batch.step) or []
        emissions += batcher.complete(batch.step, [[TOKEN] * n for n in awaited], 0.0)
    return emissions


def state(batcher: Batcher) -> tuple[object, ...]:
    """All that decides what happens next, but for which block is which."""
    pool = batcher.pool
    return (
        [(held.id, held.n_output, held.n_computed, len(held.blocks)) for held in batcher.running],
        [(held.id, held.n_output) for held in batcher.waiting],
        (pool.n_free, pool.n_used, pool.n_cached),
    )


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=6),
    n_blocks=st.integers(10, 30),
    block_tokens=st.sampled_from([3, 4, 16]),
    max_running=st.integers(1, 6),
    n_groups=st.integers(1, 2),
    share=st.floats(0.0, 1.0),
)
def test_rounds_skipped_and_rounds_run_bring_the_same_events(
    shapes: list[tuple[int, int]],
    n_blocks: int,
    block_tokens: int,
    max_running: int,
    n_groups: int,
    share: float,
) -> None:
    slow, fast = (filled(shapes, n_blocks, block_tokens, max_running) for _ in range(2))
    rounds = 0
    while slow.has_work:
        rounds += 1
        assert rounds < 2000
        n_skipped = max(1, round(share * fast.steps_until_change())) if fast.steps_until_change() else 0
        if n_skipped:
            before = state(slow)
            emissions = fast.advance(n_skipped, TOKEN, 0.0)
            for at in range(n_skipped):
                singly = one_round(slow, n_groups)
                assert [done.finish_reason for done in singly].count(None) == len(singly) or (
                    at == n_skipped - 1
                ), before
        else:
            emissions, singly = one_round(fast, n_groups), one_round(slow, n_groups)
        assert [told(done) for done in emissions] == [told(done) for done in singly]
        assert state(slow) == state(fast)
    assert not fast.has_work


def told(emission: Emission) -> tuple[str, int, int, str | None]:
    return emission.sequence.id, emission.first, len(emission.tokens), emission.finish_reason


def test_long_stretches_are_skipped_at_once() -> None:
    batcher = filled([(5, 500), (9, 700)], 200, 16, 8)
    one_round(batcher, 1)
    assert batcher.steps_until_change() == 499
    batcher.advance(499, TOKEN, 0.0)
    assert [held.id for held in batcher.running] == ["1"]
    assert batcher.steps_until_change() == 200


def test_nothing_is_skipped_while_a_step_is_in_flight_or_someone_may_join() -> None:
    batcher = filled([(5, 50)], 200, 16, 8)
    assert batcher.steps_until_change() == 0, "its prompt is to be computed"
    one_round(batcher, 1)
    batch = batcher.next_step(0.0, 1)
    assert batch is not None
    assert batcher.steps_until_change() == 0
    batcher.complete(batch.step, [[TOKEN]], 0.0)
    assert batcher.steps_until_change() == 48
    batcher.submit(sequence("late", 5), 0.0)
    assert batcher.steps_until_change() == 0


def test_nothing_is_skipped_while_only_some_are_in_flight() -> None:
    batcher = filled([(5, 50), (6, 50)], 200, 16, 8)
    one_round(batcher, 1)
    assert batcher.next_step(0.0, 2) is not None
    assert batcher.steps_until_change() == 0


def test_one_that_finds_no_room_lets_rounds_be_skipped_until_another_comes() -> None:
    batcher = filled([(8, 100), (116, 4)], 30, 4, 8)
    for _ in range(2):
        one_round(batcher, 1)
    assert [held.id for held in batcher.waiting] == ["1"]
    assert batcher.steps_until_change() == 98
    batcher.submit(sequence("small", 5), 0.0)
    assert batcher.steps_until_change() == 0
