"""Replicas that hand nothing over: each serves what its tightest part lets through."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hexmesh.cluster import Cluster, Node
from hexmesh.score import FlowScore, Limit, ReplicaRates, best_flow
from hexmesh.score.alone import serve_alone


@dataclass(frozen=True, slots=True)
class Layers:
    node: str = "here"
    start: int = 0
    stop: int = 8


HERE = Cluster(nodes=(Node(id="here", name="here", site="s", devices=()),), links=())


def rates(name: str, *uses: tuple[float, float], prefill: float = 100.0) -> ReplicaRates:
    return ReplicaRates(name=name, role="mixed", prefill=prefill, decode=100.0, stages=(Layers(),), uses=uses)


def test_each_serves_its_own_and_names_what_stops_it() -> None:
    found = serve_alone([rates("r0", (0.1, 0.1), (0.05, 0.2)), rates("r1", (0.01, 0.01), prefill=6.0)])
    assert found.requests_per_s == pytest.approx(4.0 + 6.0)
    assert found.flows == pytest.approx({("r0", "r0"): 4.0, ("r1", "r1"): 6.0})
    assert found.shares == pytest.approx({Limit("mixed", "r0/1"): 0.4, Limit("prefill", "r1"): 0.6})


def test_one_replica_gives_what_the_flow_program_says() -> None:
    one = [rates("r0", (0.1, 0.1), (0.05, 0.2))]
    by_program = best_flow(one, HERE, 1.0)
    assert serve_alone(one).requests_per_s == pytest.approx(by_program.requests_per_s)


def test_handing_over_would_gain_what_this_forbids() -> None:
    """One is quick with prompts, the other with outputs."""
    two = [rates("r0", (0.01, 0.2)), rates("r1", (0.2, 0.01))]
    free: FlowScore = best_flow(two, HERE, 1.0)
    assert free.requests_per_s > 1.5 * serve_alone(two).requests_per_s


def test_what_serves_no_request_alone_counts_for_nothing() -> None:
    found = serve_alone([rates("r0", (0.1, 0.1), prefill=0.0)])
    assert (found.requests_per_s, dict(found.flows), dict(found.shares)) == (0.0, {}, {})
