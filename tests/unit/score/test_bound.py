"""No plan beats the fluid bound, and on fleets of good networks plans come near it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.cluster import Cluster, Device, Fabric, Link, Nic, Node, SiteLink
from hexmesh.cost import CostModel, StepLimits
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import Replica, Stage
from hexmesh.score import Capacities, fluid, fluid_bound, score_replicas
from hexmesh.score.pipeline import group_like
from hexmesh.score.shapes import Shapes
from hexmesh.workload import Slo, Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
SMALL = model_spec_from_config(
    {
        "model_type": "gpt_oss",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "vocab_size": 1000,
    }
)
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


def _capacities(spec: ModelSpec, workload: Workload) -> Capacities:
    return Capacities(
        CostModel(spec, "float16", 16, StepLimits(step_tokens=64, context_tokens=256)), workload
    )


def _stage(node: str, devices: tuple[int, ...], start: int, stop: int) -> Stage:
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


@st.composite
def _clusters(draw: st.DrawFn) -> Cluster:
    nodes = []
    kinds = [
        {
            "budget_bytes": draw(st.integers(2**27, 2**31)),
            "flops_per_s": draw(st.floats(1e12, 1e14)),
            "bytes_per_s": draw(st.floats(1e10, 1e12)),
            "row_s": draw(st.sampled_from([0.0, 1e-5])),
        }
        for _ in range(2)
    ]
    for at in range(draw(st.integers(1, 4))):
        chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
        nodes.append(
            Node(
                id=f"n{at}",
                name=f"n{at}",
                site=draw(st.sampled_from(["here", "there"])),
                devices=tuple(
                    Device(index=index, kind="cuda", name="", **figures)
                    for index, figures in enumerate(chosen)
                ),
                nic=Nic(
                    out_bytes_per_s=draw(st.floats(1e6, 1e10)), in_bytes_per_s=draw(st.floats(1e6, 1e10))
                ),
                fabric=Fabric(kind="", bytes_per_s=draw(st.floats(1e9, 1e11)), step_s=1e-6),
                launch_s=draw(st.sampled_from([0.0, 2e-5])),
            )
        )
    links = tuple(
        Link(src=a.id, dst=b.id, rtt_p50_s=2e-4, rtt_p95_s=2e-4, bytes_per_s=1e10, lower_bound=False)
        for a in nodes
        for b in nodes
        if a is not b
    )
    lines = tuple(
        SiteLink(src=src, dst=dst, rtt_s=0.0, bytes_per_s=draw(st.floats(1e6, 1e10)))
        for src, dst in (("here", "there"), ("there", "here"))
    )
    return Cluster(nodes=tuple(nodes), links=links, site_links=lines)


@st.composite
def _plans(draw: st.DrawFn, cluster: Cluster) -> list[Replica]:
    """Devices grouped, groups dealt out to replicas, layers cut: anything, good or bad."""
    groups = []
    for node in cluster.nodes:
        left = [device.index for device in node.devices]
        while left:
            tp = draw(st.sampled_from([tp for tp in (1, 2, 4) if tp <= len(left)]))
            groups.append((node.id, tuple(left[:tp])))
            left = left[tp:]
    groups = draw(st.permutations(groups))
    replicas = []
    while groups:
        n_stages = draw(st.integers(1, min(len(groups), SMALL.n_layers)))
        own, groups = groups[:n_stages], groups[n_stages:]
        cuts = draw(st.sets(st.integers(1, SMALL.n_layers - 1), min_size=n_stages - 1, max_size=n_stages - 1))
        bounds = [0, *sorted(cuts), SMALL.n_layers]
        stages = tuple(
            _stage(node, devices, start, stop)
            for (node, devices), start, stop in zip(own, bounds[:-1], bounds[1:], strict=True)
        )
        replicas.append(
            Replica(
                id=f"r{len(replicas)}",
                role=draw(st.sampled_from(["mixed", "prefill", "decode"])),
                stages=stages,
                block_tokens=16,
                predicted_tokens_per_s=0.0,
                predicted_batch=1,
            )
        )
    return replicas


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_no_plan_beats_the_bound(data: st.DataObject) -> None:
    cluster = data.draw(_clusters())
    plan = data.draw(_plans(cluster))
    capacities = _capacities(SMALL, Workload(prompt_tokens=300, output_tokens=60))
    bound = fluid_bound(cluster, capacities)
    assert score_replicas(plan, cluster, capacities).requests_per_s <= bound * (1 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(cluster=_clusters(), factor=st.floats(1.0, 5.0), data=st.data())
def test_the_bound_rises_with_every_part(cluster: Cluster, factor: float, data: st.DataObject) -> None:
    capacities = _capacities(SMALL, Workload(prompt_tokens=300, output_tokens=60))
    at = data.draw(st.integers(0, len(cluster.nodes) - 1))
    node = cluster.nodes[at]
    assert node.nic is not None
    device = node.devices[0]
    better = msgspec.structs.replace(device, flops_per_s=device.flops_per_s * factor)
    nic = Nic(
        out_bytes_per_s=node.nic.out_bytes_per_s * factor, in_bytes_per_s=node.nic.in_bytes_per_s * factor
    )
    nodes = list(cluster.nodes)
    nodes[at] = msgspec.structs.replace(node, devices=(better, *node.devices[1:]), nic=nic)
    raised = msgspec.structs.replace(cluster, nodes=tuple(nodes))
    assert fluid_bound(raised, capacities) >= fluid_bound(cluster, capacities) * (1 - 1e-6)


@settings(deadline=None, max_examples=30)
@given(cluster=_clusters(), data=st.data())
def test_one_more_device_never_lowers_the_bound(cluster: Cluster, data: st.DataObject) -> None:
    capacities = _capacities(SMALL, Workload(prompt_tokens=300, output_tokens=60))
    at = data.draw(st.integers(0, len(cluster.nodes) - 1))
    kind = data.draw(st.sampled_from([device for node in cluster.nodes for device in node.devices]))
    nodes = list(cluster.nodes)
    added = msgspec.structs.replace(kind, index=len(nodes[at].devices))
    nodes[at] = msgspec.structs.replace(nodes[at], devices=(*nodes[at].devices, added))
    larger = msgspec.structs.replace(cluster, nodes=tuple(nodes))
    assert fluid_bound(larger, capacities) >= fluid_bound(cluster, capacities) * (1 - 3e-6)


def _alike(n_hosts: int, n_devices: int, budget_bytes: int) -> Cluster:
    """Hosts of like devices without NICs."""
    device = Device(
        index=0, kind="cuda", name="", budget_bytes=budget_bytes, flops_per_s=1e15, bytes_per_s=1e12
    )
    return Cluster(
        nodes=tuple(
            Node(
                id=f"n{at}",
                name=f"n{at}",
                site="here",
                devices=tuple(msgspec.structs.replace(device, index=index) for index in range(n_devices)),
                launch_s=0.0,
                step_s=0.0,
            )
            for at in range(n_hosts)
        ),
        links=(),
    )


def test_pipelines_share_the_room_that_weights_leave() -> None:
    """Two stages are busy with two micro-batches, each half of the sequences that have room beside forty layers."""
    workload = Workload(prompt_tokens=1, output_tokens=1000)
    capacities = _capacities(LLAMA_2_70B, workload)
    costs, model = capacities.costs, capacities.model
    cluster = _alike(1, 2, costs.fixed_bytes(20, 60) + 64 * 501 * costs.block_bytes(40, "cuda") // 16)
    [device, _] = cluster.nodes[0].devices
    group = group_like(cluster.nodes[0], device, 1)
    step_s = 40 * model.decode_layer_s(group, LLAMA_2_70B.layers[0], 32, workload.mean_context)
    prompt_s = 40 * model.prefill_layer_s(group, LLAMA_2_70B.layers[0], 1)
    assert fluid_bound(cluster, capacities) == pytest.approx(1 / (1000 / 32 * step_s + prompt_s), rel=1e-3)


def test_a_model_that_all_devices_together_cannot_hold_is_not_served() -> None:
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=512, output_tokens=128))
    weights = capacities.costs.weight_bytes(0, 80)
    assert fluid_bound(_alike(1, 8, weights // 8), capacities) == 0.0
    assert fluid_bound(_alike(1, 8, weights // 7), capacities) > 0.0


def test_hosts_that_are_alike_are_worth_the_same_together_as_apart() -> None:
    cluster = _cluster("mixed-64")
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=1104, output_tokens=398))
    together = tuple(msgspec.structs.replace(node, step_s=0.0) for node in cluster.nodes)
    apart = tuple(msgspec.structs.replace(node, step_s=at * 1e-15) for at, node in enumerate(cluster.nodes))
    assert fluid_bound(msgspec.structs.replace(cluster, nodes=apart), capacities) == pytest.approx(
        fluid_bound(msgspec.structs.replace(cluster, nodes=together), capacities), rel=3e-6
    )


def test_the_bound_holds_whenever_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _cluster("hexgen2-4")
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=1104, output_tokens=398))
    least = fluid_bound(cluster, capacities)
    monkeypatch.setattr(fluid, "_MOST_ROUNDS", 1)
    assert fluid_bound(cluster, capacities) > least
    monkeypatch.setattr(fluid, "_MOST_ROUNDS", 3)
    assert fluid_bound(cluster, capacities) >= least


def test_shapes_know_the_seconds_of_a_step() -> None:
    """All batches at once are what `Roofline` says of each."""
    capacities = _capacities(SMALL, Workload(prompt_tokens=300, output_tokens=60))
    node = _cluster("mixed-24").nodes[0]
    group = group_like(node, msgspec.structs.replace(node.devices[0], budget_bytes=10**8), 2)
    shapes = Shapes(capacities, [group], 3)
    [stages] = shapes.stages
    assert len(set(shapes.batch)) > 3
    for at, batch in enumerate(shapes.batch):
        layer_s = min(
            capacities.model.decode_layer_s(group, layer, float(batch), capacities.workload.mean_context)
            for layer in SMALL.layers
        )
        n_layers = stages.layers[at]
        step_s = n_layers * layer_s + group.step_s
        assert stages.outputs[at] == pytest.approx(n_layers / SMALL.n_layers * batch / step_s / 60)


def _cluster(name: str) -> Cluster:
    return cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8")), "float16")


def _one_pipeline_a_host(cluster: Cluster) -> list[Replica]:
    """A mixed replica a host, one stage a device, layers dealt out evenly."""
    replicas = []
    for node in cluster.nodes:
        n = len(node.devices)
        stages = tuple(_stage(node.id, (at,), 80 * at // n, 80 * (at + 1) // n) for at in range(n))
        replicas.append(
            Replica(
                id=node.id,
                role="mixed",
                stages=stages,
                block_tokens=16,
                predicted_tokens_per_s=0.0,
                predicted_batch=1,
            )
        )
    return replicas


def test_on_a_data_centre_a_plain_plan_is_within_a_fifth_of_the_bound() -> None:
    cluster = _cluster("mixed-64")
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=512, output_tokens=128))
    bound = fluid_bound(cluster, capacities)
    found = score_replicas(_one_pipeline_a_host(cluster), cluster, capacities).requests_per_s
    assert 0.8 * bound < found <= bound


def test_hosts_that_may_do_one_phase_alone_lower_the_bound() -> None:
    cluster = _cluster("mixed-24")
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=512, output_tokens=128))
    decoding = msgspec.structs.replace(
        cluster, nodes=tuple(msgspec.structs.replace(node, roles=("decode",)) for node in cluster.nodes)
    )
    assert fluid_bound(decoding, capacities) == pytest.approx(0.0, abs=1e-9)
    h100, *others = cluster.nodes
    partly = msgspec.structs.replace(
        cluster, nodes=(msgspec.structs.replace(h100, roles=("decode",)), *others)
    )
    assert 0 < fluid_bound(partly, capacities) < fluid_bound(cluster, capacities)


def test_slow_nics_lower_the_bound_where_hosts_must_specialise() -> None:
    """Two hosts, one of which computes and one of which has the bandwidth: what passes between them decides."""
    cluster = _cluster("mixed-24")
    nodes = tuple(
        msgspec.structs.replace(node, roles=("prefill",) if node.id == "a100" else ("decode",))
        for node in cluster.nodes
    )
    capacities = _capacities(LLAMA_2_70B, Workload(prompt_tokens=512, output_tokens=128, slo=Slo()))
    kv = 160 * 2**20
    for gbit in (1, 10):
        nic = Nic(out_bytes_per_s=gbit * 1.25e8, in_bytes_per_s=1e12)
        slow = Cluster(
            nodes=tuple(msgspec.structs.replace(node, nic=nic) for node in nodes), links=cluster.links
        )
        assert fluid_bound(slow, capacities) == pytest.approx(gbit * 1.25e8 / kv)
