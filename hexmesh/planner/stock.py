"""What the integer program deals out: devices of hosts that have names, or whole hosts of a class.

A class of few hosts is dealt out device by device, each host by its name. One of many is dealt out host by host: one
bundle decides what is on a host, and bundles are counted (host patterns). So whatever is chosen can be packed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product

from hexmesh.planner.host_classes import HostClass, host_classes
from hexmesh.planner.layouts import Layout
from hexmesh.planner.master import Bundle, Hire
from hexmesh.planner.pools import Team, team_of
from hexmesh.planner.problem import Draft, Problem

FEW_HOSTS = 3
MANY_TEAMS = 128
"""Teams inside one host, above which only halves are looked at."""
MOST_WEIGHTS = 6.0
"""Memory of a team over several hosts, in weights of the model: more hardly ever pays."""
FEW_DEVICES = 8
MOST_SETS = 3000
"""Sets of hosts that are looked at."""


@dataclass(frozen=True)
class Stock:
    """All hosts of a problem."""

    problem: Problem

    @cached_property
    def classes(self) -> tuple[HostClass, ...]:
        return host_classes(self.problem)

    @cached_property
    def _class_of(self) -> dict[str, int]:
        return {node: at for at, one in enumerate(self.classes) for node in one.nodes}

    def is_named(self, one: HostClass) -> bool:
        """Whether its hosts are dealt out device by device."""
        return len(one.hosts) <= FEW_HOSTS

    @cached_property
    def resources(self) -> Mapping[Hashable, int]:
        """How much there is of each."""
        found = dict[Hashable, int]()
        for at, one in enumerate(self.classes):
            if self.is_named(one):
                found |= {
                    ("pool", pool): self.problem.pools[pool].size for host in one.hosts for pool in host
                }
            else:
                found["class", at] = len(one.hosts)
        return found

    @cached_property
    def hires(self) -> Mapping[Hashable, Hire]:
        """Hosts behind pools."""
        return {
            ("pool", pool): Hire(node=node, price_per_h=one.price_per_h)
            for one in self.classes
            if self.is_named(one)
            for node, host in zip(one.nodes, one.hosts, strict=True)
            for pool in host
        }

    def bundle(self, layouts: tuple[Layout, ...]) -> Bundle:
        """Layouts with what they take, those of classes on the hosts that stand for them."""
        taken, hosts = self._taken(team_of(layout.parts) for layout in layouts)
        return Bundle(
            layouts=layouts,
            takes=tuple(taken.items()),
            own_nodes=frozenset(hosts),
            price_per_h=sum(self.classes[at].price_per_h for at in hosts.values()),
        )

    def takes(self, team: Team) -> Counter[Hashable]:
        """What a team takes."""
        return self._taken([team])[0]

    def _taken(self, teams: Iterable[Team]) -> tuple[Counter[Hashable], dict[str, int]]:
        """What teams take together, and the hosts that stand for a class, with it."""
        taken, hosts = Counter[Hashable](), dict[str, int]()
        for team in teams:
            for pool, n in team:
                node = self.problem.pools[pool].node.id
                at = self._class_of[node]
                if self.is_named(self.classes[at]):
                    taken["pool", pool] += n
                else:
                    hosts[node] = at
        taken.update(("class", at) for at in hosts.values())
        return taken, hosts

    def realised(self, bundles: Sequence[Bundle], counts: Sequence[int]) -> Draft:
        """The bundles on hosts of their own."""
        free = [list(range(len(one.hosts))) for one in self.classes]
        draft = list[Layout]()
        for bundle, count in zip(bundles, counts, strict=True):
            for _ in range(count):
                pools = self._moved(bundle.own_nodes, free)
                draft += (
                    moved for layout in bundle.layouts if (moved := self._on(layout, pools)) is not None
                )
        return tuple(draft)

    def _moved(self, nodes: Iterable[str], free: list[list[int]]) -> dict[int, int]:
        """Where the pools of hosts that stand for others come to be."""
        pools = dict[int, int]()
        for node in sorted(nodes):
            one = self.classes[self._class_of[node]]
            host = one.hosts[free[self._class_of[node]].pop(0)]
            pools |= zip(one.hosts[one.nodes.index(node)], host, strict=True)
        return pools

    def _on(self, layout: Layout, pools: Mapping[int, int]) -> Layout | None:
        parts = tuple(replace(part, pool=pools.get(part.pool, part.pool)) for part in layout.parts)
        return layout if parts == layout.parts else self.problem.layouts.rated(parts, layout.role)

    def teams_inside(self, one: HostClass) -> list[Team]:
        """Teams of the devices of the host that stands for a class, the smallest first."""
        sizes = [self.problem.pools[pool].size for pool in one.pools]
        is_many = math.prod(size + 1 for size in sizes) > MANY_TEAMS
        found = product(*(_halves(size) if is_many else range(size + 1) for size in sizes))
        teams = [tuple(zip(one.pools, counts, strict=True)) for counts in found]
        kept = [tuple((pool, n) for pool, n in team if n) for team in teams]
        return sorted(
            (team for team in kept if self.may_hold(team)), key=lambda team: sum(n for _, n in team)
        )

    def on_every_host(self, one: HostClass, team: Team) -> Iterator[Team]:
        """The same on each host of a class that has names."""
        for host in one.hosts:
            to = dict(zip(one.pools, host, strict=True))
            yield tuple((to[pool], n) for pool, n in team)

    def may_hold(self, team: Team, weights: float = 1.0) -> bool:
        """Whether its memory is at least so many times the model's weights."""
        costs = self.problem.capacities.costs
        return self.memory_bytes(team) >= weights * costs.weight_bytes(0, costs.spec.n_layers)

    def memory_bytes(self, team: Team) -> float:
        return sum(n * self.problem.pools[pool].device.budget_bytes for pool, n in team)

    def teams_across(self, most_weights: float = MOST_WEIGHTS) -> Iterator[Team]:
        """Teams over several hosts: whole ones, and parts of those that have names."""
        for n_sets, chosen in enumerate(self._host_sets(most_weights)):
            if n_sets >= MOST_SETS:
                return
            for counts in product(*(self._shares(pool) for pool in chosen)):
                team = tuple(sorted((pool, n) for pool, n in zip(chosen, counts, strict=True) if n))
                if team and self.may_hold(team):
                    yield team

    def _host_sets(self, most_weights: float) -> Iterator[tuple[int, ...]]:
        """Pools of two hosts or more whose memory is enough and not far too much, few hosts first."""
        n_hosts = sum(len(one.hosts) for one in self.classes)
        for size in range(2, n_hosts + 1):
            is_any = False
            for numbers in _shares_of(size, [len(one.hosts) for one in self.classes]):
                if not self._is_worth_it(numbers, most_weights):
                    continue
                is_any = True
                yield from self._instances(numbers)
            if not is_any and size > 2 and self._is_too_much(size, most_weights):
                return

    def _is_worth_it(self, numbers: Sequence[int], most_weights: float) -> bool:
        team = tuple(
            (pool, n * self.problem.pools[pool].size)
            for one, n in zip(self.classes, numbers, strict=True)
            if n
            for pool in one.pools
        )
        return self.may_hold(team) and not self.may_hold(team, most_weights)

    def _is_too_much(self, size: int, most_weights: float) -> bool:
        """Whether any so many hosts have too much memory."""
        least = sorted(
            self.memory_bytes(tuple((pool, self.problem.pools[pool].size) for pool in one.pools))
            for one in self.classes
            for _ in one.hosts
        )[:size]
        costs = self.problem.capacities.costs
        return sum(least) >= most_weights * costs.weight_bytes(0, costs.spec.n_layers)

    def _instances(self, numbers: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Those hosts that stand for their class, and every choice of those that have names."""
        choices = [
            combinations(one.hosts, n) if self.is_named(one) else (one.hosts[:n],)
            for one, n in zip(self.classes, numbers, strict=True)
        ]
        for chosen in product(*(list(choice) for choice in choices)):
            yield tuple(pool for hosts in chosen for host in hosts for pool in host)

    def _shares(self, pool: int) -> Sequence[int]:
        """How many devices of a pool a team over several hosts may have."""
        found = self.problem.pools[pool]
        if not self.is_named(self.classes[self._class_of[found.node.id]]):
            return (found.size,)
        if sum(one.size for one in self.problem.pools) <= FEW_DEVICES:
            return range(found.size + 1)
        return _halves(found.size)[1:]


def _halves(size: int) -> Sequence[int]:
    """0, the size, and what halving it gives: 0, 1, 2, 4, 8."""
    found = {0, size}
    while size > 1:
        size //= 2
        found.add(size)
    return sorted(found)


def _shares_of(total: int, most: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All ways to take so many from boxes that hold so much."""
    if not most:
        if total == 0:
            yield ()
        return
    for n in range(min(total, most[0]), -1, -1):
        if total - n <= sum(most[1:]):
            for rest in _shares_of(total - n, most[1:]):
                yield (n, *rest)
