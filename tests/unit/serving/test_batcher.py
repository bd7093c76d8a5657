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


# Sharing a step


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    served = batcher(n_blocks=2000, step_tokens=256)
    served.submit(sequence("long", 4000), 0.0)
    assert step(served) == [("long", 0, 256)]
    served.submit(sequence("short", 100), 0.0)
    assert step(served) == [("long", 256, 156), ("short", 0, 100)]


def test_nor_does_the_long_one_for_ever_new_short_ones() -> None:
    served = batcher(n_blocks=2000, step_tokens=64)
    served.submit(sequence("long", 400, max_tokens=1), 0.0)
    for index in range(400 // 32 + 1):
        for name in "ab":
            served.submit(sequence(f"{name}{index}", 60, max_tokens=1), 0.0)
        step(served)
    assert "long" not in [held.id for held in served.running]


def test_equal_prompts_are_computed_one_after_the_other() -> None:
    served = batcher(step_tokens=16)
    for name in "abc":
        served.submit(sequence(name, 32, max_tokens=1), 0.0)
    firsts = [end(served, begin(served)) for _ in range(6)]
    assert [[done.sequence.id for done in ended] for ended in firsts] == [[], ["a"], [], ["b"], [], ["c"]]


def test_prompts_get_a_quarter_of_the_tokens_however_many_decode() -> None:
    served = batcher(n_blocks=200, step_tokens=8)
    for index in range(8):
        served.submit(sequence(str(index), 1, max_tokens=50), 0.0)
    step(served)
    served.submit(sequence("late", 4), 0.0)
    rows = step(served)
    assert (len(rows), rows[-1]) == (9, ("late", 0, 2))


def test_the_more_important_goes_first_and_the_least_important_gives_way() -> None:
    served = batcher(n_blocks=5, block_tokens=4, max_running=2)
    served.submit(sequence("first", 6, max_tokens=8), 0.0)
    served.submit(sequence("low", 6, max_tokens=8, priority=1), 0.0)
    served.submit(sequence("high", 6, max_tokens=8, priority=-1), 0.0)
    assert [held.id for held in served.waiting] == ["high", "first", "low"]
    finished = []
    while served.has_work:
        finished += [done.sequence.id for done in end(served, begin(served)) if done.finish_reason]
    assert finished == ["high", "first", "low"]


def test_decoding_sequences_are_spread_over_the_groups() -> None:
    served = batcher()
    for name in "abcde":
        served.submit(sequence(name, 1, max_tokens=50), 0.0)
    step(served)
    batches = [begin(served, n_groups=3) for _ in range(3)]
    assert [[name for name, _, _ in rows_of(batch)] for batch in batches] == [["a", "b"], ["c", "d"], ["e"]]
    assert served.next_step(0.0, 3) is None, "all are in flight"
    end(served, batches[1])
    assert rows_of(begin(served, n_groups=3)) == [("c", 2, 1), ("d", 2, 1)]


def test_chunks_of_a_prompt_follow_each_other_without_waiting_for_answers() -> None:
    served = batcher(step_tokens=8)
    served.submit(sequence("a", 20), 0.0)
    batches = [begin(served) for _ in range(3)]
    assert [rows_of(batch) for batch in batches] == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)]]
    assert served.next_step(0.0, 1) is None
    assert [len(end(served, batch)) for batch in batches] == [0, 0, 1]


# Steps that get lost


def test_a_lost_step_is_computed_again_and_so_is_what_followed_on_it() -> None:
    served = batcher(step_tokens=8)
    served.submit(sequence("a", 20), 0.0)
    first, second, third = (begin(served) for _ in range(3))
    end(served, first)
    assert served.counts(second.step, second.rows[0])
    served.lose(second.step)
    assert not served.counts(third.step, third.rows[0])
    assert end(served, third) == [], "it was computed on what the second should have left"
    assert served.awaited(second.step) is None
    again = begin(served)
    assert (rows_of(again), again.step) == ([("a", 8, 8)], 4)
    assert rows_of(begin(served)) == [("a", 16, 4)]


def test_what_follows_on_a_lost_step_is_void_even_if_it_comes_when_that_was_computed_again() -> None:
    served = batcher(step_tokens=8)
    served.submit(sequence("a", 20), 0.0)
    _, second, third = (begin(served) for _ in range(3))
    served.lose(second.step)
    again = begin(served)
    end(served, MicroBatch(1, []))
    end(served, again)
    assert end(served, third) == []
    assert served.running[0].n_computed == 16


