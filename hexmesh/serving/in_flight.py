"""The steps that a driver has in flight, in order, and how long they may take.

Stages answer a replica's steps in the order of their numbers. So the answer to one says that what is missing before
it got lost, and only the oldest one's time runs: the others queue behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hexmesh.serving.micro_batch import MicroBatch
from hexmesh.serving.watchdog import Patience, StepTimes
from hexmesh.wire.data import Row

Name = TypeVar("Name")


@dataclass(slots=True, kw_only=True)
class StepInFlight(Generic[Name]):
    """A step that has not been answered; owned by `StepsInFlight`."""

    number: int
    epoch: Name
    """The one that it was sent in."""
    batch: MicroBatch
    rows: list[Row]
    """As the stages see them."""
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

    @property
    def oldest(self) -> StepInFlight[Name] | None:
        """The one whose answer is due next."""
        return next(iter(self._steps.values()), None)

    def get(self, number: int) -> StepInFlight[Name] | None:
        """The step of that number, if it is in flight."""
        return self._steps.get(number)

    def sent(self, number: int, epoch: Name, batch: MicroBatch, rows: list[Row], now_s: float) -> None:
        """A step is under way; its number is higher than those before."""
        self._steps[number] = StepInFlight(
            number=number,
            epoch=epoch,
            batch=batch,
            rows=rows,
            n_in_flight=len(self._steps) + 1,
            sent_s=now_s,
            patience=Patience(self._times.deadline_s(batch.n_tokens), now_s),
        )

    def answered(self, step: StepInFlight[Name], now_s: float) -> list[StepInFlight[Name]]:
        """A step was answered just now; those before it, which will not be."""
        step.patience.spend(now_s)
        self._times.took(step.batch.n_tokens, step.patience.spent_s)
        overtaken = [older for older in self._steps.values() if older.number < step.number]
        for gone in (step, *overtaken):
            del self._steps[gone.number]
        self._begin_turn(now_s)
        return overtaken

    def lost(self, step: StepInFlight[Name], now_s: float) -> None:
        """A step will not be answered."""
        was_oldest = self.oldest
        del self._steps[step.number]
        if self.oldest is not was_oldest:
            self._begin_turn(now_s)

    def forget(self) -> None:
        """Nothing is under way any more."""
        self._steps.clear()

    def steps(self) -> list[StepInFlight[Name]]:
        """All, oldest first."""
        return list(self._steps.values())

    def not_of(self, epoch: Name) -> list[StepInFlight[Name]]:
        """Those that were sent in another epoch."""
        return [step for step in self._steps.values() if step.epoch != epoch]

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
