"""A sequence computed by one replica and decoded by another: what the two batchers do."""

from __future__ import annotations

import pytest

from hexmesh.serving.batcher import Batcher, BatchLimits
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import SampledToken
from tests.unit.serving.fake_replica import sequence

TOKEN = SampledToken(token_id=7)
BLOCK_TOKENS = 4


def _batcher(n_blocks: int, max_waiting: int = 8) -> Batcher:
    limits = BatchLimits(step_tokens=64, max_running=8, max_waiting=max_waiting)
    return Batcher(BlockPool(n_blocks, BLOCK_TOKENS), limits)


def _handed(name: str, n_prompt: int, max_tokens: int) -> Sequence:
    """Its prompt and first token come from elsewhere."""
    found = sequence(name, n_prompt, max_tokens)
    found.tokens.append(7)
    found.awaits_kv = True
    return found


def _step(batcher: Batcher) -> list[tuple[str, int]]:
    """One step: (sequence, output tokens) of those that drew."""
    batch = batcher.next_step(0.0, 1)
    if batch is None:
        return []
    awaited = batcher.awaited(batch.step) or []
    emissions = batcher.complete(batch.step, [[TOKEN] * n for n in awaited], 0.0)
    return [(emission.sequence.id, emission.sequence.n_output) for emission in emissions]


def test_it_waits_for_its_kv_and_then_decodes_without_a_prompt() -> None:
    batcher = _batcher(10)
    handed = _handed("a", 8, 3)
    batcher.submit(handed, 0.0)
    assert _step(batcher) == []
    assert [one.id for one in batcher.to_fetch()] == ["a"]
    assert batcher.to_fetch() == []
    assert batcher.n_decoding == 0
    assert batcher.pool.n_used == 3
    assert _step(batcher) == []
    batcher.received(handed)
    assert batcher.n_decoding == 1
    assert _step(batcher) == [("a", 2)]
    assert _step(batcher) == [("a", 3)]
    assert not batcher.has_work
    assert batcher.pool.n_used == 0


def test_others_decode_while_it_waits_and_it_does_not_give_way() -> None:
    batcher = _batcher(6)
    batcher.submit(sequence("old", 7, 12), 0.0)
    assert _step(batcher) == [("old", 1)]
    handed = _handed("new", 8, 3)
    batcher.submit(handed, 0.0)
    drawn = [_step(batcher) for _ in range(6)]
    assert drawn[0] == [("old", 2)]
    assert len(handed.blocks) == 3
    assert [one for one in drawn if one] == [[("old", n)] for n in range(2, 7)]
    assert _step(batcher) == []  # the rest of the blocks will be written to
    batcher.received(handed)
    assert _step(batcher) == [("old", 7)]  # now it gives way
    assert [one.id for one in batcher.waiting] == ["new"]


def test_having_given_way_it_is_computed_here() -> None:
    batcher = _batcher(6)
    batcher.submit(sequence("old", 7, 12), 0.0)
    _step(batcher)
    handed = _handed("new", 8, 12)
    batcher.submit(handed, 0.0)
    _step(batcher)
    batcher.received(handed)
    drawn, n_gave_way = [], 0
    while batcher.has_work:
        drawn += _step(batcher)
        n_gave_way += handed in batcher.waiting
    assert n_gave_way > 0
    assert drawn[-1] == ("new", 12)
    assert batcher.to_fetch() == [handed]  # the first time alone
    assert batcher.pool.n_used == 0


@pytest.mark.parametrize("is_told", [False, True])
def test_cancelled_its_blocks_are_free_once_nothing_is_written_to_them(is_told: bool) -> None:
    batcher = _batcher(10)
    handed = _handed("a", 8, 3)
    batcher.submit(handed, 0.0)
    _step(batcher)
    if is_told:
        batcher.to_fetch()
    assert batcher.cancel("a")
    assert batcher.pool.n_used == 3
    assert batcher.has_work
    batcher.received(handed)
    assert batcher.pool.n_used == 0
    assert not batcher.has_work


