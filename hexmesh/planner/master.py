"""The integer program over candidate layouts: how often each is there, and what flows between them.

A *bundle* is some layouts that come together. It takes resources (devices of a pool, hosts of a class, a team's turn),
of which there are so many. Flows, NICs and lines are those of the score (`hexmesh.score.flow_program`), each row opened
by its bundle's count: x <= P n, a mixed replica's parts <= n, and for a bundle that has its hosts for itself, NIC <= n.

After column generation (Gilmore, Gomory): the linear program's prices say what a bundle that is not listed must bring.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hexmesh.cluster import Nic
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Problem
from hexmesh.score import ReplicaRates
from hexmesh.score.flow_program import Flows, Limit, add_flows
from hexmesh.score.network import Network, Way
from hexmesh.score.places import Place, spans_of
from hexmesh.score.plan_score import kv_layer_bytes
from hexmesh.score.program import Program

GAP = 1e-3
MAX_NODES = 2000
"""Of the branch and bound: what ends it, so that the same program has the same answer."""
LIMIT_S = 60.0
"""What ends it at the latest."""
_TINY = 1e-7
"""What a bundle takes from the worth, so that none is there for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Layouts that come together, on the pools of the hosts that they name."""

    layouts: tuple[Layout, ...]
    takes: tuple[tuple[Hashable, int], ...]
    """(resource, how much)."""
    own_nodes: frozenset[str] = frozenset()
    """Hosts that stand for any like them, and that it has for itself."""
    price_per_h: float = 0.0
    """Of those."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What the linear program would pay."""

    worth: float
    resources: Mapping[Hashable, float]
    """For one more of each."""
    prompts: Mapping[str, float]
    outputs: Mapping[str, float]
    """For a request more a second at a site."""
    counts: tuple[float, ...]
    """Of the bundles."""
    wires: float
    """The share of the worth that NICs and lines decide."""
    losses: tuple[float, ...]
    """What one more of each bundle would cost; 0 for those that are there."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Layers on a node that stands for others."""

    node: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Copies(Network):
    """Nodes that stand for several: each is there as often as its gate says, all in one hub."""

    real: Mapping[str, str] = field(kw_only=True)
    """Node by copy."""
    counts: Mapping[str, int] = field(kw_only=True)
    """Gate by copy, of those that have one."""
    original: Network = field(kw_only=True)

    @cached_property
    def sites(self) -> dict[str, str]:
        return {copy: self.original.sites[node] for copy, node in self.real.items()}

    @cached_property
    def nics(self) -> dict[str, Nic]:
        nics = self.original.nics
        return {copy: nics[node] for copy, node in self.real.items() if node in nics}

    @cached_property
    def lines(self) -> dict[tuple[str, str], float]:
        return self.original.lines

    @cached_property
    def hub(self) -> frozenset[str]:
        return frozenset(self.real)

    @cached_property
    def connected_sites(self) -> frozenset[tuple[str, str]]:
        return self.original.connected_sites

    @property
    def gates(self) -> Mapping[str, int]:
        return self.counts

    def has_link(self, way: Way) -> bool:
        return (self.real[way[0]], self.real[way[1]]) in self.original.links

    def own_limit(self, way: Way) -> float:
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Hire:
    """A host that is paid for if any of its resources is taken."""

    node: str
    price_per_h: float


