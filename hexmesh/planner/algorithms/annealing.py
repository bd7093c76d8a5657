"""Simulated annealing over teams with their roles, warm-started: the polish after coarser searches.

State: teams, each with its role, and the devices that none has. Moves: 1, 2, 4 or all devices of a pool from team to
team, swaps of such handfuls, merge, split, scatter over the neighbours, another role, drop and take up idle devices.
Partners are drawn near by: from the same host, else the site, else anywhere.

After ThunderServe's flips of roles (tabu search over groups and phases) and HexGen's moves; differs: roles are part of
the state, because a score that relaxes them promises plans that do not exist (45.0 promised, 38.5 real on slow NICs).

A state is worth what `balance` says of its teams' best layouts. Its prices tell what a changed team can add at most, so
most moves are refused without solving anything. The best states are judged exactly in the end. Iterations follow the
fleet's size and nothing else, so the same seed gives the same plan unless time cuts it off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexmesh.planner.algorithms import greedy
from hexmesh.planner.balance import Balanced, balance
from hexmesh.planner.changes import Change, Changes, Nearby
from hexmesh.planner.layouts import Layout
from hexmesh.planner.members import Member, Members, draft_of
from hexmesh.planner.moves import idle
from hexmesh.planner.objective import WORTHLESS, Latency, LeastCost, Worth
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.run import Run

NAME = "annealing"
N_STARTS = 3
N_FINALISTS, N_ALIKE = 20, 2
"""Values whose states are judged exactly, and states of each."""
STEPS, STEPS_PER_DEVICE, MOST_STEPS = 500, 50, 5000
"""Of the first chains. In large fleets each step costs more, and there are other searches that gain more."""
STEPS_PER_JUDGEMENT = 8
"""Latencies are judged exactly in every step, which takes so much longer."""
LEAST_GAIN = 1e-3
"""Of a chain that is followed by a longer one."""
HOTTEST, COLDEST = 0.06, 0.002
"""Temperatures, as parts of what a team is worth on average at the start."""
SHORTFALL, SPENT = 5.0, 0.25
"""What serving nothing of a wanted rate costs, and what the price of all hosts does, or the latency at the start."""
GAIN = 0.002
"""In value, for a state to be judged on the way."""
TIE = 1e-4
"""Weight of what only decides between equals."""
_STEPS_BETWEEN_LOOKS = 64
"""At the clock."""


def search(run: Run) -> None:
    """Improves on the best drafts of other searches, and on what serves now.

    A short chain from each of the best; then from the best of all, each chain as long as all before it together, until
    one brings nothing.
    """
    starts = _starts(run)
    members = Members(run.problem)
    values = _Values(run.problem, members, run.best)
    n_devices = sum(pool.size for pool in run.problem.pools)
    n_steps = min(STEPS + STEPS_PER_DEVICE * n_devices, MOST_STEPS)
    if isinstance(run.problem.objective, Latency):
        n_steps //= STEPS_PER_JUDGEMENT
    for start in starts:
        _Chain(run, members, values, start).anneal(n_steps)
    n_steps, before = n_steps * len(starts), WORTHLESS
    while run.best is not None and not run.is_over and _gained(before, run.best.worth):
        before = run.best.worth
        _Chain(run, members, values, run.best.draft).anneal(n_steps)
        n_steps *= 2
    if run.is_over:
        run.notes.append("annealing was cut off by time")


def _gained(before: Worth, after: Worth) -> bool:
    """Whether any part of the worth is better by a thousandth."""
    return any(b > a + LEAST_GAIN * abs(a) for a, b in zip(before, after, strict=True))


def _starts(run: Run) -> list[Draft]:
    """Different ones, the best first; greedy's where nobody has one, and nothing at all where that has none."""
    if run.current is not None:
        run.offer(run.current, "current")
    if run.best is None:
        greedy.search(run)
    best = sorted(run.best_by.values(), key=lambda judged: judged.worth, reverse=True)
    return list(dict.fromkeys(judged.draft for judged in best))[:N_STARTS] or [()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    members: tuple[Member, ...]
    balanced: Balanced
    earnings: tuple[float, ...]
    """Of each member at the state's prices."""
    value: float


class _Chain:
    """One walk from a start, getting colder."""

    def __init__(self, run: Run, members: Members, values: _Values, start: Draft) -> None:
        self._run, self._members, self._values = run, members, values
        self._nearby, self._finalists = Nearby(run.problem.pools), _Finalists()
        own = members.of_draft(start)
        if isinstance(run.problem.objective, Latency):
            own = [members.of(member.team, member.role) or member for member in own]
        self._move_to(self._solved(tuple(own)))
        self._offered = self._state.value

    def anneal(self, n_steps: int) -> None:
        """Metropolis steps; the temperature falls geometrically. The best states are judged in the end."""
        coldest, hottest = (part / max(1, len(self._state.members)) for part in (COLDEST, HOTTEST))
        for step in range(n_steps):
            if step % _STEPS_BETWEEN_LOOKS == 0:
                self._offer_gains()
                if self._run.is_over:
                    return
            temperature = hottest * (coldest / hottest) ** (step / n_steps)
            change = self._changes.draw(self._nearby, self._run.rng)
            least = self._state.value + temperature * math.log(1 - self._run.rng.random())
            if change is not None:
                self._try(change, least)
        self._run.offer_all(self._finalists.drafts(), NAME)

    def _offer_gains(self) -> None:
        """What leads clearly is judged at once, so that the search may be stopped at any time."""
        leader = self._finalists.leader
        if leader is not None and leader[0] > self._offered + GAIN:
            self._offered = leader[0]
            self._run.offer(leader[1], NAME)

    def _try(self, change: Change, least: float) -> None:
        """Go there if it is worth `least`."""
        state, come = self._state, list[Member]()
        kept = [member for at, member in enumerate(state.members) if at not in change.gone]
        earned = state.balanced.borders_earn
        earned += sum(earning for at, earning in enumerate(state.earnings) if at not in change.gone)
        most = [self._members.earns_at_most(team, role, state.balanced) for team, role in change.come]
        for at, (team, role) in enumerate(change.come):
            if self._values.at_most((*kept, *come), earned + sum(most)) < least:
                return
            member = self._members.of(team, role)
            if member is None:
                return
            come.append(member)
            most[at] = state.balanced.earns(member.corners, member.shares)
        there = (*kept, *come)
        if self._values.at_most(there, earned + sum(most)) < least:
            return
        solved = self._solved(there, state.balanced.extra)
        if solved.value >= least:
            self._move_to(solved)

    def _solved(self, members: tuple[Member, ...], likely: Iterable[int] = ()) -> _State:
        balanced = balance(
            [member.corners for member in members],
            [member.shares for member in members],
            self._members.borders,
            likely,
        )
        return _State(
            members=members,
            balanced=balanced,
            earnings=tuple(balanced.earns(member.corners, member.shares) for member in members),
            value=self._values.of(members, balanced.requests_per_s),
        )

    def _move_to(self, state: _State) -> None:
        problem = self._run.problem
        teams = [(member.team, member.role) for member in state.members]
        spare = idle(problem.whole, (team for team, _ in teams))
        self._state, self._changes = state, Changes(problem.pools, problem.roles, teams, spare)
        if state.balanced.requests_per_s > 0:
            self._finalists.add(state.value, draft_of(state.members))


class _Values:
    """One number for a state, whatever the objective: 1 is about what the best draft at the start is worth."""

    def __init__(self, problem: Problem, members: Members, best: Judged | None) -> None:
        self._problem, self._members = problem, members
        bound = problem.bound_requests_per_s
        self._rate = best.flow.requests_per_s if best is not None else bound or 1.0
        self._latency_s = best.figures.latency_s if best is not None else 1.0
        self._whole_price = sum(node.price_per_h or 0.0 for node in problem.cluster.nodes) or 1.0

    def at_most(self, members: Sequence[Member], requests_per_s: float) -> float:
        """If no more than that is served."""
        match self._problem.objective:
            case LeastCost(wanted):
                price = self._members.price_per_h(members) / self._whole_price
                return SHORTFALL * min(1.0, requests_per_s / wanted) - SPENT * price
            case Latency(wanted):
                return SHORTFALL * min(1.0, requests_per_s / wanted)
            case _:
                return requests_per_s / self._rate

    def of(self, members: Sequence[Member], requests_per_s: float) -> float:
        """If that is served."""
        match self._problem.objective:
            case LeastCost(wanted):
                return self.at_most(members, requests_per_s) + TIE * requests_per_s / wanted
            case Latency():
                if requests_per_s <= 0:
                    return -SHORTFALL
                judged = self._problem.judge(draft_of(members))
                late = SPENT * judged.figures.latency_s / self._latency_s
                return self.at_most(members, judged.flow.requests_per_s) - min(late, SHORTFALL)
            case _:
                price = self._members.price_per_h(members) / self._whole_price
                return self.at_most(members, requests_per_s) - TIE * price


class _Finalists:
    """The best states of a chain, few that are worth the same: those are mostly one plan on like hosts."""

    def __init__(self) -> None:
        self._drafts = dict[float, dict[frozenset[tuple[Layout, int]], Draft]]()

    def add(self, value: float, draft: Draft) -> None:
        """Keep it if it is among the best so far."""
        value = round(value, 9)
        if value not in self._drafts and len(self._drafts) == N_FINALISTS:
            least = min(self._drafts)
            if value < least:
                return
            del self._drafts[least]
        alike = self._drafts.setdefault(value, {})
        if len(alike) < N_ALIKE:
            alike.setdefault(frozenset(Counter(draft).items()), draft)

    @property
    def leader(self) -> tuple[float, Draft] | None:
        """Value and draft of the best so far."""
        if not self._drafts:
            return None
        value = max(self._drafts)
        return value, next(iter(self._drafts[value].values()))

    def drafts(self) -> list[Draft]:
        """The best first."""
        return [
            draft for value in sorted(self._drafts, reverse=True) for draft in self._drafts[value].values()
        ]
