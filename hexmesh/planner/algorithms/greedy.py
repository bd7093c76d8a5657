"""A valid plan at once: one mixed replica a host, and hosts that are too small pooled inside their site, then beyond.

What every other search starts from, and what is shown in the first tenths of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Team
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run


def search(run: Run) -> None:
    """Offers one draft."""
    draft = tuple(_replicas(run.problem))
    if draft:
        run.offer(draft, "greedy")


def _replicas(problem: Problem) -> Iterator[Layout]:
    """Hosts on their own where they can be, then the rest, in the order of sites, until a replica fits."""
    left = list[Team]()
    for _, pools in groupby(range(len(problem.pools)), key=lambda at: problem.pools[at].node.id):
        team = tuple((at, problem.pools[at].size) for at in pools)
        alone = _best(problem, team)
        if alone is None:
            left.append(team)
        else:
            yield alone
    yield from _pooled(problem, left)


def _pooled(problem: Problem, teams: Sequence[Team]) -> Iterator[Layout]:
    gathered: Team = ()
    for team in sorted(teams, key=lambda team: problem.pools[team[0][0]].node.site):
        gathered = tuple(sorted((*gathered, *team)))
        together = _best(problem, gathered)
        if together is not None:
            yield together
            gathered = ()


def _best(problem: Problem, team: Team) -> Layout | None:
    return problem.layouts.best(team, "mixed") if problem.may_be(team, "mixed") else None
