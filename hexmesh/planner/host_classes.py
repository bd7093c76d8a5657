"""Hosts that cannot be told apart: what fits one of a class fits them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from hexmesh.planner.pools import Pool
from hexmesh.planner.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class HostClass:
    """Like hosts of one site."""

    hosts: tuple[tuple[int, ...], ...]
    """The pools of each, like ones at the same place."""
    nodes: tuple[str, ...]
    price_per_h: float
    """Of one host; 0 where it is not known."""

    @property
    def pools(self) -> tuple[int, ...]:
        """Of the host that stands for all."""
        return self.hosts[0]


def host_classes(problem: Problem) -> tuple[HostClass, ...]:
    """In the order of the nodes. A host whose links to others are its own is alone in its class."""
    by_node, alike = defaultdict[str, list[int]](list), defaultdict[Hashable, list[str]](list)
    for at, pool in enumerate(problem.pools):
        by_node[pool.node.id].append(at)
    for node, members in by_node.items():
        looks = tuple(_look(problem.pools[at]) for at in members)
        alone = None if node in problem.network.hub else node
        alike[problem.pools[members[0]].node.site, looks, alone].append(node)
    return tuple(
        HostClass(
            hosts=tuple(tuple(by_node[node]) for node in nodes),
            nodes=tuple(nodes),
            price_per_h=problem.pools[by_node[nodes[0]][0]].node.price_per_h or 0.0,
        )
        for nodes in alike.values()
    )


def _look(pool: Pool) -> Hashable:
    node = pool.node
    figures = node.nic, node.fabric, node.launch_s, node.step_s, node.price_per_h
    return pool.device, pool.size, pool.degrees, pool.roles, figures
