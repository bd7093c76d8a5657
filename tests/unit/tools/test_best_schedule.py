"""The simulated pipeline against what paper gives for cases that it can be written down for."""

from __future__ import annotations

import pytest

from tools.bench.best_schedule import (
    Pipeline,
    Schedule,
    StepTimes,
    best_schedule,
    equal_groups,
    schedules,
    tokens_per_s,
)


def linear(fixed_s: float, a_row_s: float) -> StepTimes:
    return StepTimes({n_rows: fixed_s + a_row_s * n_rows for n_rows in (1, 64, 256)})


def pipeline(*stages: StepTimes, ways_s: tuple[float, ...] | None = None) -> Pipeline:
    return Pipeline(stages, ways_s if ways_s is not None else (0.0,) * len(stages))


def test_one_stage_without_ways_is_never_idle() -> None:
    stage = linear(0.010, 0.001)
    assert tokens_per_s(pipeline(stage), [8]) == pytest.approx(8 / 0.018)
    assert tokens_per_s(pipeline(stage), [4, 4]) == pytest.approx(8 / (2 * 0.014))


def test_one_group_pays_every_stage_and_every_way_in_turn() -> None:
    far = pipeline(linear(0.003, 0.001), linear(0.005, 0.0), ways_s=(0.020, 0.030))
    assert tokens_per_s(far, [1]) == pytest.approx(1 / (0.004 + 0.020 + 0.005 + 0.030))
    assert tokens_per_s(far, [10]) == pytest.approx(10 / (0.013 + 0.020 + 0.005 + 0.030))


def test_hidden_states_take_time_on_the_way_to_the_next_stage_and_tokens_none() -> None:
    far = Pipeline((linear(0.010, 0.0), linear(0.010, 0.0)), (0.020, 0.020), row_s=0.001)
    assert tokens_per_s(far, [10]) == pytest.approx(10 / (0.010 + 0.030 + 0.010 + 0.020))


@pytest.mark.parametrize("n_groups", range(1, 12))
def test_equal_groups_fill_the_ways_until_the_slowest_stage_is_full(n_groups: int) -> None:
    far = pipeline(linear(0.004, 0.0), linear(0.010, 0.0), ways_s=(0.020, 0.020))
    turn_s, slowest_s = 0.054, 0.010
    expected = 2 * min(n_groups / turn_s, 1 / slowest_s)
    assert tokens_per_s(far, [2] * n_groups) == pytest.approx(expected)


def test_unequal_groups_wait_for_the_stage_that_they_share() -> None:
    two = pipeline(linear(0.0, 1.0), linear(0.0, 1.0))
    # Each stage takes 4 s a round; the group of 3 needs 6 s for its own turn, so it is the round.
    assert tokens_per_s(two, [3, 1]) == pytest.approx(4 / 6)
    # With the groups 2, 1, 1 a turn of the largest is 4 s, and so is a round of each stage.
    assert tokens_per_s(two, [2, 1, 1]) == pytest.approx(4 / 4)


def test_a_step_whose_time_does_not_depend_on_its_rows_is_best_left_whole() -> None:
    near = pipeline(linear(0.010, 0.0), linear(0.010, 0.0))
    assert best_schedule(near, 32) == Schedule(1, pytest.approx(32 / 0.020))


def test_a_step_that_is_all_rows_is_best_cut_into_one_group_a_stage() -> None:
    near = pipeline(linear(0.0, 0.001), linear(0.0, 0.001))
    assert best_schedule(near, 32) == Schedule(2, pytest.approx(1 / 0.001))


def test_the_best_over_a_far_way_is_between_the_extremes() -> None:
    """16 streams; a group's turn is 40 + 2 (4 + b) ms, and a stage's round g (4 + b)."""
    far = pipeline(linear(0.004, 0.001), linear(0.004, 0.001), ways_s=(0.020, 0.020))
    by_groups = {schedule.n_groups: schedule.tokens_per_s for schedule in schedules(far, 16)}
    for n_groups in (1, 2, 4, 8, 16):
        size = 16 // n_groups
        round_s = max(0.040 + 2 * (0.004 + 0.001 * size), n_groups * (0.004 + 0.001 * size))
        assert by_groups[n_groups] == pytest.approx(16 / round_s)
    assert best_schedule(far, 16) == Schedule(8, pytest.approx(16 / 0.052))


def test_no_schedule_beats_the_two_bounds_of_any_pipeline() -> None:
    odd = pipeline(
        linear(0.002, 0.0013), linear(0.007, 0.0004), linear(0.001, 0.0), ways_s=(0.011, 0.0, 0.03)
    )
    for schedule in schedules(odd, 23):
        groups = equal_groups(23, schedule.n_groups)
        turn_s = min(odd.turn_s(size) for size in groups)
        round_s = max(sum(stage(size) for size in groups) for stage in odd.stages)
        assert schedule.tokens_per_s <= 23 / turn_s * 1.000001
        assert schedule.tokens_per_s <= 23 / round_s * 1.03  # the window need not end with a round


def test_groups_differ_by_one_stream_at_most() -> None:
    assert equal_groups(10, 4) == [3, 3, 2, 2]
    assert equal_groups(8, 8) == [1] * 8


def test_between_measured_sizes_times_lie_on_a_line() -> None:
    times = StepTimes({1: 2.0, 5: 4.0})
    assert [times(n_rows) for n_rows in (1, 2, 5)] == [2.0, 2.5, 4.0]
    with pytest.raises(ValueError, match="6 rows"):
        times(6)


def test_times_can_be_led_through_one_that_was_seen_elsewhere() -> None:
    slower = StepTimes({1: 2.0, 5: 4.0}).through(3, 6.0)
    assert [slower(n_rows) for n_rows in (1, 3, 5)] == [4.0, 6.0, 8.0]
