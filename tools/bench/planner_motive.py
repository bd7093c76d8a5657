"""HexGen's motivating case (C11): three layouts of Llama-2-70B on 4 x A6000, 2 x A5000 and 2 x A4000, one request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hexmesh.cluster import Fabric
from hexmesh.cost import CostModel, StepLimits
from hexmesh.planner.pools import Part, Pool
from hexmesh.planner.problem import Problem
from hexmesh.roofline import Group
from hexmesh.score import Capacities, Pipeline, Seat
from hexmesh.score.pipeline import hop_between
from hexmesh.workload import Workload
from tools.bench.planner_fleets import cluster_named, problem_of, spec_named

FLEET = "hexgen-8-mixed"
REQUEST = Workload(prompt_tokens=32, output_tokens=128)
"""As in HexGen's released constants."""
SLOW_STEP_S = 0.5e-3
"""Of a collective between machines over TCP on a local network; ours, as the paper's network is not published."""


@dataclass(frozen=True, slots=True)
class Motive:
    """Seconds of one request in each layout."""

    asymmetric_s: float
    """TP [4, 2, 2] over layers [48, 20, 12]."""
    pipeline_s: float
    """Eight stages of one GPU, layers as memory allows."""
    across_s: float
    """Two stages of TP 4, the second over two machines."""
    slow_bytes_per_s: float
    """Of the network between them."""


def motive(slow_bytes_per_s: float) -> Motive:
    """With the machines' network at that rate."""
    problem = problem_of(FLEET, "512/128", "Llama-2-70B")
    capacities = Capacities(CostModel(spec_named("Llama-2-70B"), "float16", 16, StepLimits()), REQUEST)
    a6000, a5000, a4000 = range(3)
    apart = [(a6000, 1)] * 4 + [(a5000, 1)] * 2 + [(a4000, 1)] * 2
    return Motive(
        asymmetric_s=_request_s(
            capacities, _pipeline(problem, [(a6000, 4), (a5000, 2), (a4000, 2)], [48, 20, 12])
        ),
        pipeline_s=_request_s(capacities, _pipeline(problem, apart, [14, 14, 14, 14, 7, 7, 5, 5])),
        across_s=_request_s(capacities, _across(problem, slow_bytes_per_s)),
        slow_bytes_per_s=slow_bytes_per_s,
    )


def rate_for(ratio: float) -> float:
    """Bytes/s between the machines at which TP across them is that many times slower than the asymmetric layout."""
    low, high = 1e3, 1e12
    for _ in range(60):
        middle = math.sqrt(low * high)
        at = motive(middle)
        low, high = (middle, high) if at.across_s > ratio * at.asymmetric_s else (low, middle)
    return low


def _request_s(capacities: Capacities, pipeline: Pipeline) -> float:
    """A prompt, then tokens one by one."""
    token_s = sum(capacities.step_s(seat, 1.0) for seat in pipeline.seats)
    token_s += sum(hop.delay_s for hop in pipeline.hops) + pipeline.back.delay_s
    return capacities.prefill(pipeline).latency_s + (REQUEST.output_tokens - 1) * token_s


def _pipeline(problem: Problem, seats: Sequence[tuple[int, int]], layers: Sequence[int]) -> Pipeline:
    bounds = [sum(layers[:at]) for at in range(len(layers) + 1)]
    return problem.pipeline(
        [
            Part(pool=pool, tp=tp, start=start, stop=stop)
            for (pool, tp), (start, stop) in zip(seats, pairwise(bounds), strict=True)
        ]
    )


def _across(problem: Problem, slow_bytes_per_s: float) -> Pipeline:
    """TP 4 on the A6000s, then TP 4 over both other machines, as fast as their slowest GPU and their network."""
    a6000, a5000, a4000 = problem.pools
    slow = Fabric(kind="network", bytes_per_s=slow_bytes_per_s, step_s=SLOW_STEP_S)
    whole = _pipeline(problem, [(0, 4), (1, 2)], [40, 40])
    second = Group(
        device=_slower(a5000, a4000).device,
        fabric=slow,
        tp=4,
        launch_s=whole.seats[1].group.launch_s,
        step_s=whole.seats[1].group.step_s,
    )
    return Pipeline(
        seats=(whole.seats[0], Seat(group=second, start=40, stop=80)),
        hops=(hop_between(a6000.node, a5000.node, cluster_named(FLEET).link_table()),),
        back=whole.back,
    )


def _slower(a: Pool, b: Pool) -> Pool:
    return min(a, b, key=lambda pool: pool.device.bytes_per_s)
