"""Replica columns: list the layouts that teams may have, and let an integer program say how often each is used.

A column is a replica in one role; on hosts of which there are many alike, a *host pattern*: all that is on one host, or
on a few that a replica spans. The linear program over the columns prices devices, hosts, prompts and outputs, and teams
over several hosts are laid out only if those prices promise a gain (column generation, after Gilmore and Gomory). The
integer program then takes the columns that lose least, and the roles of what it chose are decided once more.

Three kinds of columns: any devices of one host; any of several hosts, where weights or batches ask for more memory;
*striped* pairs, a prefill and a decode replica side by side over the same hosts with the same cuts, so that handing
over crosses no NIC: what slow NICs ask for.

Within what is listed, and links of pairs apart, the answer is the best but for the program's gap; teams that the
estimate does not favour are not listed. Work is bounded by counts, so that the same problem has the same answer; time
only cuts off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice

from hexmesh.planner.algorithms import greedy
from hexmesh.planner.estimate import Estimates
from hexmesh.planner.host_classes import HostClass
from hexmesh.planner.layouts import Layout
from hexmesh.planner.master import GAP, LIMIT_S, Bundle, Master, Prices
from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.pools import Team, team_of
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.roles import best_roles, layouts_of
from hexmesh.planner.run import Run
from hexmesh.planner.stock import Stock
from hexmesh.planner.striped import striped

MAX_COLUMNS = 400
"""In the integer program."""
FEW_COLUMNS = 60
"""So many may hand over in part on their hosts; more are counted coarsely."""
ROUNDS = 4
TEAMS_A_ROUND = 24
WORK_A_ROUND = 150_000
"""Of layouts, as in `_work`: a few seconds."""
GOOD_ENOUGH = 5e-3
"""The gap to the bound that ends the search."""
PARTS_OF_PATTERNS = 8
"""Kinds of replicas of one host that patterns are made of."""
PATTERNS_A_CLASS = 60
MAX_NODES = 300
COST_GAP = 1e-2
LEAST_PROMISE = 0.8
"""Of what it costs: the estimate may be too low."""
ACROSS_SITES = 0.7
"""What of its promise a team over several sites keeps."""
LEAST_GAIN = 1e-3
"""Of the linear program by a round: what keeps it going."""
PATIENCE = 2
"""Rounds without it."""
MOST_PACKINGS = 2000
STRIPED_WEIGHTS = 12.0
"""Memory of a striped pair, in weights of the model: it holds two copies."""
STRIPED_TEAMS = 24


def search(run: Run) -> None:
    """Offers the integer program's draft, and the same with its roles decided once more."""
    greedy.search(run)
    objective = run.problem.objective
    if isinstance(objective, Latency):
        run.notes.append("columns: looks at rates alone, so the least time of a request is left to others")
        return
    listed = Listed(problem=run.problem)
    target = objective.requests_per_s if isinstance(objective, LeastCost) else None
    bound = run.problem.bound_requests_per_s
    steps = listed.add_inside, listed.add_patterns, listed.add_across, listed.add_striped, listed.add_across
    for grow in steps:
        n_before = len(listed.bundles)
        grow(run)
        served = 0.0 if run.best is None else run.best.flow.requests_per_s
        if run.is_over or (target is None and served >= bound * (1 - GOOD_ENOUGH)):
            break
        if len(listed.bundles) > n_before and listed.promises_more_than(served):
            chosen = listed.draft(None, _left_s(run))
            run.offer(chosen, "columns")
            run.offer(best_roles(run.problem, [team_of(layout.parts) for layout in chosen]), "columns")
    if target is not None:
        run.offer(listed.draft(target, _left_s(run)), "columns")


def _left_s(run: Run) -> float:
    """What an integer program may take."""
    return max(1.0, min(LIMIT_S, run.left_s))


