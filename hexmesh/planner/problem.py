"""What is to be planned, and what a draft of a plan is worth: the one judge of all searches.

A draft is a tuple of layouts, each with the devices it takes from the pools. Its rate is the flow program's over the
layouts' own rates (`hexmesh.score.flows`), with handoffs charged to the NICs and lines that they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from hexmesh.cluster import Cluster, Link, Node, Role
from hexmesh.cost import CostModel, StepLimits
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName
from hexmesh.planner.layouts import Layout, Layouts
from hexmesh.planner.objective import WORTHLESS, Figures, Latency, Objective, Worth, within
from hexmesh.planner.pools import ROLES, Part, Pool, Team, pools_of, team_of
from hexmesh.planner.whole_bound import whole_bound
from hexmesh.score import (
    Capacities,
    FlowScore,
    ReplicaRates,
    Residency,
    best_flow,
    fluid_bound,
    handoff_bytes,
)
from hexmesh.score.alone import serve_alone
from hexmesh.score.network import Network
from hexmesh.score.pipeline import NOWHERE, Pipeline, Seat, group_like, hop_between
from hexmesh.score.plan_score import kv_layer_bytes
from hexmesh.workload import Workload

Draft = tuple[Layout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A draft and what it is worth."""

    draft: Draft
    worth: Worth
    figures: Figures
    flow: FlowScore
    """Replicas are named r0, r1 and so on, as in the draft."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Layers of a part on its node."""

    node: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A fleet, a model, what is asked of it and what is wanted."""

    cluster: Cluster
    spec: ModelSpec
    dtype: DtypeName
    workload: Workload
    objective: Objective
    roles: frozenset[Role] = frozenset(ROLES)
    """Roles that replicas may have; all of prefill and decode without mixed is "strict"."""
    block_tokens: int = 16
    limits: StepLimits = field(default_factory=StepLimits)
    residency: Residency = field(default_factory=Residency)

    @cached_property
    def pools(self) -> tuple[Pool, ...]:
        """Devices to plan with."""
        return pools_of(self.cluster, self.spec)

    @cached_property
    def capacities(self) -> Capacities:
        """Rates of pipelines, within the limits that the objective keeps."""
        costs = CostModel(self.spec, self.dtype, self.block_tokens, self.limits)
        return Capacities(costs, within(self.workload, self.objective), self.residency)

    @cached_property
    def layouts(self) -> Layouts:
        """The best layouts of teams."""
        return Layouts(self.cluster, self.pools, self.capacities)

    @cached_property
    def network(self) -> Network:
        """Its wires, looked up once."""
        return Network(self.cluster)

    @cached_property
    def links(self) -> dict[tuple[str, str], Link]:
        """Links by (source, destination)."""
        return self.network.links

    @cached_property
    def bound_requests_per_s(self) -> float:
        """No plan of any kind serves more, by this score."""
        return fluid_bound(self.cluster, self.capacities, self.roles)

    @cached_property
    def near_bound_requests_per_s(self) -> float:
        """The same, nearer for a few devices: a second's work once there are plans to compare with it."""
        whole = whole_bound(self.cluster, self.pools, self.layouts, self.capacities, self.roles)
        return min(self.bound_requests_per_s, whole)

    @cached_property
    def _prices_per_h(self) -> dict[str, float]:
        """Of hosts; those without a known price are free."""
        return {pool.node.id: pool.node.price_per_h or 0.0 for pool in self.pools}

    @property
    def whole(self) -> Team:
        """All devices."""
        return tuple((at, pool.size) for at, pool in enumerate(self.pools))

    def may_be(self, team: Team, role: Role) -> bool:
        """Whether all of a team's hosts do that, and it is asked for."""
        return role in self.roles and all(role in self.pools[pool].roles for pool, _ in team)

    def judge(self, draft: Draft) -> Judged:
        """What the draft is worth. It must not take more of a pool than there is."""
        flow = self.flow(self.rates(draft))
        latency_s = self.latency_s(draft, flow) if isinstance(self.objective, Latency) else 0.0
        used = {self.pools[part.pool].node.id for layout in draft for part in layout.parts}
        figures = Figures(
            requests_per_s=flow.requests_per_s,
            latency_s=latency_s,
            price_per_h=sum(self._prices_per_h[node] for node in used),
            n_devices=sum(part.tp for layout in draft for part in layout.parts),
        )
        worth = self.objective.worth(figures) if flow.requests_per_s > 0 else WORTHLESS
        return Judged(draft=draft, worth=worth, figures=figures, flow=flow)

    def flow(self, rates: Sequence[ReplicaRates]) -> FlowScore:
        """What replicas of these rates serve together."""
        if not self.hands_over:
            return serve_alone(rates)
        return best_flow(rates, self.network, kv_layer_bytes(self.capacities))

    @cached_property
    def hands_over(self) -> bool:
        """Whether some host prefills for others and some decodes for others; mixed replicas alone do neither."""
        does = frozenset[Role]().union(*(pool.roles for pool in self.pools))
        return does >= {"prefill", "decode"}

    def rates(self, draft: Draft) -> list[ReplicaRates]:
        """What the flow program is given: replicas r0, r1 and so on."""
        return [
            ReplicaRates(
                name=f"r{at}",
                role=layout.role,
                prefill=layout.prefill,
                decode=layout.decode,
                stages=self.held(layout.parts),
                uses=layout.uses,
            )
            for at, layout in enumerate(draft)
        ]

    def held(self, parts: Sequence[Part]) -> tuple[_Held, ...]:
        """Who holds which layers."""
        return tuple(_Held(self.pools[part.pool].node.id, part.start, part.stop) for part in parts)

    def pipeline(self, parts: Sequence[Part]) -> Pipeline:
        """Parts as the score sees them. Raises InvalidInput where a link is missing."""
        nodes = [self._node(part) for part in parts]
        return Pipeline(
            seats=tuple(self.seat(part) for part in parts),
            hops=tuple(hop_between(a, b, self.links) for a, b in pairwise(nodes)),
            back=NOWHERE if len(nodes) == 1 else hop_between(nodes[-1], nodes[0], self.links),
        )

    def latency_s(self, draft: Draft, flow: FlowScore) -> float:
        """Mean seconds of a request when the rate asked for is served: prompt, handoff and the tokens after the first.

        Infinite where that rate is out of reach.
        """
        wanted = self.objective.requests_per_s if isinstance(self.objective, Latency) else flow.requests_per_s
        if flow.requests_per_s <= 0 or wanted > flow.requests_per_s * (1 + 1e-9):
            return float("inf")
        names = {f"r{at}": layout for at, layout in enumerate(draft)}
        scale = wanted / flow.requests_per_s
        tpot_s = {
            name: self.capacities.tpot_at(
                self.pipeline(names[name].parts),
                rate * scale * (1 - 1e-9),
                computes_prompts=names[name].role == "mixed",
            )
            for name, rate in flow.decode.items()
            if rate > 0
        }
        n_further = self.workload.output_tokens - 1
        return sum(
            rate
            / flow.requests_per_s
            * (
                names[p].prefill_latency_s
                + self._handoff_s(names[p].parts, names[d].parts)
                + n_further * tpot_s[d]
            )
            for (p, d), rate in flow.flows.items()
        )

    def _handoff_s(self, prefill: Sequence[Part], decode: Sequence[Part]) -> float:
        """Of one prompt's KV over idle links, all ways at once."""
        ways = handoff_bytes(self.held(prefill), self.held(decode), kv_layer_bytes(self.capacities))
        return max(
            (self.links[way].rtt_p50_s / 2 + n / self.links[way].bytes_per_s for way, n in ways.items()),
            default=0.0,
        )

    def _node(self, part: Part) -> Node:
        return self.pools[part.pool].node

    def seat(self, part: Part) -> Seat:
        """A part as the score sees it."""
        group = group_like(self._node(part), self.pools[part.pool].device, part.tp)
        return Seat(group=group, start=part.start, stop=part.stop)


def takes_too_much(draft: Draft, pools: Sequence[Pool]) -> bool:
    """Whether a draft needs more devices of a pool than there are."""
    taken = Counter[int]()
    for layout in draft:
        taken.update(dict(team_of(layout.parts)))
    return any(n > pools[pool].size for pool, n in taken.items())
