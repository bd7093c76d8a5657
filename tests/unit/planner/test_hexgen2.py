"""HexGen-2's search: its flow network, its swaps, and what it ends with."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import linprog

from hexmesh.cluster import Cluster, Device, Fabric, Link, Node
from hexmesh.papers.pd_flow import max_flow
from hexmesh.planner.algorithms.hexgen2 import (
    Builder,
    Group,
    Groups,
    first_network,
    guided,
    improve,
    most_groups,
)
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from tests.unit.planner import small_fleets
from tests.unit.planner.named_fleets import named_problem

N_LAYERS = 6


def _one_replica_hosts(rng: random.Random) -> Cluster:
    """Hosts of one device that holds everything, over links of their own, without NICs that they would share."""
    nodes = [
        Node(
            id=f"n{at}",
            name=f"n{at}",
            site="here",
            devices=(
                Device(
                    index=0,
                    kind="cuda",
                    name="any",
                    budget_bytes=40 * 10**9,
                    flops_per_s=rng.uniform(0.5, 5) * 1e14,
                    bytes_per_s=rng.uniform(0.5, 3) * 1e12,
                ),
            ),
            fabric=Fabric(kind="any", bytes_per_s=2e11, step_s=1e-5),
        )
        for at in range(rng.randint(2, 6))
    ]
    links = [
        Link(
            src=a.id,
            dst=b.id,
            rtt_p50_s=1e-4,
            rtt_p95_s=1e-4,
            bytes_per_s=rng.choice([1e7, 1e8, 3e8]),
            lower_bound=False,
        )
        for a in nodes
        for b in nodes
        if a is not b
    ]
    return Cluster(nodes=tuple(nodes), links=tuple(links))


def test_where_pairs_share_no_nic_the_network_carries_what_the_flow_program_says() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        problem = small_fleets.problem(_one_replica_hosts(rng), N_LAYERS)
        groups: Groups = tuple(
            Group(((pool, 1),), "prefill" if pool % 2 == 0 else "decode")
            for pool in range(len(problem.pools))
        )
        network = Builder(problem, prefills_at_once=False).network(groups)
        judged = problem.judge(tuple(layout for layout in network.layouts if layout is not None))
        assert network.value > 0
        assert network.value == pytest.approx(judged.flow.requests_per_s, rel=1e-6)


def test_preflow_push_and_a_linear_program_agree() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        n_prefill, n_decode = rng.randint(1, 5), rng.randint(1, 5)
        prefill = [rng.uniform(0, 10) for _ in range(n_prefill)]
        decode = [rng.uniform(0, 10) for _ in range(n_decode)]
        handoff = [rng.choice([0.0, rng.uniform(0, 5)]) for _ in range(n_prefill * n_decode)]
        rows = [np.repeat(np.arange(n_prefill) == p, n_decode) for p in range(n_prefill)]
        rows += [np.tile(np.arange(n_decode) == d, n_prefill) for d in range(n_decode)]
        expected = linprog(
            -np.ones(len(handoff)),
            A_ub=np.array(rows, dtype=float),
            b_ub=prefill + decode,
            bounds=[(0, most) for most in handoff],
        )
        found = max_flow(
            {str(p): rate for p, rate in enumerate(prefill)},
            {str(d): rate for d, rate in enumerate(decode)},
            {(str(at // n_decode), str(at % n_decode)): most for at, most in enumerate(handoff)},
        )
        assert found.value == pytest.approx(-expected.fun, abs=1e-6)


def _run(problem: Problem) -> Run:
    return Run(problem=problem, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)


def test_swaps_only_gain_and_use_no_device_twice() -> None:
    problem = named_problem("hexgen2-5")
    builder = Builder(problem, prefills_at_once=True)
    first = first_network(builder, most_groups(problem))
    for groups in guided(first):
        counts = np.zeros(len(problem.pools), dtype=int)
        for group in groups:
            for pool, n in group.team:
                counts[pool] += n
        assert counts.tolist() == [pool.size for pool in problem.pools]
    last = improve(_run(problem), first, builder, guided, "hexgen2")
    assert last.value > first.value > 0


def test_k_is_memory_by_a_replicas_memory() -> None:
    """8 x 80 GB hold four copies of 138 GB with KV, and 58 GPUs of 24 and 48 GB at most twelve (A7)."""
    assert most_groups(named_problem("hexgen2-h100")) == 4
    assert most_groups(named_problem("hexgen-58")) <= 12
