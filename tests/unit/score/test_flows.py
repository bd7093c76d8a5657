"""Replicas together: against max-flow where that can say it, by hand where lines are shared, and bottlenecks proven."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.cluster import Cluster, Link, Nic, Node, Role, SiteLink
from hexmesh.cost import CostModel, StepLimits
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.papers.pd_flow import max_flow
from hexmesh.plan import Replica, Stage
from hexmesh.score import (
    Capacities,
    Limit,
    ReplicaRates,
    best_flow,
    handoff_bytes,
    replica_rates,
    score_replicas,
)
from hexmesh.workload import CLASSES, Slo, Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
N_LAYERS = 8
LAYER_BYTES = 1000.0


def _stage(node: str, start: int = 0, stop: int = N_LAYERS, devices: tuple[int, ...] = (0,)) -> Stage:
    return Stage(
        node=node,
        devices=devices,
        start=start,
        stop=stop,
        kv_blocks=1,
        needed_bytes=0,
        room_bytes=0,
        predicted_step_s=0.0,
    )


def _replica(name: str, role: Role, rate: float, *stages: Stage) -> ReplicaRates:
    return ReplicaRates(
        name=name,
        role=role,
        prefill=rate if role != "decode" else 0.0,
        decode=rate if role != "prefill" else 0.0,
        stages=stages or (_stage(name),),
    )


def _mixed(name: str, prefill: float, decode: float, both: float, *stages: Stage) -> ReplicaRates:
    """One part that does `both` requests a second, prompts costing as much more as prefill is slower."""
    share = both / prefill + both / decode
    uses = ((1 / prefill / share, 1 / decode / share),)
    return ReplicaRates(
        name=name, role="mixed", prefill=prefill, decode=decode, stages=stages or (_stage(name),), uses=uses
    )


def _cluster(
    nodes: list[str], nic: float | None = None, link: float = 1e12, sites: dict[str, str] | None = None
) -> Cluster:
    return Cluster(
        nodes=tuple(
            Node(
                id=node,
                name=node,
                site=(sites or {}).get(node, "here"),
                devices=(),
                nic=None if nic is None else Nic(out_bytes_per_s=nic, in_bytes_per_s=nic),
            )
            for node in nodes
        ),
        links=tuple(_link(a, b, link) for a, b in product(nodes, nodes) if a != b),
    )


def _link(src: str, dst: str, bytes_per_s: float) -> Link:
    return Link(src=src, dst=dst, rtt_p50_s=0, rtt_p95_s=0, bytes_per_s=bytes_per_s, lower_bound=False)


_RATES = st.floats(0.1, 50)


@settings(deadline=None, max_examples=30)
@given(prefill=st.lists(_RATES, min_size=1, max_size=4), decode=st.lists(_RATES, min_size=1, max_size=4))
def test_without_slow_lines_the_lesser_phase_decides(prefill: list[float], decode: list[float]) -> None:
    replicas = [_replica(f"p{at}", "prefill", rate) for at, rate in enumerate(prefill)]
    replicas += [_replica(f"d{at}", "decode", rate) for at, rate in enumerate(decode)]
    found = best_flow(replicas, _cluster([replica.name for replica in replicas]), LAYER_BYTES)
    assert found.requests_per_s == pytest.approx(min(sum(prefill), sum(decode)))


@settings(deadline=None, max_examples=30)
@given(
    prefill=st.lists(_RATES, min_size=1, max_size=3),
    decode=st.lists(_RATES, min_size=1, max_size=3),
    data=st.data(),
)
def test_with_links_alone_it_is_the_max_flow_of_the_paper(
    prefill: list[float], decode: list[float], data: st.DataObject
) -> None:
    sources = {f"p{at}": rate for at, rate in enumerate(prefill)}
    targets = {f"d{at}": rate for at, rate in enumerate(decode)}
    capacities = {pair: data.draw(st.floats(0.05, 20)) for pair in product(sources, targets)}
    cluster = Cluster(
        nodes=_cluster([*sources, *targets]).nodes,
        links=tuple(_link(p, d, rate * N_LAYERS * LAYER_BYTES) for (p, d), rate in capacities.items()),
    )
    replicas = [_replica(name, "prefill", rate) for name, rate in sources.items()]
    replicas += [_replica(name, "decode", rate) for name, rate in targets.items()]
    expected = max_flow(sources, targets, capacities).value
    assert best_flow(replicas, cluster, LAYER_BYTES).requests_per_s == pytest.approx(expected, rel=1e-6)


def test_a_nic_is_shared_by_all_that_it_sends_to() -> None:
    """Two links of 10 requests/s each, but one NIC for 10 in all."""
    replicas = [
        _replica("p", "prefill", 100.0),
        _replica("d0", "decode", 50.0),
        _replica("d1", "decode", 50.0),
    ]
    rate = 10.0 * N_LAYERS * LAYER_BYTES
    pairwise = best_flow(replicas, _cluster(["p", "d0", "d1"], link=rate), LAYER_BYTES)
    shared = best_flow(replicas, _cluster(["p", "d0", "d1"], nic=rate, link=rate), LAYER_BYTES)
    assert (pairwise.requests_per_s, shared.requests_per_s) == pytest.approx((20.0, 10.0))
    assert shared.bottleneck == Limit("nic_out", "p")


def test_a_line_between_sites_is_shared_by_all_pairs_of_hosts() -> None:
    nodes = ["p0", "p1", "d0", "d1"]
    sites = {"p0": "a", "p1": "a", "d0": "b", "d1": "b"}
    replicas = [_replica(name, "prefill" if name[0] == "p" else "decode", 100.0) for name in nodes]
    cluster = _cluster(nodes, sites=sites)
    line = SiteLink(src="a", dst="b", rtt_s=0.0, bytes_per_s=7.0 * N_LAYERS * LAYER_BYTES)
    found = best_flow(replicas, msgspec.structs.replace(cluster, site_links=(line,)), LAYER_BYTES)
    assert found.requests_per_s == pytest.approx(7.0)
    assert found.bottleneck == Limit("line", "a to b")


def test_a_mixed_replica_alone_does_its_balanced_rate() -> None:
    found = best_flow([_mixed("m", 30.0, 10.0, 7.0)], _cluster(["m"]), LAYER_BYTES)
    assert found.requests_per_s == pytest.approx(7.0)
    assert found.flows == {("m", "m"): pytest.approx(7.0)}
    assert found.bottleneck == Limit("mixed", "m/0")


def test_a_mixed_replica_fills_what_a_pure_one_leaves() -> None:
    """A prefill replica of 20/s beside a mixed one that prefills 30/s or decodes 10/s: it decodes for both."""
    mixed = _mixed("m", 30.0, 10.0, 7.5)
    found = best_flow([_replica("p", "prefill", 20.0), mixed], _cluster(["p", "m"]), LAYER_BYTES)
    assert found.requests_per_s == pytest.approx(10.0)
    assert found.prefill["p"] == pytest.approx(10.0)
    assert found.decode["m"] == pytest.approx(10.0)


def test_aligned_cuts_hand_over_inside_their_hosts() -> None:
    split = (_stage("a", 0, 5), _stage("b", 5, 8))
    assert handoff_bytes(split, split, LAYER_BYTES) == {}
    other = (_stage("a", 0, 3), _stage("b", 3, 8))
    assert handoff_bytes(split, other, LAYER_BYTES) == {("a", "b"): 2 * LAYER_BYTES}
    assert handoff_bytes(other, split, LAYER_BYTES) == {("b", "a"): 2 * LAYER_BYTES}
    assert handoff_bytes(split, (_stage("c"),), LAYER_BYTES) == {
        ("a", "c"): 5 * LAYER_BYTES,
        ("b", "c"): 3 * LAYER_BYTES,
    }


def test_replicas_without_a_link_hand_nothing_over() -> None:
    cluster = Cluster(nodes=_cluster(["p", "d"]).nodes, links=(_link("d", "p", 1e9),))
    found = best_flow([_replica("p", "prefill", 5.0), _replica("d", "decode", 5.0)], cluster, LAYER_BYTES)
    assert (found.requests_per_s, found.bottleneck, dict(found.flows)) == (0.0, None, {})


@st.composite
def _cases(draw: st.DrawFn) -> tuple[list[ReplicaRates], Cluster]:
    names = [f"n{at}" for at in range(draw(st.integers(2, 5)))]
    replicas = []
    for name in names:
        role = draw(st.sampled_from(["prefill", "decode", "mixed"]))
        rate, other = draw(_RATES), draw(_RATES)
        stages = (_stage(name, 0, 4), _stage(draw(st.sampled_from(names)), 4, 8))
        if role == "mixed":
            replicas.append(_mixed(name, rate, other, min(rate, other) * draw(st.floats(0.3, 0.9)), *stages))
        else:
            replicas.append(_replica(name, role, rate, *stages))
    speed = N_LAYERS * LAYER_BYTES
    cluster = _cluster(
        names,
        nic=draw(st.floats(0.5, 60)) * speed,
        link=draw(st.floats(0.5, 60)) * speed,
        sites={names[0]: "there"},
    )
    lines = tuple(
        SiteLink(src=src, dst=dst, rtt_s=0.0, bytes_per_s=draw(st.floats(0.5, 60)) * speed)
        for src, dst in (("here", "there"), ("there", "here"))
    )
    return replicas, msgspec.structs.replace(cluster, site_links=lines)


def _raised(
    replicas: list[ReplicaRates], cluster: Cluster, limit: Limit, factor: float
) -> tuple[list[ReplicaRates], Cluster]:
    """The same with one limit raised."""
    if limit.kind in ("nic_out", "nic_in"):
        field = "out_bytes_per_s" if limit.kind == "nic_out" else "in_bytes_per_s"

        def faster(node: Node) -> Node:
            assert node.nic is not None
            nic = msgspec.structs.replace(node.nic, **{field: getattr(node.nic, field) * factor})
            return msgspec.structs.replace(node, nic=nic) if node.id == limit.name else node

        return replicas, msgspec.structs.replace(cluster, nodes=tuple(faster(node) for node in cluster.nodes))
    if limit.kind in ("line", "link"):
        table = "site_links" if limit.kind == "line" else "links"
        rows = [
            msgspec.structs.replace(row, bytes_per_s=row.bytes_per_s * factor)
            if f"{row.src} to {row.dst}" == limit.name
            else row
            for row in getattr(cluster, table)
        ]
        return replicas, msgspec.structs.replace(cluster, **{table: tuple(rows)})

    def better(replica: ReplicaRates) -> ReplicaRates:
        if replica.name != limit.name.split("/")[0]:
            return replica
        slower = 1 / factor if limit.kind == "mixed" else 1.0
        return ReplicaRates(
            name=replica.name,
            role=replica.role,
            prefill=replica.prefill * (factor if limit.kind == "prefill" else 1.0),
            decode=replica.decode * (factor if limit.kind == "decode" else 1.0),
            stages=replica.stages,
            uses=tuple((prompt * slower, output * slower) for prompt, output in replica.uses),
        )

    return [better(replica) for replica in replicas], cluster


@settings(deadline=None, max_examples=30)
@given(_cases())
def test_flows_keep_every_limit_and_conserve(case: tuple[list[ReplicaRates], Cluster]) -> None:
    replicas, cluster = case
    found = best_flow(replicas, cluster, LAYER_BYTES)
    by_name = {replica.name: replica for replica in replicas}
    assert sum(found.flows.values()) == pytest.approx(found.requests_per_s)
    for name, replica in by_name.items():
        x, y = found.prefill[name], found.decode[name]
        assert x <= replica.prefill * (1 + 1e-6) + 1e-9
        assert y <= replica.decode * (1 + 1e-6) + 1e-9
        assert all(x * prompt + y * output <= 1 + 1e-6 for prompt, output in replica.uses)
    sent = dict.fromkeys(by_name, 0.0)
    for (p, d), rate in found.flows.items():
        ways = handoff_bytes(by_name[p].stages, by_name[d].stages, LAYER_BYTES)
        for (src, _), n_bytes in ways.items():
            sent[src] += rate * n_bytes
    for node in cluster.nodes:
        assert node.nic is not None
        assert sent[node.id] <= node.nic.out_bytes_per_s * (1 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(_cases())
def test_shares_add_up_and_the_bottleneck_is_one(case: tuple[list[ReplicaRates], Cluster]) -> None:
    replicas, cluster = case
    found = best_flow(replicas, cluster, LAYER_BYTES)
    if found.requests_per_s == 0:
        return
    assert sum(found.shares.values()) == pytest.approx(1.0, abs=1e-6)
    limit = found.bottleneck
    assert limit is not None
    lowered = best_flow(*_raised(replicas, cluster, limit, 0.9), LAYER_BYTES).requests_per_s
    assert lowered < found.requests_per_s * (1 - 1e-6)


@settings(deadline=None, max_examples=30)
@given(case=_cases(), data=st.data())
def test_raising_what_decides_nothing_changes_nothing(
    case: tuple[list[ReplicaRates], Cluster], data: st.DataObject
) -> None:
    replicas, cluster = case
    found = best_flow(replicas, cluster, LAYER_BYTES)
    every = [Limit("nic_out", node.id) for node in cluster.nodes] + [
        Limit("nic_in", node.id) for node in cluster.nodes
    ]
    every += [Limit("link", f"{link.src} to {link.dst}") for link in cluster.links]
    idle = [limit for limit in every if limit not in found.shares]
    if not idle or found.requests_per_s == 0:
        return
    raised = best_flow(*_raised(replicas, cluster, data.draw(st.sampled_from(idle)), 2.0), LAYER_BYTES)
    assert raised.requests_per_s == pytest.approx(found.requests_per_s, rel=1e-6)


LLAMA_2_70B = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
)


def _plan_replica(name: str, role: Role, *stages: Stage) -> Replica:
    return Replica(
        id=name, role=role, stages=stages, block_tokens=16, predicted_tokens_per_s=0.0, predicted_batch=1
    )


def _plan() -> list[Replica]:
    half, whole = (0, 1, 2, 3), tuple(range(8))
    return [
        _plan_replica("h100", "mixed", _stage("h100", 0, 80, half)),
        _plan_replica("a100", "prefill", _stage("a100", 0, 80, half)),
        _plan_replica("a6000", "decode", _stage("a6000-0", 0, 80, whole)),
    ]


def _capacities(workload: Workload) -> Capacities:
    return Capacities(CostModel(LLAMA_2_70B, "float16", 16, StepLimits()), workload)


def test_a_plan_over_a_fleet_is_scored_by_its_replicas_and_their_network() -> None:
    fleet = read_fleet((FLEETS / "mixed-64.toml").read_text(encoding="utf-8"))
    cluster = cluster_of(fleet, "float16")
    plan = [
        msgspec.structs.replace(
            replica,
            stages=tuple(
                msgspec.structs.replace(stage, node=f"{stage.node}-0")
                if stage.node in ("h100", "a100")
                else stage
                for stage in replica.stages
            ),
        )
        for replica in _plan()
    ]
    capacities = _capacities(Workload.of(CLASSES["HPHD"]))
    found = score_replicas(plan, cluster, capacities)
    rates = {replica.id: replica_rates(replica, cluster, capacities) for replica in plan}
    assert rates["a100"].decode == rates["a6000"].prefill == 0.0
    both = 1 / max(prompt + output for prompt, output in rates["h100"].uses)
    assert 0 < both < min(rates["h100"].prefill, rates["h100"].decode)
    assert both < found.requests_per_s <= rates["h100"].decode + rates["a6000"].decode
    assert set(found.flows) <= {("h100", "h100"), ("h100", "a6000"), ("a100", "a6000"), ("a100", "h100")}
    alone = score_replicas(plan[:1], cluster, capacities)
    assert alone.requests_per_s == pytest.approx(both)


def test_a_mixed_replica_that_cannot_do_both_in_time_does_prompts_alone() -> None:
    """Long prompts, short outputs and a tight limit: a step with its share of a prompt takes too long."""
    cluster = cluster_of(read_fleet((FLEETS / "hexgen2-h100.toml").read_text(encoding="utf-8")), "float16")
    stages = (_stage("h100", 0, 80, tuple(range(8))),)
    workload = Workload(prompt_tokens=4000, output_tokens=2, slo=Slo(tpot_s=0.03))
    rates = {
        role: replica_rates(_plan_replica("r", role, *stages), cluster, _capacities(workload))
        for role in get_args(Role)
    }
    assert rates["decode"].decode > 0
    assert (rates["mixed"].decode, rates["mixed"].uses) == (0.0, ())
    assert rates["mixed"].prefill == rates["prefill"].prefill > 0
    found = score_replicas([_plan_replica("r", "mixed", *stages)], cluster, _capacities(workload))
    assert found.requests_per_s == 0.0
