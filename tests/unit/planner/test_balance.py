"""The quick rate of replicas is the exact one where each is in one host, and no change beats what prices allow it."""

from __future__ import annotations

import random

import pytest

from hexmesh.cluster import Cluster, Link, Nic, Node, Role, SiteLink
from hexmesh.planner.balance import Balanced, Corner, Share, balance, borders_of, corners_of, sites_of
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part
from hexmesh.score import ReplicaRates, best_flow

N_LAYERS = 4
KV_LAYER_BYTES = 1e6


class _Held:
    def __init__(self, node: str) -> None:
        self.node, self.start, self.stop = node, 0, N_LAYERS


def _cluster(rng: random.Random) -> Cluster:
    """Hosts of two sites with NICs, and lines that may be slower."""
    nodes = tuple(
        Node(
            id=f"n{at}",
            name=f"n{at}",
            site=f"s{at % 2}",
            devices=(),
            nic=Nic(out_bytes_per_s=rng.uniform(1e6, 3e7), in_bytes_per_s=rng.uniform(1e6, 3e7)),
        )
        for at in range(rng.randint(1, 5))
    )
    lines = tuple(
        SiteLink(src=src, dst=dst, rtt_s=0.0, bytes_per_s=rng.uniform(1e6, 4e7))
        for src, dst in [("s0", "s1"), ("s1", "s0")]
    )
    links = tuple(
        Link(src=a.id, dst=b.id, rtt_p50_s=0.0, rtt_p95_s=0.0, bytes_per_s=1e9, lower_bound=False)
        for a in nodes
        for b in nodes
        if a is not b
    )
    return Cluster(nodes=nodes, links=links, site_links=lines)


def _layout(role: Role, rng: random.Random) -> Layout:
    uses = tuple((rng.uniform(0.01, 0.3), rng.uniform(0.01, 0.3)) for _ in range(rng.randint(1, 5)))
    return Layout(
        role=role,
        parts=(Part(pool=0, tp=1, start=0, stop=N_LAYERS),),
        prefill=0.0 if role == "decode" else rng.uniform(1, 20),
        decode=0.0 if role == "prefill" else rng.uniform(1, 20),
        uses=uses if role == "mixed" else (),
        requests_per_s=0.0,
        prefill_latency_s=0.0,
        alone_s=0.0,
        tpot_s=0.0,
        batch=1.0,
        micro_batches=1,
    )


def _case(seed: int) -> tuple[Cluster, list[Layout], list[str]]:
    rng = random.Random(seed)
    cluster = _cluster(rng)
    roles: tuple[Role, ...] = ("mixed", "prefill", "decode")
    layouts = [_layout(rng.choice(roles), rng) for _ in range(rng.randint(1, 6))]
    return cluster, layouts, [rng.choice(cluster.nodes).id for _ in layouts]


def _shares(cluster: Cluster, node_id: str) -> tuple[Share, ...]:
    hosts, sites = [node.id for node in cluster.nodes], sites_of(cluster)
    at = hosts.index(node_id)
    return ((at, 1.0), (len(hosts) + sites.index(cluster.nodes[at].site), 1.0))


def _balanced(cluster: Cluster, layouts: list[Layout], nodes: list[str]) -> Balanced:
    borders = borders_of(cluster, N_LAYERS * KV_LAYER_BYTES)
    return balance(list(map(corners_of, layouts)), [_shares(cluster, node) for node in nodes], borders)


@pytest.mark.parametrize("seed", range(60))
def test_replicas_in_one_host_each_serve_what_the_flow_program_says(seed: int) -> None:
    cluster, layouts, nodes = _case(seed)
    replicas = [
        ReplicaRates(
            name=f"r{at}",
            role=layout.role,
            prefill=layout.prefill,
            decode=layout.decode,
            stages=(_Held(node),),
            uses=layout.uses,
        )
        for at, (layout, node) in enumerate(zip(layouts, nodes, strict=True))
    ]
    exact = best_flow(replicas, cluster, KV_LAYER_BYTES).requests_per_s
    assert _balanced(cluster, layouts, nodes).requests_per_s == pytest.approx(exact, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_replica_adds_no_more_than_it_earns(seed: int) -> None:
    cluster, layouts, nodes = _case(seed)
    rng = random.Random(seed)
    before = _balanced(cluster, layouts, nodes)
    earned = [
        before.earns(corners_of(layout), _shares(cluster, node))
        for layout, node in zip(layouts, nodes, strict=True)
    ]
    assert before.borders_earn + sum(earned) == pytest.approx(before.requests_per_s, rel=1e-6, abs=1e-9)
    changed = _layout(rng.choice(("mixed", "prefill", "decode")), rng)
    most = before.borders_earn + sum(earned[1:])
    most += before.earns(corners_of(changed), _shares(cluster, nodes[0]))
    assert _balanced(cluster, [changed, *layouts[1:]], nodes).requests_per_s <= most * (1 + 1e-6) + 1e-9


def test_corners_of_a_mixed_replica_follow_its_limits() -> None:
    layout = Layout(
        role="mixed",
        parts=(),
        prefill=4.0,
        decode=20.0,
        uses=((0.1, 0.1), (0.2, 0.05)),
        requests_per_s=0.0,
        prefill_latency_s=0.0,
        alone_s=0.0,
        tpot_s=0.0,
        batch=1.0,
        micro_batches=1,
    )
    expected: list[Corner] = [(0.0, 10.0), (10 / 3, 20 / 3), (4.0, 4.0), (4.0, 0.0)]
    assert [pytest.approx(corner) for corner in expected] == list(corners_of(layout))