def test_given_up_its_blocks_are_free_at_once() -> None:
    batcher = _batcher(10)
    handed = _handed("a", 8, 3)
    batcher.submit(handed, 0.0)
    _step(batcher)
    assert batcher.abandon() == [handed]
    assert batcher.pool.n_used == 0
    batcher.received(handed)  # too late
    assert not batcher.has_work


def test_a_full_queue_refuses_none_that_was_let_in_elsewhere() -> None:
    batcher = _batcher(10, max_waiting=0)
    batcher.submit(_handed("a", 8, 3), 0.0)
    assert [one.id for one in batcher.waiting] == ["a"]


def test_what_is_cached_here_need_not_be_sent() -> None:
    batcher = _batcher(10)
    first = sequence("a", list(range(9)), 1)
    batcher.submit(first, 0.0)
    _step(batcher)
    handed = sequence("b", list(range(9)), 3)
    handed.tokens.append(7)
    handed.awaits_kv = True
    batcher.submit(handed, 0.0)
    _step(batcher)
    assert [(one.id, one.n_computed) for one in batcher.to_fetch()] == [("b", 8)]
    batcher.received(handed)
    assert _step(batcher) == [("b", 2)]


def test_blocks_stay_leased_after_the_end_until_they_were_sent() -> None:
    batcher = _batcher(10)
    prompt = sequence("a", 8, 1)
    prompt.kept_s = 60.0
    batcher.submit(prompt, 0.0)
    assert _step(batcher) == [("a", 1)]
    assert (batcher.pool.n_used, batcher.pool.n_leased) == (0, 2)
    assert batcher.pool.end_lease(prompt.lease_id)
    assert batcher.pool.n_available == 10


def test_a_lease_that_nobody_ends_ends_itself() -> None:
    batcher = _batcher(10)
    prompt = sequence("a", 8, 1)
    prompt.kept_s = 60.0
    batcher.submit(prompt, 0.0)
    _step(batcher)
    batcher.expire(59.0)
    assert batcher.pool.n_leased == 2
    batcher.expire(60.0)
    assert batcher.pool.n_leased == 0


def test_nameless_blocks_are_free_at_the_end_and_found_by_nobody() -> None:
    batcher = _batcher(10)
    for name in ("a", "b"):
        one = sequence(name, list(range(9)), 1)
        one.names_blocks = name == "b"
        batcher.submit(one, 0.0)
        assert _step(batcher) == [(name, 1)]
        assert one.n_cached == 0
        assert batcher.pool.n_cached == (2 if name == "b" else 0)


def _for_another(name: str) -> Sequence:
    """Its prompt is computed here, and its KV is kept for a replica that decodes it."""
    found = sequence(name, 4, 1)
    found.kept_s = 100.0
    return found


def test_kv_that_waits_to_be_handed_over_leaves_room_for_those_that_stay() -> None:
    """Four of them may wait; then the one behind them that stays is taken up, and the fifth when one has left."""
    batcher = _batcher(7)
    leaving = [_for_another(name) for name in "abcde"]
    for one in leaving:
        batcher.submit(one, 0.0)
    stays = sequence("stays", 4, 12)
    batcher.submit(stays, 0.0)
    drawn = [name for _ in range(4) for name, _ in _step(batcher)]
    assert set(drawn) == {"a", "b", "c", "d", "stays"}
    assert batcher.pool.n_leased == 4
    assert [one.id for one in batcher.waiting] == ["e"]
    assert batcher.pool.end_lease(leaving[0].lease_id)
    assert "e" in [name for name, _ in _step(batcher)]


def test_where_nobody_stays_kv_to_be_handed_over_may_fill_the_pool() -> None:
    batcher = _batcher(7)
    for name in "abcde":
        batcher.submit(_for_another(name), 0.0)
    assert {name for _ in range(4) for name, _ in _step(batcher)} == {"a", "b", "c", "d", "e"}
