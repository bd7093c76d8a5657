"""One search under way: the best draft so far, how it came about, and when to stop."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hexmesh.planner.problem import Draft, Judged, Problem


@dataclass(frozen=True, slots=True)
class Step:
    """A draft that was better than all before it."""

    elapsed_s: float
    value: float
    """What the objective looks at first."""
    requests_per_s: float
    by: str
    """Who found it."""


@dataclass(kw_only=True)
class Run:
    """Owned by the front door; searches offer drafts to it. A search that is over stops soon and keeps what it has."""

    problem: Problem
    rng: random.Random
    clock: Callable[[], float]
    budget_s: float
    current: Draft | None = None
    """What serves now: a start to improve on."""
    on_step: Callable[[Step], None] = lambda step: None
    best: Judged | None = None
    best_by: dict[str, Judged] = field(default_factory=dict)
    """The best of each who offered."""
    trace: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the person who asked should know of the search, such as that time cut it short."""
    n_judged: int = 0
    started_s: float = field(init=False)
    ends_s: float = field(init=False)
    """When what runs now must stop, in seconds since the start."""

    def __post_init__(self) -> None:
        self.started_s = self.clock()
        self.ends_s = self.budget_s

    @property
    def elapsed_s(self) -> float:
        return self.clock() - self.started_s

    @property
    def is_over(self) -> bool:
        """Whether the time is used up."""
        return self.elapsed_s >= self.ends_s

    @property
    def left_s(self) -> float:
        """Of the time."""
        return max(0.0, self.ends_s - self.elapsed_s)

    @contextmanager
    def slice(self, *, share: float = 1.0, until: float = 1.0) -> Iterator[None]:
        """What runs inside has that share of the budget, and none after the share `until` of it."""
        before = self.ends_s
        self.ends_s = min(before, self.elapsed_s + share * self.budget_s, until * self.budget_s)
        try:
            yield
        finally:
            self.ends_s = before

    def offer(self, draft: Draft, by: str) -> Judged:
        """Judge a draft, and keep it if it is the best."""
        return self.keep(self.problem.judge(draft), by)

    def keep(self, judged: Judged, by: str) -> Judged:
        """The same for one that was judged already."""
        self.n_judged += 1
        if by not in self.best_by or judged.worth > self.best_by[by].worth:
            self.best_by[by] = judged
        if judged.flow.requests_per_s > 0 and (self.best is None or judged.worth > self.best.worth):
            self.best = judged
            step = Step(self.elapsed_s, judged.worth[0], judged.flow.requests_per_s, by)
            self.trace.append(step)
            self.on_step(step)
        return judged

    def offer_all(self, drafts: Iterable[Draft], by: str) -> None:
        """Judge drafts one after the other until the time is used up."""
        for draft in drafts:
            self.offer(draft, by)
            if self.is_over:
                return
