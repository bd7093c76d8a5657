"""The best that a pipeline can do with given step times and ways: what a measured rate is held against.

`n_streams` decode; they are cut into groups of as equal sizes as can be, and every group's steps go round: stage after
stage, one step at a time in each, in the order of arrival, and back to the driver, which sends the group's next step at
once. Every number of groups is tried. Pure; nothing is measured here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_ROUNDS = 24
"""Of every group; the first half is the way into the steady state."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that a stage's decode step takes, by its rows; straight lines between what was measured."""

    seconds: Mapping[int, float]
    _rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", sorted(self.seconds))

    def __call__(self, n_rows: float) -> float:
        """Raises ValueError outside of what was measured."""
        if not self._rows[0] <= n_rows <= self._rows[-1]:
            raise ValueError(f"{n_rows} rows, and {self._rows[0]} to {self._rows[-1]} were measured")
        at = bisect_left(self._rows, n_rows)
        above = self._rows[at]
        if above == n_rows:
            return self.seconds[above]
        below = self._rows[at - 1]
        share = (n_rows - below) / (above - below)
        return (1 - share) * self.seconds[below] + share * self.seconds[above]

    def through(self, n_rows: float, seconds: float) -> StepTimes:
        """The same, times what makes them `seconds` at `n_rows`."""
        factor = seconds / self(n_rows)
        return StepTimes({rows: factor * time_s for rows, time_s in self.seconds.items()})


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages in order, and the one-way delay after each: to the next stage, from the last one to the driver."""

    stages: Sequence[StepTimes]
    ways_s: Sequence[float]
    row_s: float = 0.0
    """What each row's hidden states take of a link between stages; the tokens' way back takes none."""

    def way_s(self, stage: int, n_rows: int) -> float:
        """From the stage's output to where it goes."""
        is_last = stage == len(self.stages) - 1
        return self.ways_s[stage] + (0.0 if is_last else n_rows * self.row_s)

    def turn_s(self, n_rows: int) -> float:
        """From sending a step of so many rows to its tokens, when nothing is in its way."""
        return sum(stage(n_rows) + self.way_s(at, n_rows) for at, stage in enumerate(self.stages))


@dataclass(frozen=True, slots=True)
class Schedule:
    """What so many groups reach."""

    n_groups: int
    tokens_per_s: float


def best_schedule(pipeline: Pipeline, n_streams: int) -> Schedule:
    """The schedule with the highest rate; of those within a part in a thousand the one with the fewest groups."""
    found = schedules(pipeline, n_streams)
    enough = max(schedule.tokens_per_s for schedule in found) * 0.999
    return next(schedule for schedule in found if schedule.tokens_per_s >= enough)


def schedules(pipeline: Pipeline, n_streams: int) -> list[Schedule]:
    """What every number of groups reaches, from one group to one stream a group."""
    return [
        Schedule(n_groups, tokens_per_s(pipeline, equal_groups(n_streams, n_groups)))
        for n_groups in range(1, n_streams + 1)
    ]


def equal_groups(n_streams: int, n_groups: int) -> list[int]:
    """Sizes that differ by one at most, larger ones first."""
    size, n_larger = divmod(n_streams, n_groups)
    return [size + 1] * n_larger + [size] * (n_groups - n_larger)


def tokens_per_s(pipeline: Pipeline, groups: Sequence[int]) -> float:
    """The steady rate of groups of these sizes: a simulation of every step."""
    ends_s: list[list[float]] = [[] for _ in groups]
    free_s = [0.0] * len(pipeline.stages)
    arrivals = [(0.0, group, 0) for group in range(len(groups))]
    while min(len(ends) for ends in ends_s) < _ROUNDS:
        now_s, group, stage = heapq.heappop(arrivals)
        free_s[stage] = max(now_s, free_s[stage]) + pipeline.stages[stage](groups[group])
        there_s, onward = free_s[stage] + pipeline.way_s(stage, groups[group]), stage + 1
        if onward == len(pipeline.stages):
            ends_s[group].append(there_s)
            onward = 0
        heapq.heappush(arrivals, (there_s, group, onward))
    return sum(size * _rate(ends) for size, ends in zip(groups, ends_s, strict=True))


def _rate(ends_s: list[float]) -> float:
    """Steps a second over the later half."""
    half = len(ends_s) // 2
    return (len(ends_s) - 1 - half) / (ends_s[-1] - ends_s[half])