@dataclass(frozen=True, kw_only=True)
class Master:
    """Bundles to choose from, and what there is of each resource."""

    problem: Problem
    bundles: Sequence[Bundle]
    resources: Mapping[Hashable, int]
    target: float | None = None
    """Requests per second to serve at the least price; None: as many as can be."""
    is_coarse: bool = False
    """As in `Network`: for many bundles."""
    hires: Mapping[Hashable, Hire] = field(default_factory=dict)
    """Resources that are a host's, for a target."""

    def prices(self) -> Prices | None:
        """What the linear program would pay; None if the rate that is asked for is out of reach."""
        program, gates, _ = self._program
        solution = program.solve()
        if solution is None:
            return None
        sites = {pool.node.site for pool in self.problem.pools}
        prompt = 1.0 if self.target is None else solution.limits.get("demand", 0.0) / self.target
        return Prices(
            worth=solution.worth,
            resources={
                key: solution.limits.get(("there", key), 0.0) / n for key, n in self.resources.items()
            },
            prompts={site: prompt + solution.balances.get(("leaves", site), 0.0) for site in sites},
            outputs={site: solution.balances.get(("enters", site), 0.0) for site in sites},
            wires=sum(price for key, price in solution.limits.items() if _is_wire(key)),
            counts=tuple(float(solution.values[gate]) for gate in gates),
            losses=tuple(float(solution.losses[gate]) for gate in gates),
        )

    def chosen(
        self, *, gap: float = GAP, max_nodes: int = MAX_NODES, limit_s: float = LIMIT_S
    ) -> tuple[int, ...] | None:
        """How often each bundle is there; None if nothing was found."""
        program, gates, _ = self._program
        values = program.solve_integers(gap=gap, max_nodes=max_nodes, limit_s=limit_s)
        return None if values is None else tuple(round(float(values[gate])) for gate in gates)

    @cached_property
    def _program(self) -> tuple[Program, Sequence[int], Flows]:
        """The program, the bundles' counts in it, and its flows."""
        program = Program()
        is_paid = self.target is not None
        gates = [
            program.variable(-_TINY - is_paid * bundle.price_per_h, is_integer=True)
            for bundle in self.bundles
        ]
        hired = dict[str, int]()
        for bundle, gate in zip(self.bundles, gates, strict=True):
            for key, amount in bundle.takes:
                host = self._hired(program, key, hired) if is_paid else None
                program.use(("there", key), gate, amount, self.resources[key], host)
        flows = self._flows(program, gates)
        return program, gates, flows

    def _hired(self, program: Program, key: Hashable, hired: dict[str, int]) -> int | None:
        hire = self.hires.get(key)
        if hire is None:
            return None
        if hire.node not in hired:
            hired[hire.node] = program.variable(-hire.price_per_h, 1.0, is_integer=True)
        return hired[hire.node]

    def _flows(self, program: Program, gates: Sequence[int]) -> Flows:
        replicas, opened, real, counts = list[ReplicaRates](), list[int](), dict[str, str](), dict[str, int]()
        for at, (bundle, gate) in enumerate(zip(self.bundles, gates, strict=True)):
            for number, layout in enumerate(bundle.layouts):
                stages = self._held(layout.parts, at, real)
                replicas.append(_rates(layout, f"{at}/{number}", stages))
                opened.append(gate)
                counts |= {stage.node: gate for stage in stages if real[stage.node] in bundle.own_nodes}
        known = dict[object, Place]()
        spans = [spans_of(replica.stages) for replica in replicas]
        network = _Copies(
            self.problem.cluster,
            is_coarse=self.is_coarse,
            real=real,
            counts=counts,
            original=self.problem.network,
        )
        flows = add_flows(
            program,
            replicas,
            [known.setdefault(one, Place(one)) for one in spans],
            network,
            kv_layer_bytes(self.problem.capacities),
            opened,
            1.0 if self.target is None else 0.0,
        )
        if self.target is not None:
            for x in flows.prefill.values():
                program.demand("demand", x, 1 / self.target)
        return flows

    def _held(self, parts: Sequence[Part], bundle: int, real: dict[str, str]) -> tuple[_Held, ...]:
        """Layers by node, or by its copy for the bundle."""
        held = list[_Held]()
        for part in parts:
            node = self.problem.pools[part.pool].node.id
            copy = f"{node} for {bundle}" if node in self.bundles[bundle].own_nodes else node
            real[copy] = node
            held.append(_Held(copy, part.start, part.stop))
        return tuple(held)


def _is_wire(key: Hashable) -> bool:
    return isinstance(key, Limit) and key.kind in ("nic_out", "nic_in", "line")


def _rates(layout: Layout, name: str, stages: tuple[_Held, ...]) -> ReplicaRates:
    return ReplicaRates(
        name=name,
        role=layout.role,
        prefill=layout.prefill,
        decode=layout.decode,
        stages=stages,
        uses=layout.uses,
    )