def test_an_answer_that_overtakes_the_one_it_follows_on_does_not_count() -> None:
    served = batcher(step_tokens=8)
    served.submit(sequence("a", 12), 0.0)
    first, second = begin(served), begin(served)
    assert not served.counts(second.step, second.rows[0])
    assert end(served, second) == []
    end(served, first)
    assert rows_of(begin(served)) == [("a", 8, 4)]


def test_a_lost_decode_row_runs_again() -> None:
    served = batcher()
    served.submit(sequence("a", 3), 0.0)
    step(served)
    lost = begin(served)
    served.lose(lost.step)
    assert end(served, lost) == []
    assert step(served) == [("a", 3, 1)]


# Verifying drafts


def drafted(served: Batcher, drafts: list[int], answer: list[int]) -> Emission:
    """Let the only sequence verify drafts against what the model says."""
    served.running[0].drafts = drafts
    batch = begin(served)
    assert served.awaited(batch.step) == [len(answer)]
    (emission,) = served.complete(batch.step, [[SampledToken(token_id=one) for one in answer]], 0.0)
    return emission


@pytest.mark.parametrize(
    ("drafts", "answer", "taken"),
    [
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [1, 5, 3, 4], [1, 5]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
    ],
)
def test_drafts_are_taken_up_to_the_first_that_is_wrong(
    drafts: list[int], answer: list[int], taken: list[int]
) -> None:
    served = batcher(block_tokens=1)
    served.submit(sequence("a", 3, max_tokens=20), 0.0)
    step(served)
    held = served.running[0]
    emission = drafted(served, drafts, answer)
    assert (emission.first, [one.token_id for one in emission.tokens]) == (1, taken)
    assert held.tokens[4:] == taken
    assert held.n_computed == 3 + len(taken)
    assert len(held.blocks) == min(4 + len(drafts), 4 + len(taken)), "trimmed back"
    assert step(served) == [("a", 3 + len(taken), 1)]


def test_a_row_brings_its_drafts_behind_its_token() -> None:
    served = batcher()
    served.submit(sequence("a", 3, max_tokens=20), 0.0)
    step(served, token_id=4)
    served.running[0].drafts = [5, 6]
    (row,) = begin(served).rows
    assert (row.start, row.n_tokens, row.token_ids, row.n_wanted) == (3, 3, [4, 5, 6], 3)


def test_an_answer_ends_in_the_middle_of_right_drafts() -> None:
    served = batcher()
    served.submit(sequence("a", 3, max_tokens=20, stop=frozenset({2})), 0.0)
    step(served)
    emission = drafted(served, [1, 2, 3], [1, 2, 3, 4])
    assert ([one.token_id for one in emission.tokens], emission.finish_reason) == ([1, 2], "stop")
    assert (served.has_work, served.pool.n_used) == (False, 0)


def test_no_more_drafts_are_verified_than_tokens_are_wanted() -> None:
    served = batcher()
    served.submit(sequence("a", 3, max_tokens=3), 0.0)
    step(served)
    emission = drafted(served, [1, 2, 3], [1, 2])
    assert ([one.token_id for one in emission.tokens], emission.finish_reason) == ([1, 2], "length")


# Prefixes


def test_what_a_prompt_shares_with_an_earlier_one_is_not_computed_again() -> None:
    served = batcher(block_tokens=4)
    served.submit(sequence("a", list(range(10)), max_tokens=1), 0.0)
    assert step(served) == [("a", 0, 10)]
    served.submit(sequence("b", [*range(9), 77], max_tokens=1), 0.0)
    batch = begin(served)
    assert (rows_of(batch), batch.rows[0].sequence.n_cached) == ([("b", 8, 2)], 8)


def test_an_output_is_found_again_as_part_of_the_next_prompt() -> None:
    served = batcher(block_tokens=4)
    served.submit(sequence("a", [1, 2, 3], max_tokens=6), 0.0)
    while served.has_work:
        step(served, token_id=7)
    served.submit(sequence("b", [1, 2, 3, 7, 7, 7, 7, 7, 7, 8], max_tokens=1), 0.0)
    assert step(served) == [("b", 8, 2)]


