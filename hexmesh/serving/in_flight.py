"""The steps that a driver has in flight, in order, and how long they may take.

Stages answer a replica's steps in the order of their numbers. So the answer to one says that what is missing before
it got lost, and only the oldest one's time runs: the others queue behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hexmesh.serving.watchdog import Patience, StepTimes

Name = TypeVar("Name")


@dataclass(slots=True, kw_only=True)
class StepInFlight(Generic[Name]):
    """A step that has not been answered; owned by `StepsInFlight`."""

    number: int
    epoch: Name
    """The one that it was sent in."""
    n_rows: int
    n_tokens: int
    n_in_flight: int
    """When it was sent, itself included."""
    sent_s: float
    patience: Patience
    """Its whole way, as far as whoever waits for it was awake."""
    waited_s: float = 0.0
    """What of it went by before it was the oldest."""

    @property
    def charged_s(self) -> float:
        """How long its answer has been due next."""
        return self.patience.spent_s - self.waited_s


class StepsInFlight(Generic[Name]):
    """Owned by a driver, which looks at least every LOOK_S while there are any."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._steps: dict[int, StepInFlight[Name]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, number: int) -> bool:
        return number in self._steps

    @property
    def oldest(self) -> StepInFlight[Name] | None:
        """The one whose answer is due next."""
        return next(iter(self._steps.values()), None)

    def sent(self, number: int, epoch: Name, n_rows: int, n_tokens: int, now_s: float) -> None:
        """A step is under way; its number is higher than those before."""
        self._steps[number] = StepInFlight(
            number=number,
            epoch=epoch,
            n_rows=n_rows,
            n_tokens=n_tokens,
            n_in_flight=len(self._steps) + 1,
            sent_s=now_s,
            patience=Patience(self._times.deadline_s(n_tokens), now_s),
        )

    def answered(self, number: int, now_s: float) -> tuple[StepInFlight[Name], list[int]]:
        """The step that was answered just now, and the numbers of those before it, which will not be."""
        step = self._steps.pop(number)
        step.patience.spend(now_s)
        self._times.took(step.n_tokens, step.patience.spent_s)
        overtaken = [older for older in self._steps if older < number]
        for older in overtaken:
            del self._steps[older]
        self._begin_turn(now_s)
        return step, overtaken

    def lost(self, number: int, now_s: float) -> None:
        """A step will not be answered."""
        was_oldest = self.oldest
        del self._steps[number]
        if self.oldest is not was_oldest:
            self._begin_turn(now_s)

    def forget(self) -> None:
        """Nothing is under way any more."""
        self._steps.clear()

    def numbers(self) -> list[int]:
        """Of all, oldest first."""
        return list(self._steps)

    def not_of(self, epoch: Name) -> list[int]:
        """Those that were sent in another epoch."""
        return [step.number for step in self._steps.values() if step.epoch != epoch]

    def look(self, now_s: float) -> StepInFlight[Name] | None:
        """The oldest one, with the time charged up to now."""
        for step in self._steps.values():
            step.patience.spend(now_s)
        return self.oldest

    def _begin_turn(self, now_s: float) -> None:
        """Another one is the oldest now."""
        step = self.oldest
        if step is not None:
            step.patience.spend(now_s)
            step.waited_s = step.patience.spent_s
