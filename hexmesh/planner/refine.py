"""Drafts a change away from a good one, with all layouts chosen together: where cuts must fit each other.

Searches over teams and roles give each team the one layout that is best by itself, and so pass by partitions that are
good only with cuts that fit. Here teams and roles are changed as in annealing, and what they come to is found as in
exhaustive search: over all wanted layouts of all teams at once, bounded by prices (`hexmesh.planner.cell`). A walk that
gets colder: changes that serve a little less are kept at first.

For drafts of few replicas of few devices each, whose layouts are soon listed; and for objectives that want a rate.
"""

from __future__ import annotations

import math
import random

from hexmesh.planner.cells import Cells, look_into
from hexmesh.planner.changes import Changes, Grouped, Nearby
from hexmesh.planner.moves import idle
from hexmesh.planner.objective import Goodput, Throughput
from hexmesh.planner.pools import team_of
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.run import Run

MOST_REPLICAS = 8
"""Of a draft."""
MOST_DEVICES = 8
"""Of a team."""
TRIALS = 600
"""Changes of one draft that are drawn: most are of no use, or were met before."""
HOTTEST, COLDEST = 0.1, 0.005
"""Temperatures, in shares of what the draft serves."""
MOST_JUDGED = 12
"""Drafts of the same teams and roles."""
LEAST_GAIN = 1e-4
BY = "refined"

Teams = tuple[Grouped, ...]


class Refiner:
    """One run's: what it finds of teams and roles is kept from one draft to the next."""

    def __init__(self, run: Run) -> None:
        self._run, self._cells = run, Cells(run.problem)
        self._nearby, self._rng = Nearby(run.problem.pools), random.Random(run.rng.random())
        self._known = dict[Teams, tuple[float, Judged | None]]()

    def refine(self, judged: Judged) -> None:
        """Offers the draft with other layouts, and better ones that changes of its teams lead to."""
        if not suits(self._run.problem, judged.draft):
            return
        here = self._laid_out(_teams_of(judged.draft), judged.flow.requests_per_s) or judged
        for trial in range(TRIALS):
            if self._run.is_over:
                return
            teams = self._changed(_teams_of(here.draft))
            warmth = HOTTEST * (COLDEST / HOTTEST) ** (trial / TRIALS)
            least = here.flow.requests_per_s * (1 + warmth * math.log(1 - self._rng.random()))
            if teams is not None and _may_be(teams):
                here = self._laid_out(teams, least) or here

    def _changed(self, teams: Teams) -> Teams | None:
        problem = self._run.problem
        spare = idle(problem.whole, (team for team, _ in teams))
        change = Changes(problem.pools, problem.roles, teams, spare).draw(self._nearby, self._rng)
        if change is None:
            return None
        kept = (one for at, one in enumerate(teams) if at not in change.gone)
        return tuple(sorted((*kept, *(one for one in change.come if one[0]))))

    def _laid_out(self, teams: Teams, least: float) -> Judged | None:
        """The best draft of these teams if it serves more than `least`."""
        looked_above, best = self._known.get(teams, (math.inf, None))
        if looked_above > least:
            best = self._looked_into(teams, least) or best
            self._known[teams] = least, best
        return best if best is not None and best.flow.requests_per_s > least else None

    def _looked_into(self, teams: Teams, least: float) -> Judged | None:
        cell, judged = self._cells.of(teams), list[Judged]()

        def judge(draft: Draft) -> Judged:
            judged.append(self._run.offer(draft, BY))
            return judged[-1]

        def enough() -> float:
            if len(judged) == MOST_JUDGED or self._run.is_over:
                return math.inf
            return (1 + LEAST_GAIN) * max((one.flow.requests_per_s for one in judged), default=least)

        if cell is not None:
            look_into(cell, judge, enough)
        return max(judged, key=lambda one: one.worth, default=None)


def suits(problem: Problem, draft: Draft) -> bool:
    """Whether the draft's layouts are few enough to be chosen together."""
    wants_rate = isinstance(problem.objective, Throughput | Goodput)
    return wants_rate and problem.hands_over and _may_be(_teams_of(draft))


def _may_be(teams: Teams) -> bool:
    """Whether the teams are few and small, and do both prompts and outputs."""
    roles = {role for _, role in teams}
    is_small = all(sum(n for _, n in team) <= MOST_DEVICES for team, _ in teams)
    return is_small and len(teams) <= MOST_REPLICAS and bool(roles - {"prefill"}) and bool(roles - {"decode"})


def _teams_of(draft: Draft) -> Teams:
    return tuple(sorted((team_of(layout.parts), layout.role) for layout in draft))