def test_a_prompts_last_token_is_computed_though_all_of_it_is_known() -> None:
    served = batcher(block_tokens=4)
    for _ in range(2):
        served.submit(sequence("a", list(range(8)), max_tokens=1), 0.0)
        rows = step(served)
    assert rows == [("a", 4, 4)]


def test_salts_keep_prefixes_apart() -> None:
    served = batcher(block_tokens=4)
    for salt in ("x", "y"):
        served.submit(sequence("a", list(range(10)), max_tokens=1, salt=salt), 0.0)
        assert step(served) == [("a", 0, 10)]


def test_where_every_prompt_position_is_wanted_nothing_is_taken_from_the_cache() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(10)), max_tokens=1), 0.0)
    step(served)
    scored = sequence("b", list(range(10)), max_tokens=1)
    scored.reuses_prefix = False
    served.submit(scored, 0.0)
    assert ("b", 0, 6) in step(served)


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    for name in "abc":
        served.submit(sequence(name, list(range(18)), max_tokens=1), 0.0)
    assert step(served) == [("a", 0, 8)]
    assert step(served) == [("a", 8, 8)]
    assert sorted(step(served)) == [("a", 16, 2), ("b", 16, 2), ("c", 16, 2)]


def test_they_wait_no_longer_than_the_one_that_computes_gets_on() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(18)), max_tokens=1), 0.0)
    served.submit(sequence("b", list(range(18)), max_tokens=1), 0.0)
    assert step(served) == [("a", 0, 8)]
    served.cancel("a")
    assert step(served) == [("b", 8, 8)]


def test_a_more_important_one_does_not_wait_for_a_less_important_one() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(18)), max_tokens=1, priority=1), 0.0)
    step(served)
    served.submit(sequence("b", list(range(18)), max_tokens=1), 0.0)
    assert ("b", 8, 8) in step(served)


def test_a_prompt_unlike_the_one_in_the_making_does_not_wait() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(18)), max_tokens=1), 0.0)
    served.submit(sequence("b", list(range(18)), max_tokens=1), 0.0)
    served.submit(sequence("c", [9, 9, 9], max_tokens=1), 0.0)
    assert step(served) == [("a", 0, 5), ("c", 0, 3)]


def test_one_does_not_wait_for_another_that_does_not_get_on() -> None:
    served = batcher(block_tokens=4, step_tokens=2)
    served.submit(sequence("first", 40, max_tokens=1), 0.0)
    served.submit(sequence("a", list(range(18)), max_tokens=1), 0.0)
    served.submit(sequence("b", list(range(18)), max_tokens=1), 0.0)
    served.submit(sequence("short", 6, max_tokens=1), 0.0)
    assert step(served) == [("first", 0, 1), ("short", 0, 1)]
    step(served)
    assert [held.id for held in served.running] == ["first", "a", "short", "b"]


def test_a_block_computed_twice_is_given_back_once_no_step_reads_it() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(18)), max_tokens=1), 0.0)
    while served.has_work:
        step(served)
    twice = sequence("b", list(range(18)), max_tokens=9)
    twice.reuses_prefix = False
    served.submit(twice, 0.0)
    batches = [begin(served) for _ in range(3)]
    own = list(twice.blocks)
    end(served, batches[0])
    end(served, batches[1])
    assert twice.blocks == own, "the third reads them"
    end(served, batches[2])
    known = served.pool.match(twice.prefix, twice.tokens)
    assert twice.blocks[:4] == known
    assert not set(known) & set(own[:4])


def test_a_block_is_known_once_its_step_was_answered_and_no_sooner() -> None:
    served = batcher(block_tokens=4, step_tokens=8)
    served.submit(sequence("a", list(range(18)), max_tokens=1), 0.0)
    first, _ = begin(served), begin(served)
    held = served.running[0]
    assert served.pool.match(held.prefix, held.tokens) == []
    end(served, first)
    assert served.pool.match(held.prefix, held.tokens) == held.blocks[:2]


# Admission


def test_a_block_for_each_that_runs_is_left_when_another_is_let_in() -> None:
    served = batcher(n_blocks=8, block_tokens=4)
    for name in "ab":
        served.submit(sequence(name, 4, max_tokens=9), 0.0)
    step(served)
    served.submit(sequence("c", 9, max_tokens=1), 0.0)
    assert "c" not in [name for name, _, _ in step(served)], "its three blocks would leave one to two"


