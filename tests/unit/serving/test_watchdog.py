"""Deadlines that follow the work, and waits that charge nobody for the waiter's own pauses."""

from __future__ import annotations

import pytest

from hexmesh.serving.watchdog import FIRST_S, FLOOR_S, MARGIN, MAX_LOOK_S, N_FIRST, Patience, StepTimes


def warm(times: StepTimes, n_tokens: int, seconds: float) -> StepTimes:
    for _ in range(N_FIRST):
        times.took(n_tokens, seconds)
    return times


def test_the_first_steps_get_long_and_a_slow_plan_gets_longer() -> None:
    assert StepTimes(0.01, 8).deadline_s(1) == FIRST_S
    assert StepTimes(0.5, 8).deadline_s(8) == pytest.approx(50)
    assert StepTimes(0.5, 8).deadline_s(80) == pytest.approx(500)


def test_known_quick_steps_get_the_floor_and_no_less() -> None:
    assert warm(StepTimes(0.01, 1), 1, 0.005).deadline_s(1) == FLOOR_S


def test_slow_steps_get_a_margin_over_the_slowest_lately() -> None:
    times = warm(StepTimes(0.01, 1), 1, 0.3)
    times.took(1, 0.8)
    times.took(1, 0.3)
    assert times.deadline_s(1) == pytest.approx(MARGIN * 0.8, rel=0.05)
    for _ in range(300):
        times.took(1, 0.3)
    assert times.deadline_s(1) == pytest.approx(MARGIN * 0.3, rel=0.05)


def test_a_prefill_never_seen_is_scaled_up_from_what_was_and_a_small_step_is_not_charged_for_large_ones() -> (
    None
):
    times = warm(StepTimes(0.01, 1), 1, 0.05)
    assert times.deadline_s(256) == pytest.approx(MARGIN * 0.05 * 256)
    times.took(256, 2.0)
    assert times.deadline_s(256) == pytest.approx(MARGIN * 2.0)
    assert times.deadline_s(300) == pytest.approx(MARGIN * 2.0)  # of the same size class
    assert times.deadline_s(1) == FLOOR_S


def test_a_smaller_step_than_any_seen_gets_what_the_smallest_took() -> None:
    assert warm(StepTimes(0.0, 1), 256, 1.0).deadline_s(1) == pytest.approx(MARGIN * 1.0)


def test_one_who_waits_for_others_that_watch_waits_longer_than_they_do() -> None:
    strict, lenient = StepTimes(0.01, 1), StepTimes(0.01, 1, strictness=0.5)
    for times in (strict, lenient):
        warm(times, 1, 0.4)
    assert lenient.deadline_s(1) == 2 * strict.deadline_s(1)


def test_a_pause_of_the_waiter_is_charged_as_one_look() -> None:
    patience = Patience(2.0, now_s=100.0)
    patience.spend(100.1)
    patience.spend(160.0)  # stopped for a minute
    assert patience.spent_s == pytest.approx(0.1 + MAX_LOOK_S)
    assert not patience.is_over


def test_patience_ends_after_its_limit_of_looks() -> None:
    patience = Patience(0.25, now_s=0.0)
    looks = []
    for tick in range(1, 4):
        patience.spend(tick / 10)
        looks.append(patience.is_over)
    assert looks == [False, False, True]


def test_estimates_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no estimate"):
        StepTimes(-1.0, 1)
    with pytest.raises(ValueError, match="no estimate"):
        StepTimes(1.0, 0)
