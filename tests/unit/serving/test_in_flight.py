"""Steps in flight: what an answer says of the others, and whose time runs."""

from __future__ import annotations

from hexmesh.serving.in_flight import StepsInFlight
from hexmesh.serving.watchdog import FIRST_S, FLOOR_S, MARGIN, N_FIRST, StepTimes


def three(times: StepTimes | None = None) -> StepsInFlight[str]:
    """Steps 1 to 3, sent at 0 s, in epoch "e"."""
    steps: StepsInFlight[str] = StepsInFlight(times or StepTimes(0.0, 1))
    for number in (1, 2, 3):
        steps.sent(number, "e", 1, 4, 0.0)
    return steps


def look_until(steps: StepsInFlight[str], start_s: float, stop_s: float) -> None:
    """Look every 0.1 s."""
    for tenth in range(round(start_s * 10), round(stop_s * 10) + 1):
        steps.look(tenth / 10)


def test_an_answer_says_that_those_before_it_got_lost() -> None:
    steps = three()
    step, overtaken = steps.answered(2, 0.1)
    assert (step.number, step.n_in_flight, overtaken, steps.numbers()) == (2, 2, [1], [3])


def test_only_the_time_of_the_oldest_runs() -> None:
    steps = three()
    look_until(steps, 0.1, 4.0)
    oldest = steps.look(4.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (1, 4.0)
    steps.answered(1, 4.0)
    look_until(steps, 4.1, 5.0)
    oldest = steps.look(5.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (2, 1.0)


def test_the_loss_of_a_later_one_gives_the_oldest_no_more_time() -> None:
    steps = three()
    look_until(steps, 0.1, 2.0)
    steps.lost(3, 2.0)
    oldest = steps.look(2.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (1, 2.0)
    steps.lost(1, 2.0)
    oldest = steps.look(2.1)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (2, 0.1)


def test_the_time_that_a_step_took_queueing_included_is_what_later_ones_are_given() -> None:
    steps: StepsInFlight[str] = StepsInFlight(StepTimes(0.0, 1))
    for number in range(N_FIRST):
        steps.sent(number, "e", 1, 4, 10.0 * number)
        look_until(steps, 10.0 * number + 0.1, 10.0 * number + 3.0)
        steps.answered(number, 10.0 * number + 3.0)
    steps.sent(9, "e", 1, 4, 50.0)
    oldest = steps.oldest
    assert oldest is not None
    assert round(oldest.patience.limit_s, 6) == MARGIN * 3.0


def test_a_pause_of_the_one_who_waits_is_nobodys_fault() -> None:
    steps = three()
    oldest = steps.look(1000.0)
    assert oldest is not None
    assert oldest.charged_s < FLOOR_S < FIRST_S


def test_steps_of_another_epoch_are_told_apart() -> None:
    steps = three()
    steps.sent(4, "f", 1, 4, 0.0)
    assert (steps.not_of("f"), steps.not_of("e"), len(steps), 4 in steps) == ([1, 2, 3], [4], 4, True)
    steps.forget()
    assert (steps.numbers(), steps.oldest) == ([], None)
