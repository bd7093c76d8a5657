"""Exact search for a few devices: every way to form teams, every role, every wanted layout; best first, with bounds.

1. Teams are vectors of counts over the pools; a partition is a multiset of teams, devices left over allowed.
2. Every team gets its wanted layouts in each role (`hexmesh.planner.every_layout`). Layouts that differ in where layers
   lie are kept side by side: fixing each team's layout before flows are known loses up to 26 times on slow links, where
   cuts of prefill and decode replicas must be aligned.
3. Partitions, roles, and then layouts team by team are taken in the order of an upper bound (`hexmesh.planner.cell`),
   until the next bound is no better than the best plan. What is left is judged by the flow program itself, and the
   prices at which that sells out bound what is like it.

Exact (to one part in a million) for the objectives throughput, goodput and cost where every team has few enough layouts
to have them all, which the run's notes say; for "mixed" up to what 65 directions of its polygon tell apart. Else exact
over partitions and roles, for layouts around the best of each team. For the objective latency it is exact over
partitions and roles that pass the rate, with each team's quickest or fastest layout; cuts are then moved (`align`).
After HexGen-2, whose four choices (groups, roles, strategies, handoffs) it makes at once; differs: it is exhaustive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement, groupby, product

import numpy as np

from hexmesh.cluster import Role
from hexmesh.planner.align import align
from hexmesh.planner.cells import Cells, look_into
from hexmesh.planner.every_layout import Choice
from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.partitions import n_teams_within, partitions, teams_within
from hexmesh.planner.pools import ROLES, Team
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.run import Run

SMALL = 8
"""Devices up to which the search is meant to be exact."""
MOST_TEAMS = 1200
MOST_PARTITIONS = 300_000
MOST_JUDGED = 20_000
"""Drafts that one search judges at most."""
_BETTER = 1 + 1e-6
"""A bound must promise that much more to be looked into."""
FIRST_LOOK = 2
"""Drafts of one partition and its roles, in a first pass."""
BY = "exhaustive"


def is_small(problem: Problem) -> bool:
    """Whether exhaustive search is quick enough to be the first choice."""
    return sum(pool.size for pool in problem.pools) <= SMALL


def search(run: Run) -> None:
    """Offers the best draft, and those that led to it."""
    sizes = tuple(pool.size for pool in run.problem.pools)
    if n_teams_within(sizes) > MOST_TEAMS:
        run.notes.append(f"exhaustive: not searched, {n_teams_within(sizes)} teams are too many")
        return
    _Search(run).search()


@dataclass(frozen=True, slots=True)
class _Node:
    """A partition, by the indices of its teams."""

    teams: tuple[int, ...]
    bound: float
    price_per_h: float


@dataclass
class _Search:
    run: Run
    rate: float = 0.0
    """Of the best draft so far, or what one must exceed."""
    n_judged: int = 0
    most_of_cell: int = MOST_JUDGED
    """Drafts of one partition and its roles."""
    left_of_cell: int = MOST_JUDGED
    cells: Cells = field(init=False)
    teams: list[Team] = field(init=False)
    choices: list[dict[Role, Choice]] = field(init=False)

    def __post_init__(self) -> None:
        problem = self.run.problem
        self.cells = Cells(problem)
        found = [
            (team, choices)
            for team in teams_within(tuple(pool.size for pool in problem.pools))
            if not self.run.is_over and _may_hold(problem, team) and (choices := self.cells.layouts.of(team))
        ]
        self.teams, self.choices = [team for team, _ in found], [choices for _, choices in found]
        if self.run.best is not None:
            self.rate = self.run.best.flow.requests_per_s

    def search(self) -> None:
        """By objective."""
        nodes = self._nodes()
        objective = self.run.problem.objective
        if isinstance(objective, LeastCost):
            self._cheapest(nodes, objective.requests_per_s)
        elif isinstance(objective, Latency):
            self._soonest(nodes, objective.requests_per_s)
        else:
            self._fastest(nodes)
        if any(not choice.is_complete for found in self.choices for choice in found.values()):
            self.run.notes.append(
                "exhaustive: of teams with too many layouts only those near the best were tried"
            )
            found = self.run.best_by.get(BY)
            if found is not None:
                align(self.run, found, BY)
        if self.is_over:
            self.run.notes.append("exhaustive: ended before all partitions were looked into")

    @property
    def is_over(self) -> bool:
        return self.run.is_over or self.n_judged >= MOST_JUDGED

    def _fastest(self, nodes: Sequence[_Node]) -> None:
        """First a look at the most promising layouts of each partition, for a rate to beat; then at all."""
        for self.most_of_cell in (FIRST_LOOK, MOST_JUDGED):
            for node in sorted(nodes, key=lambda node: -node.bound):
                if node.bound <= self.rate * _BETTER or self.is_over:
                    break
                self._look_into(node)

    def _cheapest(self, nodes: Sequence[_Node], wanted: float) -> None:
        """By rising price, the first that serve the rate; if none do, the fastest."""
        able = sorted(
            (node for node in nodes if node.bound >= wanted), key=lambda node: (node.price_per_h, -node.bound)
        )
        for _, alike in groupby(able, key=lambda node: node.price_per_h):
            self.rate = wanted / _BETTER
            for node in alike:
                if self.is_over:
                    return
                if node.bound > self.rate * _BETTER:
                    self._look_into(node)
            if self.rate >= wanted:
                return
        self.rate = 0.0
        self._fastest(nodes)

    def _soonest(self, nodes: Sequence[_Node], wanted: float) -> None:
        """By rising bound on the latency; if none serves the rate, the fastest."""
        every = sorted(
            (self._least_s(node.teams, roles), node.teams, roles)
            for node in nodes
            if node.bound >= wanted
            for roles in _roles(node.teams, [self.choices[team] for team in node.teams])
        )
        best: Judged | None = None
        for least_s, teams, roles in every:
            if self.is_over or (best is not None and least_s >= _latency_s(best, wanted)):
                break
            for draft in self._quick_or_fast(teams, roles):
                self.n_judged += 1
                judged = self.run.offer(draft, BY)
                best = judged if best is None or judged.worth > best.worth else best
        if best is not None and _latency_s(best, wanted) < float("inf"):
            align(self.run, best, BY)
        else:
            self._fastest(nodes)

    def _least_s(self, teams: Sequence[int], roles: Sequence[Role]) -> float:
        """Of a request that takes the best way through idle replicas, its handoff left out."""
        return min(
            (
                self._alone_s(teams[p], "mixed")
                if p == d
                else self._alone_s(teams[p], "prefill") + self._alone_s(teams[d], "decode")
                for p in range(len(teams))
                for d in range(len(teams))
                if roles[p] != "decode" and roles[d] != "prefill"
            ),
            default=float("inf"),
        )

    def _alone_s(self, team: int, role: Role) -> float:
        layout = self.run.problem.layouts.quickest(self.teams[team], role)
        return 0.0 if layout is None else layout.alone_s

    def _quick_or_fast(self, teams: Sequence[int], roles: Sequence[Role]) -> Iterator[Draft]:
        layouts = self.run.problem.layouts
        both = [
            tuple(
                dict.fromkeys(
                    layout
                    for layout in (
                        layouts.quickest(self.teams[team], role),
                        layouts.best(self.teams[team], role),
                    )
                    if layout is not None
                )
            )
            for team, role in zip(teams, roles, strict=True)
        ]
        yield from product(*both)

    def _nodes(self) -> list[_Node]:
        """All partitions, each with what it may do at most, links left out."""
        problem, sizes = self.run.problem, tuple(pool.size for pool in self.run.problem.pools)
        prices = {pool.node.id: pool.node.price_per_h or 0.0 for pool in problem.pools}
        furthest = [np.max([choice.furthest for choice in found.values()], axis=0) for found in self.choices]
        nodes = []
        for at, teams in enumerate(partitions(sizes, self.teams)):
            if at == MOST_PARTITIONS:
                self.run.notes.append(f"exhaustive: more than {at} partitions, the rest was left out")
                break
            bound = float(np.sum([furthest[team] for team in teams], axis=0).min())
            hosts = {problem.pools[pool].node.id for team in teams for pool, _ in self.teams[team]}
            nodes.append(_Node(teams, bound, sum(prices[host] for host in hosts)))
        return nodes

    def _look_into(self, node: _Node) -> None:
        """All roles of a partition, the most promising first."""
        every = [
            (self._free_bound(node.teams, roles), roles)
            for roles in _roles(node.teams, [self.choices[team] for team in node.teams])
        ]
        for bound, roles in sorted(every, key=lambda one: -one[0]):
            if bound <= self.rate * _BETTER or self.is_over:
                return
            self.left_of_cell = self.most_of_cell
            grouped = tuple((self.teams[team], role) for team, role in zip(node.teams, roles, strict=True))
            cell = self.cells.of(grouped)
            assert cell is not None
            look_into(cell, self._judge, self._enough)

    def _free_bound(self, teams: Sequence[int], roles: Sequence[Role]) -> float:
        reach = [self.choices[team][role].furthest for team, role in zip(teams, roles, strict=True)]
        return float(np.sum(reach, axis=0).min())

    def _enough(self) -> float:
        """What a draft must promise more than; nothing does when the search, or this part of it, is over."""
        return float("inf") if self.left_of_cell <= 0 or self.is_over else self.rate * _BETTER

    def _judge(self, draft: Draft) -> Judged:
        self.n_judged += 1
        self.left_of_cell -= 1
        judged = self.run.offer(draft, BY)
        self.rate = max(self.rate, judged.flow.requests_per_s)
        return judged


def _roles(teams: Sequence[int], choices: Sequence[dict[Role, Choice]]) -> Iterator[tuple[Role, ...]]:
    """Roles of each team; of like teams, each multiset once. None without prompts or without outputs."""
    own = [
        tuple(
            combinations_with_replacement([role for role in ROLES if role in choices[teams.index(team)]], n)
        )
        for team, n in Counter(teams).items()
    ]
    for split in product(*own):
        roles = tuple(role for part in split for role in part)
        if set(roles) - {"prefill"} and set(roles) - {"decode"}:
            yield roles


def _latency_s(judged: Judged, wanted: float) -> float:
    """Infinite where the rate is not served."""
    return judged.figures.latency_s if judged.figures.requests_per_s >= wanted else float("inf")


def _may_hold(problem: Problem, team: Team) -> bool:
    """Whether the devices have room for the weights at all."""
    room = sum(problem.pools[pool].device.budget_bytes * count for pool, count in team)
    return room > problem.capacities.costs.weight_bytes(0, problem.spec.n_layers)
