"""Teams in their roles as local searches keep them: the best layout, its corners, and where its layers lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hexmesh.cluster import Role
from hexmesh.planner.balance import Balanced, Corner, Share, borders_of, corners_of, sites_of
from hexmesh.planner.layouts import Layout
from hexmesh.planner.moves import room_bytes
from hexmesh.planner.objective import Latency
from hexmesh.planner.pools import Team, team_of
from hexmesh.planner.problem import Draft, Problem
from hexmesh.score.bound import Density, density_of
from hexmesh.score.pipeline import launch_s
from hexmesh.score.plan_score import kv_layer_bytes

LARGEST_TEAM = 6
"""In multiples of the weights. Larger ones hardly ever win, and their layouts take longest."""
ALWAYS_LAID_OUT = 8
"""Devices that a team may have whatever it could hold."""
MOST_KINDS = 4
"""Of pools in a team: those of a site with as many of the same device are one. More kinds take long and do not win."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """A team in its role."""

    team: Team
    role: Role
    layout: Layout
    corners: tuple[Corner, ...]
    shares: tuple[Share, ...]
    hosts: frozenset[int]
    """That its devices are on, by number in the cluster."""


class Members:
    """Members by team and role, each laid out once."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._host_of = {node.id: at for at, node in enumerate(problem.cluster.nodes)}
        sites = {site: at for at, site in enumerate(sites_of(problem.cluster), len(self._host_of))}
        self._site_of = [sites[node.site] for node in problem.cluster.nodes]
        self._prices = [node.price_per_h or 0.0 for node in problem.cluster.nodes]
        self._weight_bytes = problem.capacities.costs.weight_bytes(0, problem.spec.n_layers)
        kv_bytes = kv_layer_bytes(problem.capacities) * problem.spec.n_layers
        self.borders = borders_of(problem.cluster, kv_bytes)
        looks = [(pool.device, pool.node.site) for pool in problem.pools]
        self._kinds = [looks.index(look) for look in looks]
        self._host_of_pool = [self._host_of[pool.node.id] for pool in problem.pools]
        self._densities = _densities(problem)
        self._known = dict[tuple[Team, Role], Member | None]()

    def earns_at_most(self, team: Team, role: Role, balanced: Balanced) -> float:
        """What the team would earn at those prices if it had no bubbles, no hops and layers as small as it likes.

        Known at once, so that most teams need no layout: each device's share of the work is bounded by its density.
        """
        if (team, role) in self._known:
            member = self._known[team, role]
            return 0.0 if member is None else balanced.earns(member.corners, member.shares)
        earned = 0.0
        for pool, n in team:
            host, density = self._host_of_pool[pool], self._densities[pool]
            price = balanced.price_at(host, self._site_of[host])
            prompt = 0.0 if role == "decode" else 1 - price
            earned += n * density.worth(prompt, 0.0 if role == "prefill" else price)
        return earned

    def of(self, team: Team, role: Role) -> Member | None:
        """None: the team cannot serve in that role, or is too large to be worth a thought."""
        key = team, role
        if key not in self._known:
            self._known[key] = self._made(team, role)
        return self._known[key]

    def of_draft(self, draft: Draft) -> list[Member]:
        """Its replicas as they are, even large ones."""
        return [self._member(layout) for layout in draft]

    def price_per_h(self, members: Iterable[Member]) -> float:
        """Of all their hosts."""
        used = frozenset[int]().union(*(member.hosts for member in members))
        return sum(self._prices[host] for host in used)

    def _made(self, team: Team, role: Role) -> Member | None:
        room = room_bytes(team, self._problem.pools)
        if room <= self._weight_bytes:
            return None
        if room > LARGEST_TEAM * self._weight_bytes and sum(n for _, n in team) > ALWAYS_LAID_OUT:
            return None
        if len(team) > MOST_KINDS and len({(self._kinds[pool], n) for pool, n in team}) > MOST_KINDS:
            return None
        if not self._problem.may_be(team, role):
            return None
        layouts = self._problem.layouts
        asked = layouts.quickest if isinstance(self._problem.objective, Latency) else layouts.best
        layout = asked(team, role)
        return None if layout is None else self._member(layout, team)

    def _member(self, layout: Layout, team: Team | None = None) -> Member:
        pools = self._problem.pools
        n_layers, shares = self._problem.spec.n_layers, defaultdict[int, float](float)
        for part in layout.parts:
            host = self._host_of[pools[part.pool].node.id]
            shares[host] += part.n_layers / n_layers
            shares[self._site_of[host]] += part.n_layers / n_layers
        return Member(
            team=team_of(layout.parts) if team is None else team,
            role=layout.role,
            layout=layout,
            corners=corners_of(layout),
            shares=tuple(shares.items()),
            hosts=frozenset(at for at in shares if at < len(self._host_of)),
        )


def _densities(problem: Problem) -> list[Density]:
    """Of each pool."""
    known = dict[object, Density]()
    found = []
    for pool in problem.pools:
        key = pool.device, pool.degrees, pool.roles, pool.node.fabric, launch_s(pool.node)
        if key not in known:
            known[key] = density_of(pool.node, pool.device, pool.degrees, pool.roles, problem.capacities)
        found.append(known[key])
    return found


def draft_of(members: Sequence[Member]) -> Draft:
    """Their layouts."""
    return tuple(member.layout for member in members)
