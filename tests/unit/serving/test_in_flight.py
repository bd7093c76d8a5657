"""Steps in flight: what an answer says of the others, and whose time runs."""

from __future__ import annotations

from hexmesh.serving.in_flight import StepInFlight, StepsInFlight
from hexmesh.serving.micro_batch import MicroBatch
from hexmesh.serving.watchdog import FIRST_S, FLOOR_S, MARGIN, N_FIRST, StepTimes


def three(times: StepTimes | None = None) -> StepsInFlight[str]:
    """Steps 1 to 3, sent at 0 s, in epoch "e"."""
    steps: StepsInFlight[str] = StepsInFlight(times or StepTimes(0.0, 1))
    for number in (1, 2, 3):
        send(steps, number, "e", 0.0)
    return steps


def send(steps: StepsInFlight[str], number: int, epoch: str, now_s: float) -> StepInFlight[str]:
    steps.sent(number, epoch, MicroBatch(number, []), [], now_s)
    return the(steps, number)


def the(steps: StepsInFlight[str], number: int) -> StepInFlight[str]:
    step = steps.get(number)
    assert step is not None
    return step


def numbers(steps: list[StepInFlight[str]]) -> list[int]:
    return [step.number for step in steps]


def look_until(steps: StepsInFlight[str], start_s: float, stop_s: float) -> None:
    """Look every 0.1 s."""
    for tenth in range(round(start_s * 10), round(stop_s * 10) + 1):
        steps.look(tenth / 10)


def test_an_answer_says_that_those_before_it_got_lost() -> None:
    steps = three()
    step = the(steps, 2)
    overtaken = steps.answered(step, 0.1)
    assert (step.n_in_flight, numbers(overtaken), numbers(steps.steps())) == (2, [1], [3])


def test_only_the_time_of_the_oldest_runs() -> None:
    steps = three()
    look_until(steps, 0.1, 4.0)
    oldest = steps.look(4.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (1, 4.0)
    steps.answered(the(steps, 1), 4.0)
    look_until(steps, 4.1, 5.0)
    oldest = steps.look(5.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (2, 1.0)


def test_the_loss_of_a_later_one_gives_the_oldest_no_more_time() -> None:
    steps = three()
    look_until(steps, 0.1, 2.0)
    steps.lost(the(steps, 3), 2.0)
    oldest = steps.look(2.0)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (1, 2.0)
    steps.lost(the(steps, 1), 2.0)
    oldest = steps.look(2.1)
    assert oldest is not None
    assert (oldest.number, round(oldest.charged_s, 6)) == (2, 0.1)


def test_the_time_that_a_step_took_queueing_included_is_what_later_ones_are_given() -> None:
    steps: StepsInFlight[str] = StepsInFlight(StepTimes(0.0, 1))
    for number in range(N_FIRST):
        step = send(steps, number, "e", 10.0 * number)
        look_until(steps, 10.0 * number + 0.1, 10.0 * number + 3.0)
        steps.answered(step, 10.0 * number + 3.0)
    assert round(send(steps, 9, "e", 50.0).patience.limit_s, 6) == MARGIN * 3.0


def test_a_pause_of_the_one_who_waits_is_nobodys_fault() -> None:
    steps = three()
    oldest = steps.look(1000.0)
    assert oldest is not None
    assert oldest.charged_s < FLOOR_S < FIRST_S


def test_steps_of_another_epoch_are_told_apart() -> None:
    steps = three()
    send(steps, 4, "f", 0.0)
    assert (numbers(steps.not_of("f")), numbers(steps.not_of("e")), len(steps)) == ([1, 2, 3], [4], 4)
    steps.forget()
    assert (steps.steps(), steps.oldest) == ([], None)
