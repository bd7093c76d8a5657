"""The flow program over places and hubs against the one that names every pair of replicas."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy.optimize import linprog

from hexmesh.cluster import Cluster, Link, Nic, Node, Role, SiteLink
from hexmesh.plan import Stage
from hexmesh.score import ReplicaRates, best_flow, handoff_bytes
from hexmesh.score.network import Network

N_LAYERS = 8
LAYER_BYTES = 1000.0
ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")


def _every_pair(replicas: Sequence[ReplicaRates], cluster: Cluster) -> float:
    """The same program in its plainest form: one variable for each pair, one row for each limit and link."""
    links, sites = cluster.link_table(), {node.id: node.site for node in cluster.nodes}
    rows, most, pairs = defaultdict[object, dict[int, float]](dict), dict[object, float](), 0

    def use(limit: object, amount: float, available: float) -> None:
        rows[limit][pairs] = rows[limit].get(pairs, 0.0) + amount
        most[limit] = available

    for p in replicas:
        for d in replicas:
            ways = handoff_bytes(p.stages, d.stages, LAYER_BYTES)
            if p.role == "decode" or d.role == "prefill" or not all(way in links for way in ways):
                continue
            use(("prefill", p.name), 1.0, p.prefill)
            use(("decode", d.name), 1.0, d.decode)
            for part, (prompt_s, _) in enumerate(p.uses):
                use(("mixed", p.name, part), prompt_s, 1.0)
            for part, (_, output_s) in enumerate(d.uses):
                use(("mixed", d.name, part), output_s, 1.0)
            for (src, dst), n_bytes in ways.items():
                out, into = cluster.node(src).nic, cluster.node(dst).nic
                use(("out", src), n_bytes, math.inf if out is None else out.out_bytes_per_s)
                use(("in", dst), n_bytes, math.inf if into is None else into.in_bytes_per_s)
                use((src, dst), n_bytes, links[src, dst].bytes_per_s)
                for line in cluster.site_links:
                    if (line.src, line.dst) == (sites[src], sites[dst]):
                        use(("line", line.src, line.dst), n_bytes, line.bytes_per_s)
            pairs += 1
    if pairs == 0:
        return 0.0
    kept = [limit for limit in rows if math.isfinite(most[limit])]
    table = np.zeros((len(kept), pairs))
    for row, limit in enumerate(kept):
        for at, amount in rows[limit].items():
            table[row, at] = amount / most[limit]
    return float(-linprog(-np.ones(pairs), A_ub=table, b_ub=np.ones(len(kept))).fun)


def _stage(node: str, start: int, stop: int) -> Stage:
    return Stage(
        node=node,
        devices=(0,),
        start=start,
        stop=stop,
        kv_blocks=1,
        needed_bytes=0,
        room_bytes=0,
        predicted_step_s=0.0,
    )


def _cluster(rng: random.Random) -> Cluster:
    """Good links and odd ones, hosts without a known NIC, sites without a line, links that are missing."""
    sites, speed = ["here", "there", "far"][: rng.randint(1, 3)], N_LAYERS * LAYER_BYTES
    unconnected = ("here", "far") if rng.random() < 0.3 else None
    nodes = tuple(
        Node(
            id=f"n{at}",
            name="",
            site=rng.choice(sites),
            devices=(),
            nic=None
            if rng.random() < 0.1
            else Nic(out_bytes_per_s=rng.uniform(1, 60) * speed, in_bytes_per_s=rng.uniform(1, 60) * speed),
        )
        for at in range(rng.randint(2, 7))
    )
    odd = rng.choice([0.0, 0.2, 1.0])
    links = tuple(
        Link(
            src=a.id,
            dst=b.id,
            rtt_p50_s=0.0,
            rtt_p95_s=0.0,
            bytes_per_s=rng.uniform(0.5, 30) * speed if rng.random() < odd else math.inf,
            lower_bound=False,
        )
        for a in nodes
        for b in nodes
        if a is not b and (a.site, b.site) != unconnected and rng.random() > odd / 10
    )
    lines = tuple(
        SiteLink(src=a, dst=b, rtt_s=0.0, bytes_per_s=rng.uniform(1, 60) * speed)
        for a in sites
        for b in sites
        if a != b and rng.random() < 0.8
    )
    return Cluster(nodes=nodes, links=links, site_links=lines)


def _replica(rng: random.Random, name: str, nodes: Sequence[str]) -> ReplicaRates:
    role, rate, other = rng.choice(ROLES), rng.uniform(0.1, 50), rng.uniform(0.1, 50)
    cut = rng.choice([2, 4, 8, 8])
    stages = [_stage(rng.choice(nodes), 0, cut)]
    if cut < N_LAYERS:
        stages.append(_stage(rng.choice(nodes), cut, N_LAYERS))
    balanced = rng.uniform(1.0, 1.3) / (rate + other)
    return ReplicaRates(
        name=name,
        role=role,
        prefill=0.0 if role == "decode" else rate,
        decode=0.0 if role == "prefill" else other,
        stages=tuple(stages),
        uses=((balanced * other / rate, balanced * rate / other),) if role == "mixed" else (),
    )


@pytest.mark.parametrize("seed", range(60))
def test_places_and_hubs_say_the_same_as_every_pair(seed: int) -> None:
    rng = random.Random(seed)
    cluster = _cluster(rng)
    nodes = [node.id for node in cluster.nodes]
    replicas = [_replica(rng, f"r{at}", nodes) for at in range(rng.randint(1, 10))]
    found = best_flow(replicas, cluster, LAYER_BYTES)
    assert found.requests_per_s == pytest.approx(_every_pair(replicas, cluster), rel=1e-5, abs=1e-9)
    _check_flows(found.flows, replicas, cluster, found.requests_per_s)


def _check_flows(
    flows: Mapping[tuple[str, str], float], replicas: Sequence[ReplicaRates], cluster: Cluster, total: float
) -> None:
    """Every wire carries what is sent over it."""
    by_name, sites = {one.name: one for one in replicas}, {node.id: node.site for node in cluster.nodes}
    sent, links = defaultdict[object, float](float), cluster.link_table()
    for (p, d), rate in flows.items():
        for (src, dst), n_bytes in handoff_bytes(by_name[p].stages, by_name[d].stages, LAYER_BYTES).items():
            assert rate * n_bytes <= links[src, dst].bytes_per_s * (1 + 1e-6)
            sent["out", src] += rate * n_bytes
            sent["in", dst] += rate * n_bytes
            sent["line", sites[src], sites[dst]] += rate * n_bytes
    assert sum(flows.values()) == pytest.approx(total, rel=1e-6, abs=1e-9)
    for node in cluster.nodes:
        if node.nic is not None:
            assert sent["out", node.id] <= node.nic.out_bytes_per_s * (1 + 1e-6)
            assert sent["in", node.id] <= node.nic.in_bytes_per_s * (1 + 1e-6)
    for line in cluster.site_links:
        if line.src != line.dst:
            assert sent["line", line.src, line.dst] <= line.bytes_per_s * (1 + 1e-6)


def test_hosts_whose_links_are_slower_than_their_nics_stay_out_of_the_hub() -> None:
    nic = Nic(out_bytes_per_s=10.0, in_bytes_per_s=10.0)
    nodes = tuple(Node(id=name, name=name, site="here", devices=(), nic=nic) for name in "abcd")
    links = tuple(
        Link(
            src=a.id,
            dst=b.id,
            rtt_p50_s=0.0,
            rtt_p95_s=0.0,
            bytes_per_s=5.0 if "d" in (a.id, b.id) else 10.0,
            lower_bound=False,
        )
        for a in nodes
        for b in nodes
        if a is not b
    )
    assert Network(Cluster(nodes=nodes, links=links)).hub == {"a", "b", "c"}
