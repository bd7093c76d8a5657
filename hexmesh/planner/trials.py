"""Other drafts near a judged one, tried to say why it is as it is. Their number is bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hexmesh.planner.layouts import Layout
from hexmesh.planner.levers import value_of
from hexmesh.planner.objective import Latency
from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Draft, Judged, Problem, takes_too_much
from hexmesh.units import show_duration

_MOST = 240
"""Trials of a small plan; each takes about a millisecond there."""
_LEAST = 24


@dataclass
class Trials:
    """Judges neighbours of one draft until there were enough."""

    problem: Problem
    judged: Judged
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = max(_LEAST, _MOST // max(1, len(self.judged.draft)))

    def judge(self, draft: Draft) -> Judged | None:
        """None where the devices do not reach, or there were too many trials."""
        if self.left <= 0 or takes_too_much(draft, self.problem.pools):
            return None
        self.left -= 1
        return self.problem.judge(draft)

    def best(self, drafts: Iterable[Draft]) -> Judged | None:
        """The worthiest of some."""
        found = [judged for draft in drafts if (judged := self.judge(draft)) is not None]
        return max(found, key=lambda judged: judged.worth, default=None)

    def with_layout(self, at: int, layout: Layout) -> Draft:
        """The draft with another layout in one place."""
        draft = self.judged.draft
        return (*draft[:at], layout, *draft[at + 1 :])

    def rated(self, at: int, parts: tuple[Part, ...]) -> Draft | None:
        """The draft with other parts in one replica's place; None where they do not fit."""
        layout = self.problem.layouts.rated(parts, self.judged.draft[at].role)
        return None if layout is None else self.with_layout(at, layout)

    def kinds(self) -> Iterator[tuple[int, list[int]]]:
        """One replica of each kind, with all that are like it: same role, devices alike, same cuts."""
        kinds = dict[object, list[int]]()
        for at, layout in enumerate(self.judged.draft):
            parts = tuple(
                (self.problem.pools[part.pool].device, part.tp, part.start, part.stop)
                for part in layout.parts
            )
            kinds.setdefault((layout.role, parts), []).append(at)
        for same in kinds.values():
            yield same[0], same

    def figure(self, judged: Judged) -> str:
        """What the objective looks at, in words."""
        if isinstance(self.problem.objective, Latency):
            return show_duration(judged.figures.latency_s)
        return f"{judged.flow.requests_per_s:.4g} requests/s"

    def than(self, judged: Judged) -> str:
        """A trial's figure beside the plan's, such as "31.2 instead of 40.1 requests/s"."""
        mine, theirs = self.figure(self.judged), self.figure(judged)
        if mine == theirs:
            return f"{mine} as well"
        return f"{theirs.removesuffix(' requests/s')} instead of {mine}"

    def is_better(self, judged: Judged) -> bool:
        """By more than rounding."""
        mine, theirs = value_of(self.problem, self.judged), value_of(self.problem, judged)
        return judged.worth > self.judged.worth and theirs > mine * (1 + 1e-4)
