"""The best partition without disaggregation: every replica computes its own prompts.

What a fleet gives when KV never crosses the network: the sum of its replicas' rates. Starts are one replica a host
and HexGen-2's partitions for several K (`spectral.py`); then teams trade, join and split while the sum grows. Rates
are exact (`Layouts`), the search is not. HexGen's own search is `genetic`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from hexmesh.planner.algorithms.hexgen2 import most_groups, replica_bytes
from hexmesh.planner.exchanges import handed_over, joined, swapped
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Team
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run
from hexmesh.planner.spectral import graph_of, partition

MAX_PARTITIONS = 6
MAX_TRADES = 1_000
"""Tried in all."""
LARGEST = 6
"""Replicas that a team's memory could hold at most: larger ones take long to lay out, and hardly ever win."""
NEAR = 6
"""Teams that each may trade with, those next to it in the order of the partition."""

Teams = tuple[Team, ...]


@dataclass(frozen=True)
class Sum:
    """A partition's rate."""

    problem: Problem

    def rate(self, team: Team) -> float:
        layout = self.layout(team)
        return 0.0 if layout is None else layout.requests_per_s

    def of(self, teams: Teams) -> float:
        return sum(self.rate(team) for team in teams)

    def layout(self, team: Team) -> Layout | None:
        return self.problem.layouts.best(team, "mixed")

    def is_small(self, teams: Teams) -> bool:
        pools = self.problem.pools
        held = (sum(n * pools[pool].device.budget_bytes for pool, n in team) for team in teams)
        return max(held) <= LARGEST * replica_bytes(self.problem)

    def draft(self, teams: Teams) -> Draft:
        return tuple(layout for team in teams if (layout := self.layout(team)) is not None)


def search(run: Run) -> None:
    """Offers every start, and what the best of them can be improved to."""
    if "mixed" not in run.problem.roles:
        run.notes.append("colocated replicas are mixed, which was not asked for")
        return
    total = Sum(run.problem)
    best: Teams = ()
    for teams in _starts(run.problem):
        if draft := total.draft(teams):
            run.offer(draft, "colocated")
        best = max(best, teams, key=total.of)
        if run.is_over:
            return
    _improved(run, total, best)


def _starts(problem: Problem) -> Iterator[Teams]:
    yield tuple(
        tuple((at, problem.pools[at].size) for at in pools)
        for _, pools in groupby(range(len(problem.pools)), key=lambda at: problem.pools[at].node.id)
    )
    graph, most = graph_of(problem), max(1, most_groups(problem))
    for at in range(1, MAX_PARTITIONS + 1):
        if n_groups := most * at // MAX_PARTITIONS:
            yield tuple(partition(graph, n_groups, replica_bytes(problem)))


def _improved(run: Run, total: Sum, teams: Teams) -> None:
    left, improved = MAX_TRADES, True
    while improved and left > 0:
        improved = False
        for old, new in _trades(teams):
            left -= 1
            if left <= 0 or run.is_over:
                break
            if total.is_small(new) and total.of(new) > total.of(old) * (1 + 1e-9) + 1e-12:
                teams, improved = _replaced(teams, old, new), True
                run.offer(total.draft(teams), "colocated")
                break


def _trades(teams: Sequence[Team]) -> Iterator[tuple[Teams, Teams]]:
    """(teams before, the same devices after)."""
    for at, a in enumerate(teams):
        for b in teams[at + 1 : at + 1 + NEAR]:
            yield (a, b), (joined(a, b),)
            for trade in (handed_over(a, b), handed_over(b, a), swapped(a, b)):
                for new in trade:
                    yield (a, b), tuple(team for team in new if team)
        for half, rest in handed_over(a, ()):
            if half:
                yield (a,), (half, rest)


def _replaced(teams: Teams, old: Teams, new: Teams) -> Teams:
    kept = list(teams)
    at = kept.index(old[0])
    for team in old:
        kept.remove(team)
    return (*kept[:at], *new, *kept[at:])