def test_a_more_important_one_waits_for_blocks_of_a_less_important_one_in_flight() -> None:
    served = batcher(n_blocks=4, block_tokens=4)
    served.submit(sequence("old", 3, max_tokens=13), 0.0)
    served.submit(sequence("young", 2, max_tokens=14), 0.0)
    step(served)
    old, young = served.running
    while len(old.tokens) < 9:
        batches = [begin(served, n_groups=2) for _ in range(2)]
        for batch in sorted(batches, key=lambda batch: batch.rows[0].sequence is old):
            end(served, batch)
    in_flight = begin(served, n_groups=2)
    assert rows_of(in_flight) == [("young", 7, 1)]
    assert served.next_step(0.0, 2) is None, "the old one has no room, and the young one is needed yet"
    end(served, in_flight)
    assert rows_of(begin(served, n_groups=2)) == [("old", 8, 1)]
    assert served.waiting == [young]


def test_a_small_request_passes_one_that_waits_for_blocks_but_not_for_ever() -> None:
    served = batcher(n_blocks=976, block_tokens=4)
    served.submit(sequence("runs", 12, max_tokens=60), 0.0)
    step(served)
    large = sequence("large", 3900, max_tokens=1)
    served.submit(large, 0.0)
    small = [sequence(f"small{index}", 3, max_tokens=1) for index in range(50)]
    for one in small:
        served.submit(one, 0.0)
        step(served)
    assert [one.n_output for one in small] == [1] * 32 + [0] * 18
    while served.has_work:
        step(served)
    assert (large.n_output, small[-1].n_output) == (1, 1)


def test_one_who_is_refused_is_told_when_a_place_will_be_free() -> None:
    served = batcher(max_running=1, max_waiting=2)
    for second in range(0, 40, 4):
        served.submit(sequence(f"runs{second}", 3, max_tokens=1), float(second))
        end(served, begin(served), now_s=float(second))
    for name in "abc":
        served.submit(sequence(name, 3, max_tokens=9), 40.0)
        served.next_step(40.0, 1)
    told = []
    for name in "xyz":
        with pytest.raises(Busy) as refused:
            served.submit(sequence(name, 3), 40.0)
        told.append(refused.value.retry_after_s)
    assert told == pytest.approx([4.0, 8.0, 12.0]), "one ended every four seconds; each has his own turn"


def test_before_anything_ended_a_guess_is_told_and_never_more_than_a_minute() -> None:
    served = batcher(max_waiting=1)
    served.submit(sequence("a", 4), 0.0)
    told = []
    for _ in range(50):
        with pytest.raises(Busy) as refused:
            served.submit(sequence("b", 4), 0.0)
        told.append(refused.value.retry_after_s)
    assert (told[0], told[-1]) == (2.0, 60.0)


def test_what_is_past_its_deadline_is_dropped() -> None:
    served = batcher(max_running=1)
    served.submit(sequence("a", 4, deadline_s=5.0), 0.0)
    served.submit(sequence("b", 4, deadline_s=6.0), 0.0)
    served.submit(sequence("c", 4), 0.0)
    batch = begin(served)
    assert served.expire(4.9) == []
    assert [late.id for late in served.expire(5.0)] == ["a"]
    assert end(served, batch) == []
    assert [late.id for late in served.expire(7.0)] == ["b"]
    assert step(served) == [("c", 0, 4)]


def test_a_step_has_no_more_rows_than_a_message_takes() -> None:
    served = batcher(n_blocks=3000, max_running=2000, max_waiting=2000, step_tokens=2048)
    for at in range(1500):
        served.submit(sequence(str(at), 1, max_tokens=6), 0.0)
    prompts = [begin(served), begin(served)]
    for batch in prompts:
        end(served, batch)
    n_rows = [len(batch.rows) for batch in prompts]
    assert n_rows == [1024, 476]
    while served.has_work:
        n_rows.append(len(step(served)))
    assert max(n_rows) == 1024
    assert sum(n_rows) == 6 * 1500


@pytest.mark.parametrize("limits", [{"max_running": 9000}, {"step_tokens": 5000}, {"step_tokens": 0}])
def test_limits_beyond_what_stages_take_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_running \d+ of 8192"):
        BatchLimits(**limits)
