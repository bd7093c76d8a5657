"""A rate that no plan over a cluster can beat: stages of replicas spread over devices like a fluid.

A replica that decodes has a shape, m micro-batches of b sequences (`shapes`). Each of its stages has room for m b
sequences, so it has at most so many layers l of all L, and is busy for shares p with prompts and d with outputs,
p + d <= 1. The round trip says that its stages together are busy at most m times over. With the seconds of a stage,

    prompts   x = sum of x l / L <= sum of p l / (L prompt_s)         outputs   y <= sum of d b l / (L o step_s)
    layers    sum of l / L >= 1, so that                              sum of (p + d) <= m <= sum of m l / L

all of which stay true with the most layers instead of l, as more layers a stage only make its step and its turn worth
more. The rows are sums over stages, so replicas of one shape may be added up: what is left of them is how many devices
of each kind are in stages of that shape, busy with either phase or idle. A replica that only prefills has no shape. A
group of devices that differ is no better than a share of a stage of each of them. What a host prefills beyond what it
decodes must leave through its NIC, and likewise for sites and their lines. Hosts that are alike may be taken together,
as the mean of all ways to exchange them is a solution, too.

A linear program over hosts and shapes maximises the rate. Shapes are brought in by its prices (column generation), and
what the others might add at most at those prices is added to its value, so that the bound holds whenever it stops.

A shape that all devices together cannot hold once is left out, but else any part of a replica counts as such. That is
what the bound is mostly off by on few devices; then come stages of a replica that do not go at one pace, hops, the
head, and limits of time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from hexmesh.cluster import Cluster, Node, Role
from hexmesh.roofline import Group
from hexmesh.score.bound import LEAST_BYTES_PER_S, ROLES, degrees_of, devices_alike, lines_of
from hexmesh.score.capacity import Capacities
from hexmesh.score.pipeline import group_like, launch_s
from hexmesh.score.program import Program, Solution
from hexmesh.score.shapes import Floats, Shapes, Stages

ROUNDING = 1e-6
"""What is added for the solver's own tolerance, as a share."""
_DONE = 1e-7
_MOST_ROUNDS = 40
_SHAPES_A_ROUND = 4
_TINY = 1e-12


def fluid_bound(cluster: Cluster, capacities: Capacities, roles: Set[Role] = frozenset(ROLES)) -> float:
    """Requests per second that no plan over the cluster exceeds, by this score, with replicas of those roles."""
    pools = _pools(cluster, capacities, roles)
    if not pools:
        return 0.0
    groups = list(dict.fromkeys(group for pool in pools for group in pool.groups))
    shapes = Shapes(capacities, groups, sum(pool.n_devices for pool in pools))
    stages = dict(zip(groups, shapes.stages, strict=True))
    fluid = _Fluid(
        cluster, capacities, pools, shapes, [[stages[one] for one in pool.groups] for pool in pools]
    )
    return fluid.most() * (1 + ROUNDING)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """Like devices of hosts that are alike."""

    nodes: tuple[Node, ...]
    n_devices: int
    """Of all of them."""
    groups: tuple[Group, ...]
    """That a stage may be on."""
    roles: frozenset[Role]


def _pools(cluster: Cluster, capacities: Capacities, asked: Set[Role]) -> list[_Pool]:
    alike = defaultdict[object, list[Node]](list)
    for node in cluster.nodes:
        look = replace(node, id="", name="", price_per_h=None, launch_s=launch_s(node), devices=())
        alike[look, frozenset(devices_alike(node).items())].append(node)
    found = []
    for nodes in alike.values():
        found += [
            _Pool(
                nodes=tuple(nodes),
                n_devices=n_devices * len(nodes),
                groups=tuple(group_like(nodes[0], device, tp) for tp in degrees_of(nodes[0], capacities)),
                roles=frozenset(nodes[0].roles or ROLES) & asked,
            )
            for device, n_devices in devices_alike(nodes[0]).items()
            if device.flops_per_s > 0 and device.bytes_per_s > 0
        ]
    return found


_Use = tuple[float, float, float]
"""What a device does: prompts and outputs per second, and turns of the shape that it takes beyond those it lends."""


