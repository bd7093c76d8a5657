"""Exact search for a few devices: every way to form teams, every role, every wanted layout; best first, with bounds.

1. Teams are vectors of counts over the pools; a partition is a multiset of teams, devices left over allowed.
2. Every team gets its wanted layouts in each role (`hexmesh.planner.every_layout`). Layouts that differ in where layers
   lie are kept side by side: fixing each team's layout before flows are known loses up to 26 times on slow links, where
   cuts of prefill and decode replicas must be aligned.
3. Partitions, roles, and then layouts team by team are taken in the order of an upper bound, until the next bound is no
   better than the best plan. Without links, requests are limited by prompts and outputs alike, so for any price w of a
   prompt and 1 - w of an output

       rate <= sum over replicas of the most that w x + (1 - w) y comes to

   and the least over w bounds it; a replica for prompts or outputs alone does no more than can be handed over
   (`hexmesh.planner.handoff_caps`). What is left is judged by the flow program itself.

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
import numpy.typing as npt

from hexmesh.cluster import Role
from hexmesh.planner.align import align
from hexmesh.planner.every_layout import PRICES, Choice, EveryLayout
from hexmesh.planner.handoff_caps import HandoffCaps
from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.partitions import n_teams_within, partitions, teams_within
from hexmesh.planner.pools import ROLES, Team
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.run import Run
from hexmesh.score.plan_score import kv_layer_bytes

Floats = npt.NDArray[np.float64]

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
    layouts: EveryLayout = field(init=False)
    caps: HandoffCaps = field(init=False)
    teams: list[Team] = field(init=False)
    choices: list[dict[Role, Choice]] = field(init=False)

    def __post_init__(self) -> None:
        problem = self.run.problem
        self.layouts = EveryLayout(problem)
        self.caps = HandoffCaps(problem.cluster, kv_layer_bytes(problem.capacities))
        found = [
            (team, choices)
            for team in teams_within(tuple(pool.size for pool in problem.pools))
            if not self.run.is_over and _may_hold(problem, team) and (choices := self.layouts.of(team))
        ]
        self.teams, self.choices = [team for team, _ in found], [choices for _, choices in found]
        self._caps = dict[tuple[int, Role, int, Role], Floats]()
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
            self._descend(_Cell(self, node.teams, roles), {})

    def _free_bound(self, teams: Sequence[int], roles: Sequence[Role]) -> float:
        reach = [self.choices[team][role].furthest for team, role in zip(teams, roles, strict=True)]
        return float(np.sum(reach, axis=0).min())

    def _descend(self, cell: _Cell, chosen: dict[int, int]) -> None:
        """Layouts of one team after the other."""
        if len(chosen) == len(cell.choices):
            self._judge(cell.draft(chosen))
            return
        at = next(at for at in cell.order if at not in chosen)
        bounds = cell.bounds(chosen, at)
        for layout in np.argsort(-bounds, kind="stable"):
            if bounds[layout] <= self.rate * _BETTER or self.left_of_cell <= 0 or self.is_over:
                return
            self._descend(cell, {**chosen, at: int(layout)})

    def _judge(self, draft: Draft | None) -> None:
        if draft is None:
            return
        self.n_judged += 1
        self.left_of_cell -= 1
        judged = self.run.offer(draft, BY)
        self.rate = max(self.rate, judged.flow.requests_per_s)

    def cap(self, source: tuple[int, Role], target: tuple[int, Role]) -> Floats:
        """By placements of both."""
        key = (*source, *target)
        if key not in self._caps:
            a, b = self.choices[source[0]][source[1]], self.choices[target[0]][target[1]]
            self._caps[key] = self.caps.of(a.placements[0], b.placements[0])
        return self._caps[key]


class _Cell:
    """A partition with its roles: layouts are left to choose."""

    def __init__(self, owner: _Search, teams: Sequence[int], roles: Sequence[Role]) -> None:
        self._problem = owner.run.problem
        self._roles = roles
        self.choices = [owner.choices[team][role] for team, role in zip(teams, roles, strict=True)]
        keys = list(zip(teams, roles, strict=True))
        n = len(keys)
        self._caps = {
            (p, d): owner.cap(keys[p], keys[d])
            for p in range(n)
            for d in range(n)
            if p != d and roles[p] != "decode" and roles[d] != "prefill"
        }
        self.order = sorted(range(n), key=lambda at: len(self.choices[at].parts))

    def bounds(self, chosen: dict[int, int], at: int) -> Floats:
        """Of each layout of team `at`, given some of the others'."""
        total: Floats = np.zeros((1, len(PRICES)))
        for team, choice in enumerate(self.choices):
            if self._roles[team] == "mixed":
                total = total + self._reach(chosen, at, team)
                continue
            is_prefill = self._roles[team] == "prefill"
            rate = choice.prefill if is_prefill else choice.decode
            most = rate if team == at else np.array([rate[chosen[team]] if team in chosen else rate.max()])
            handed: Floats | float = 0.0
            for p, d in self._caps:
                if team == (p if is_prefill else d):
                    handed = handed + self._cap(chosen, at, p, d)
            most = np.minimum(most, handed)
            total = total + most[:, None] * (PRICES if is_prefill else 1 - PRICES)
        found: Floats = np.broadcast_to(total.min(axis=1), (len(self.choices[at].parts),))
        return found

    def _reach(self, chosen: dict[int, int], at: int, team: int) -> Floats:
        choice = self.choices[team]
        if team == at:
            return choice.reach
        return (choice.reach[chosen[team]] if team in chosen else choice.furthest)[None, :]

    def _cap(self, chosen: dict[int, int], at: int, p: int, d: int) -> Floats:
        """Of each layout of team `at`, or the one number that holds for all."""
        caps = self._caps[p, d]
        for axis, team in ((0, p), (1, d)):
            placement_of = self.choices[team].placements[1]
            if team == at:
                caps = np.take(caps, placement_of, axis=axis)
            elif team in chosen:
                caps = np.take(caps, [placement_of[chosen[team]]], axis=axis)
            else:
                caps = caps.max(axis=axis, keepdims=True)
        return caps.reshape(-1)

    def draft(self, chosen: dict[int, int]) -> Draft | None:
        """None where the score does not agree that a layout does anything (at the last bit of a limit)."""
        found = [
            self._problem.layouts.rated(self.choices[at].parts[chosen[at]], self._roles[at])
            for at in range(len(self.choices))
        ]
        layouts = tuple(layout for layout in found if layout is not None)
        return layouts if len(layouts) == len(found) else None


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