@dataclass(kw_only=True)
class Listed:
    """The columns of one search."""

    problem: Problem
    bundles: list[Bundle] = field(default_factory=list)
    _known: set[Hashable] = field(default_factory=set)

    @cached_property
    def stock(self) -> Stock:
        return Stock(self.problem)

    @cached_property
    def estimates(self) -> Estimates:
        return Estimates(self.problem)

    def add(self, layouts: tuple[Layout, ...]) -> None:
        """One column, unless it is there."""
        key = tuple((layout.role, layout.parts) for layout in layouts)
        if layouts and key not in self._known:
            self._known.add(key)
            self.bundles.append(self.stock.bundle(layouts))

    def add_each(self, team: Team) -> None:
        """A column for each role."""
        for layout in layouts_of(self.problem, team):
            self.add((layout,))

    def add_inside(self, run: Run) -> None:
        """Replicas of one host: each by itself where devices are dealt out, else as often as a host has room."""
        for one in self.stock.classes:
            for team in self.stock.teams_inside(one):
                if run.is_over:
                    return
                if self.stock.is_named(one):
                    for there in self.stock.on_every_host(one, team):
                        self.add_each(there)
                else:
                    for layout in layouts_of(self.problem, team):
                        self.add(tuple(self._filled(one, [layout])))

    def add_patterns(self, run: Run) -> None:
        """Hosts with replicas of several kinds, made of those that the prices favour."""
        prices = self._priced()
        for one in self.stock.classes:
            if not self.stock.is_named(one) and not run.is_over:
                for pattern in self._patterns(one, prices):
                    self.add(pattern)

    def add_across(self, run: Run) -> None:
        """Replicas over several hosts, a few at a time, as long as the linear program gains by them."""
        waiting = self._waiting
        idle, prices = 0, self._priced()
        for _ in range(ROUNDS):
            chosen = self._worth_the_work(self._promising(waiting, prices))
            for team in chosen:
                if run.is_over:
                    return
                del waiting[team]
                self.add_each(team)
            before, prices = prices.worth, self._priced()
            idle = 0 if prices.worth > before * (1 + LEAST_GAIN) else idle + 1
            if idle == PATIENCE or not chosen:
                waiting.clear()
                return

    @cached_property
    def _waiting(self) -> dict[Team, None]:
        """Teams over several hosts that were not laid out yet; none once the linear program stopped gaining."""
        return dict.fromkeys(self.stock.teams_across())

    def _worth_the_work(self, teams: Sequence[Team]) -> Sequence[Team]:
        """The first of them, as many as a round may lay out."""
        n = sum(work <= WORK_A_ROUND for work in accumulate(map(self._work, teams)))
        return teams[: min(max(n, 1), TEAMS_A_ROUND)]

    def _work(self, team: Team) -> int:
        """What laying a team out takes, about."""
        nodes = {self.problem.pools[pool].node.id for pool, _ in team}
        return (len(nodes) * sum(n for _, n in team)) ** 2

    def promises_more_than(self, requests_per_s: float) -> bool:
        """Whether the linear program leaves room for a better choice."""
        return self._priced().worth > requests_per_s * (1 + LEAST_GAIN)

    def add_striped(self, run: Run) -> None:
        """Pairs over the same hosts, where wires decide anything."""
        prices = self._priced()
        if prices.wires <= LEAST_GAIN * prices.worth:
            return
        wholes = [team for team in self.stock.teams_across(STRIPED_WEIGHTS) if self._is_whole(team)]
        for team in self._promising(wholes, prices)[:STRIPED_TEAMS]:
            for pair in striped(self.problem, team):
                if run.is_over:
                    return
                self.add(pair)

    def draft(self, target: float | None, limit_s: float = LIMIT_S) -> Draft:
        """The integer program's, of the columns that lose least; nothing where the target is out of reach."""
        prices = self._master(self.bundles, target).prices()
        if prices is None:
            return ()
        order = sorted(range(len(self.bundles)), key=lambda at: (-prices.counts[at], prices.losses[at], at))
        kept = [self.bundles[at] for at in sorted(order[:MAX_COLUMNS])]
        gap = GAP if target is None else COST_GAP
        counts = self._master(kept, target).chosen(gap=gap, max_nodes=MAX_NODES, limit_s=limit_s)
        return () if counts is None else self.stock.realised(kept, counts)

    def _master(self, bundles: Sequence[Bundle], target: float | None = None) -> Master:
        return Master(
            problem=self.problem,
            bundles=bundles,
            resources=self.stock.resources,
            target=target,
            is_coarse=len(bundles) > FEW_COLUMNS,
            hires=self.stock.hires,
        )

    def _priced(self) -> Prices:
        """As if every request counted; without a target there is always an answer."""
        prices = self._master(self.bundles).prices()
        assert prices is not None
        return prices

    def _filled(self, one: HostClass, layouts: Sequence[Layout]) -> Iterator[Layout]:
        """The first as often as the host has room, then the next."""
        left = Counter({pool: self.problem.pools[pool].size for pool in one.pools})
        for layout in layouts:
            team = team_of(layout.parts)
            while all(left[pool] >= n for pool, n in team):
                left.subtract(dict(team))
                yield layout

    def _patterns(self, one: HostClass, prices: Prices) -> list[tuple[Layout, ...]]:
        """What the host may hold of a few good kinds, the best first."""
        site = self.problem.pools[one.pools[0]].node.site
        prompt, output = prices.prompts[site], prices.outputs[site]
        kinds = [layout for team in self.stock.teams_inside(one) for layout in layouts_of(self.problem, team)]
        values = {
            id(layout): _value(layout, prompt, output) / sum(n for _, n in team_of(layout.parts))
            for layout in kinds
        }
        good = sorted(kinds, key=lambda layout: -values[id(layout)])[:PARTS_OF_PATTERNS]
        room = {pool: self.problem.pools[pool].size for pool in one.pools}
        found = sorted(
            _packings(good, room),
            key=lambda pattern: -sum(_value(layout, prompt, output) for layout in pattern),
        )
        return found[:PATTERNS_A_CLASS]

    def _promising(self, teams: Iterable[Team], prices: Prices) -> list[Team]:
        """Those that may be worth what they cost, the best first; the tightest where nothing has a price."""
        if prices.worth <= 0:
            return sorted(teams, key=self.stock.memory_bytes)
        promises = {team: self._promise(team, prices) for team in teams}
        kept = [team for team, promise in promises.items() if promise > LEAST_PROMISE]
        return sorted(kept, key=lambda team: -promises[team])

    def _promise(self, team: Team, prices: Prices) -> float:
        """What a team may bring, in shares of what it costs."""
        sites = {self.problem.pools[pool].node.site for pool, _ in team}
        prompt = max(prices.prompts[site] for site in sites)
        output = max(prices.outputs[site] for site in sites)
        cost = sum(prices.resources[key] * n for key, n in self.stock.takes(team).items())
        worth = max(self.estimates.worth(team, role, prompt, output) for role in self.problem.roles)
        kept = ACROSS_SITES if len(sites) > 1 else 1.0
        return kept * worth / max(cost, 1e-9 * prices.worth)

    def _is_whole(self, team: Team) -> bool:
        return all(n == self.problem.pools[pool].size for pool, n in team)


def _value(layout: Layout, prompt: float, output: float) -> float:
    """About what a replica brings at such prices: the best of its corners."""
    both = layout.requests_per_s * (prompt + output) if layout.role == "mixed" else 0.0
    return max(layout.prefill * prompt, layout.decode * output, both)


def _packings(layouts: Sequence[Layout], room: Mapping[int, int]) -> Iterator[tuple[Layout, ...]]:
    """All ways to put so many of each into a host until none of the kinds fits any more."""
    teams = [team_of(layout.parts) for layout in layouts]

    def place(at: int, left: Mapping[int, int], taken: tuple[Layout, ...]) -> Iterator[tuple[Layout, ...]]:
        if at == len(layouts):
            if not any(all(left[pool] >= n for pool, n in team) for team in teams):
                yield taken
            return
        most = min(left[pool] // n for pool, n in teams[at])
        for count in range(most, -1, -1):
            after = {**left, **{pool: left[pool] - count * n for pool, n in teams[at]}}
            yield from place(at + 1, after, taken + (layouts[at],) * count)

    yield from islice(place(0, room, ()), MOST_PACKINGS)