@dataclass(frozen=True, slots=True)
class _Prices:
    """What pools' prompts, outputs and devices are worth, and what the program has come to."""

    worth: float
    prompts: Floats
    outputs: Floats
    devices: Floats


@dataclass
class _Fluid:
    """The program, with some of the shapes."""

    cluster: Cluster
    capacities: Capacities
    pools: Sequence[_Pool]
    shapes: Shapes
    stages: Sequence[Sequence[Stages]]
    """By pool."""
    program: Program = field(default_factory=Program)
    known: set[int] = field(default_factory=set)

    def most(self) -> float:
        """The program's value with all shapes, or a little more."""
        for at, pool in enumerate(self.pools):
            if "prefill" in pool.roles:
                alone = max((stage.alone / stage.tp for stage in self.stages[at]), default=0.0)
                self._variable(at, (alone, 0.0, 0.0))
        self._bring_in(self._first_shapes())
        most = math.inf
        for _ in range(_MOST_ROUNDS):
            prices = self._prices()
            gains = self._gains(prices) * self._n_devices[:, None]
            excess = float(gains.max(axis=1, initial=0.0).sum())
            most = min(most, prices.worth + excess)
            new = self._best_shapes(gains.sum(axis=0))
            if excess <= _DONE * prices.worth or not new:
                break
            self._bring_in(new)
        return most

    @cached_property
    def _n_devices(self) -> Floats:
        return np.array([float(pool.n_devices) for pool in self.pools])

    @cached_property
    def _may_decode(self) -> list[bool]:
        return [not pool.roles <= {"prefill"} for pool in self.pools]

    @cached_property
    def _is_open(self) -> npt.NDArray[np.bool_]:
        """By shape, whether all devices together hold the model once."""
        room = np.zeros(len(self.shapes))
        for n_devices, may, stages in zip(self._n_devices, self._may_decode, self.stages, strict=True):
            if may and stages:
                room += n_devices * np.max([stage.layers / stage.tp for stage in stages], axis=0)
        return room >= self.shapes.n_layers * (1 - _TINY)

    def _first_shapes(self) -> list[int]:
        """Of each number of micro-batches the largest."""
        found = dict[float, int]()
        for at in np.flatnonzero(self._is_open):
            found[self.shapes.n[at]] = int(at)
        return list(found.values())

    def _best_shapes(self, gains: Floats) -> list[int]:
        """Those that gain most, each with another number of micro-batches."""
        found = dict[float, int]()
        for at in np.argsort(-gains, kind="stable"):
            if gains[at] <= 0 or len(found) == _SHAPES_A_ROUND:
                break
            if int(at) not in self.known:
                found.setdefault(self.shapes.n[at], int(at))
        return list(found.values())

    def _bring_in(self, shapes: Sequence[int]) -> None:
        for shape in shapes:
            self.known.add(shape)
            self.program.balance(("turns", shape), self.program.variable(), 1.0)
            for at in range(len(self.pools)):
                for use in _undominated(self._uses(at, shape)):
                    self._variable(at, use, shape)

    def _uses(self, at: int, shape: int) -> list[_Use]:
        """Of a device of the pool in stages of that shape: busy with prompts, with outputs, or idle."""
        found = list[_Use]()
        for stage in self.stages[at] if self._may_decode[at] else ():
            if stage.layers[shape] > 0:
                lent = self.shapes.n[shape] * stage.layers[shape] / self.shapes.n_layers
                if "mixed" in self.pools[at].roles:
                    found.append((stage.prompts[shape] / stage.tp, 0.0, (1 - lent) / stage.tp))
                found.append((0.0, stage.outputs[shape] / stage.tp, (1 - lent) / stage.tp))
                found.append((0.0, 0.0, -lent / stage.tp))
        return found

    def _variable(self, pool: int, use: _Use, shape: int | None = None) -> None:
        """Devices of the pool that do that."""
        program, (prompts, outputs, turns) = self.program, use
        at = program.variable(prompts)
        program.use(("busy", pool), at, 1.0, float(self.pools[pool].n_devices))
        program.balance("served", at, prompts - outputs)
        if shape is not None:
            program.balance(("turns", shape), at, turns)
        for number, (members, limit) in enumerate(self._borders):
            if pool in members and prompts != outputs:
                program.use(("border", number), at, members[pool] * (prompts - outputs), limit)

    @cached_property
    def _borders(self) -> list[tuple[dict[int, float], float]]:
        """KV bytes of a prompt over each host's and each site's border by pool, one way, and bytes/s there at most."""
        kv_bytes = self.capacities.model.kv_bytes(self.capacities.workload.prompt_tokens)
        by_host, by_site = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
        for at, pool in enumerate(self.pools):
            by_host[pool.nodes[0].id].append(at)
            by_site[pool.nodes[0].site].append(at)
        found = []
        for members in by_host.values():
            nodes = self.pools[members[0]].nodes
            if nodes[0].nic is not None:
                nic = nodes[0].nic
                found += [
                    (members, 1.0, len(nodes) * nic.out_bytes_per_s),
                    (members, -1.0, len(nodes) * nic.in_bytes_per_s),
                ]
        for site, members in by_site.items() if self.cluster.site_links else ():
            out, into = lines_of(self.cluster, site)
            found += [(members, 1.0, out), (members, -1.0, into)]
        return [
            (dict.fromkeys(members, sign * kv_bytes), max(limit, LEAST_BYTES_PER_S))
            for members, sign, limit in found
        ]

    def _prices(self) -> _Prices:
        solution = self.program.solve()
        assert solution is not None
        return self._prices_of(solution)

    def _prices_of(self, solution: Solution) -> _Prices:
        moved = np.full(len(self.pools), solution.balances.get("served", 0.0))
        for number, (members, limit) in enumerate(self._borders):
            for pool, kv_bytes in members.items():
                moved[pool] -= kv_bytes / limit * solution.limits.get(("border", number), 0.0)
        devices = np.array([solution.limits.get(("busy", at), 0.0) for at in range(len(self.pools))])
        return _Prices(solution.worth, 1.0 + moved, -moved, devices / self._n_devices)

    def _gains(self, prices: _Prices) -> Floats:
        """(pools, shapes): what a device would gain at most, with the best price for turns of each shape; or 0."""
        profits, turns, ends = list[Floats](), list[Floats](), [0]
        for at, pool in enumerate(self.pools):
            for stage in self.stages[at] if self._may_decode[at] else ():
                cost = np.where((stage.layers > 0) & self._is_open, prices.devices[at], np.inf)
                lent = self.shapes.n * stage.layers / self.shapes.n_layers
                work = stage.outputs * prices.outputs[at]
                if "mixed" in pool.roles:
                    work = np.maximum(work, stage.prompts * prices.prompts[at])
                profits += [work / stage.tp - cost, -cost]
                turns += [(1 - lent) / stage.tp, -lent / stage.tp]
            ends.append(len(profits))
        if not profits:
            return np.zeros((len(self.pools), len(self.shapes)))
        profit, turn = np.array(profits), np.array(turns)
        gains = profit - _price_of_turns(profit, turn) * turn
        return np.array([gains[start:end].max(axis=0, initial=0.0) for start, end in pairwise(ends)])


def _undominated(uses: Sequence[_Use]) -> list[_Use]:
    """Those that no other is as good as in everything."""
    return [
        one
        for at, one in enumerate(uses)
        if not any(
            other[0] >= one[0] and other[1] >= one[1] and other[2] <= one[2] and (other != one or number < at)
            for number, other in enumerate(uses)
        )
    ]


def _price_of_turns(profit: Floats, turn: Floats) -> Floats:
    """By shape, the price at which nothing gains; where there is none, one between those that stages ask for."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = profit / turn
    least = np.where(turn > _TINY, ratio, -np.inf).max(axis=0)
    most = np.where((turn < -_TINY) & np.isfinite(profit), ratio, np.inf).min(axis=0)
    price: Floats = np.maximum(least, 0.0)
    clash = (least > most) & np.isfinite(least)
    price[clash] = np.maximum(0.0, (least[clash] + most[clash]) / 2)
    return price
