"""check_plan on groups of devices, roles and flows between replicas: each single fault is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hexmesh.cluster import Cluster, Device, Fabric, Link, Nic, Node, Role, SiteLink
from hexmesh.cost import CostModel, StepLimits
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Flow, Plan, Replica, Stage
from hexmesh.schedule.check import check_plan
from hexmesh.workload import Workload

GIB = 2**30
WORKLOAD = Workload(prompt_tokens=512, output_tokens=128)
SPEC = model_spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
)
COSTS = CostModel(SPEC, "bfloat16", 16, StepLimits())
KV_BYTES = 512 * SPEC.n_layers * SPEC.kv_values_per_token * 2
"""Of one prompt in all layers."""
RATE = 10.0
"""Requests per second of the plan."""


def node(name: str, site: str, n_devices: int = 2, **fields: Any) -> Node:
    devices = tuple(
        Device(index=at, kind="cuda", name="gpu", budget_bytes=GIB, flops_per_s=1e14, bytes_per_s=1e12)
        for at in range(n_devices)
    )
    fabric = Fabric(kind="nvlink4", bytes_per_s=1e11, step_s=1e-6)
    rate = 4 * RATE * KV_BYTES
    nic = Nic(out_bytes_per_s=rate, in_bytes_per_s=rate)
    fields = {"fabric": fabric, "nic": nic, "roles": ("mixed", "prefill", "decode")} | fields
    return Node(id=name, name=name, site=site, devices=devices, **fields)


def cluster(**changed: dict[str, Any]) -> Cluster:
    """Prefill at one site, decode at another, a mixed replica at each; fields of single nodes may be changed."""
    sites = {"p": "east", "m": "east", "d": "west"}
    nodes = tuple(node(name, site, **changed.get(name, {})) for name, site in sites.items())
    links = tuple(
        Link(src=a, dst=b, rtt_p50_s=1e-3, rtt_p95_s=1e-3, bytes_per_s=4 * RATE * KV_BYTES, lower_bound=False)
        for a in sites
        for b in sites
        if a != b
    )
    lines = tuple(
        SiteLink(src=a, dst=b, rtt_s=1e-3, bytes_per_s=2 * RATE * KV_BYTES)
        for a, b in (("east", "west"), ("west", "east"))
    )
    return Cluster(nodes=nodes, links=links, site_links=lines)


def replica(name: str, role: Role, where: str, share: float, tp: int = 2) -> Replica:
    stage = Stage(
        node=where,
        devices=tuple(range(tp)),
        start=0,
        stop=8,
        kv_blocks=100,
        needed_bytes=COSTS.needed_bytes(0, 8, 100, "cuda", tp),
        room_bytes=GIB,
        predicted_step_s=1e-3,
    )
    return Replica(
        id=name,
        role=role,
        stages=(stage,),
        block_tokens=16,
        predicted_tokens_per_s=share * RATE * WORKLOAD.output_tokens,
        predicted_batch=8,
    )


def plan(**fields: Any) -> Plan:
    """p prefills for d; m serves a quarter on its own, and hands a quarter to d."""
    return msgspec.structs.replace(
        Plan(
            model_id="id",
            model_name="name",
            n_layers=8,
            dtype="bfloat16",
            max_model_tokens=1024,
            hosts={"p": 1, "m": 2, "d": 3},
            replicas=(
                replica("r0", "prefill", "p", 0.0),
                replica("r1", "decode", "d", 0.75),
                replica("r2", "mixed", "m", 0.25),
            ),
            flows=(
                Flow(src="r0", dst="r1", share=0.5),
                Flow(src="r2", dst="r1", share=0.25),
                Flow(src="r2", dst="r2", share=0.25),
            ),
        ),
        **fields,
    )


def flows(*shares: tuple[str, str, float]) -> dict[str, tuple[Flow, ...]]:
    return {"flows": tuple(Flow(src=src, dst=dst, share=share) for src, dst, share in shares)}


def test_a_sound_plan_has_no_faults() -> None:
    assert check_plan(plan(), cluster(), SPEC, WORKLOAD) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"p": {"fabric": None}},
            "layers [0, 8) on p: on 2 devices, and no way between them is known",
        ),
        ({"p": {"tp_degrees": (1, 4)}}, "layers [0, 8) on p: on 2 devices, the node offers groups of 1, 4"),
        ({"p": {"roles": ("decode",)}}, "layers [0, 8) on p: for prefill, the node does decode"),
        ({"m": {"roles": ("prefill", "decode")}}, "layers [0, 8) on m: for mixed, the node does prefill and"),
        (
            {"p": {"nic": Nic(out_bytes_per_s=0.49 * RATE * KV_BYTES, in_bytes_per_s=1e15)}},
            "what p sends: ",
        ),
        (
            {"d": {"nic": Nic(out_bytes_per_s=1e15, in_bytes_per_s=0.74 * RATE * KV_BYTES)}},
            "what d receives: ",
        ),
    ],
)
def test_what_a_host_does_not_do_is_named(changed: dict[str, dict[str, Any]], said: str) -> None:
    fault, *_ = check_plan(plan(), cluster(**changed), SPEC, WORKLOAD)
    assert fault.startswith(said), fault


def test_heads_that_do_not_split_are_named() -> None:
    three = tuple(replica(one.id, one.role, one.stages[0].node, 0.25, tp=3) for one in plan().replicas[2:])
    faults = check_plan(plan(replicas=three, **flows(("r2", "r2", 1.0))), cluster(m={"n_devices": 3}), SPEC)
    assert faults == ["layers [0, 8) on m: on 3 devices, the model's 8 heads do not split so"]


def test_bytes_of_a_group_are_counted_on_each_of_its_devices() -> None:
    """Two KV heads a device of four: half of the weights and half of the KV."""
    half = COSTS.weight_bytes(0, 8) // 2 + 100 * COSTS.kv_block_bytes(8) // 2

    def with_needed(n_bytes: int) -> Plan:
        (stage,) = plan().replicas[0].stages
        stage = msgspec.structs.replace(stage, needed_bytes=n_bytes)
        first = msgspec.structs.replace(plan().replicas[0], stages=(stage,))
        return plan(replicas=(first, *plan().replicas[1:]))

    assert check_plan(with_needed(half), cluster(), SPEC, WORKLOAD) == []
    assert check_plan(with_needed(half - 1), cluster(), SPEC, WORKLOAD) == [
        f"layers [0, 8) on p: says {half - 1} bytes, weights and KV alone are {half}"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flows(("r2", "r1", 0.75), ("r2", "r2", 0.25)), "r0: prompts are computed there and go to no decode"),
        (flows(("r2", "r2", 1.0)), "r1: decodes, and no prefill replica sends it anything"),
        (flows(("r0", "r1", 1.0)), "r2: no request goes through it"),
        (flows(), "r0: prompts are computed there and go to no decode"),
        (
            flows(("r0", "r1", 0.6), ("r2", "r2", 0.4)),
            "r1: 0.6000 of the requests come in, 0.7500 of the tokens go out",
        ),
        (flows(("r0", "r0", 0.5), ("r2", "r1", 0.5)), "flow from r0 to r0: no such prefill and decode"),
        (flows(("r1", "r2", 1.0)), "flow from r1 to r2: no such prefill and decode"),
    ],
)
def test_flows_that_lose_something_are_named(change: dict[str, Any], said: str) -> None:
    faults = check_plan(plan(**change), cluster(), SPEC, WORKLOAD)
    assert any(fault.startswith(said) for fault in faults), faults


def test_a_host_of_mixed_replicas_alone_hands_nothing_over() -> None:
    faults = check_plan(plan(), cluster(m={"roles": ("mixed",)}), SPEC, WORKLOAD)
    assert faults == ["flow from r2 to r1: m does no prefill"]
    alone = (replica("r2", "mixed", "m", 1.0),)
    own = plan(replicas=alone, **flows(("r2", "r2", 1.0)))
    assert check_plan(own, cluster(m={"roles": ("mixed",)}), SPEC, WORKLOAD) == []


def _slower(what: str, src: str, dst: str, rate: float) -> Callable[[Cluster], Cluster]:
    def changed(whole: Cluster) -> Cluster:
        ways = tuple(
            msgspec.structs.replace(way, bytes_per_s=rate) if (way.src, way.dst) == (src, dst) else way
            for way in getattr(whole, what)
        )
        return msgspec.structs.replace(whole, **{what: ways})

    return changed


@pytest.mark.parametrize(
    ("what", "ends", "load", "said"),
    [
        ("links", ("p", "d"), 0.5, "the link from p to d: "),
        ("links", ("m", "d"), 0.25, "the link from m to d: "),
        ("site_links", ("east", "west"), 0.75, "the line from east to west: "),
    ],
)
def test_a_way_that_does_not_carry_the_kv_is_named(
    what: str, ends: tuple[str, str], load: float, said: str
) -> None:
    carried = load * RATE * KV_BYTES
    enough, too_slow = (_slower(what, *ends, carried * factor)(cluster()) for factor in (1.001, 0.999))
    assert check_plan(plan(), enough, SPEC, WORKLOAD) == []
    (fault,) = check_plan(plan(), too_slow, SPEC, WORKLOAD)
    assert fault.startswith(said), fault


def test_a_missing_link_of_a_handoff_is_named() -> None:
    links = tuple(link for link in cluster().links if (link.src, link.dst) != ("p", "d"))
    faults = check_plan(plan(), msgspec.structs.replace(cluster(), links=links), SPEC, WORKLOAD)
    assert faults == ["KV goes from p to d, which no measured link joins"]


def test_a_mixed_replica_of_two_layouts_is_two_replicas_on_one_device() -> None:
    """Which is how a plan would have to say it: weights are loaded once."""
    twice = (*plan().replicas[:2], replica("r2", "prefill", "m", 0.0), replica("r3", "decode", "m", 0.25))
    change = flows(("r0", "r1", 0.5), ("r2", "r1", 0.25), ("r2", "r3", 0.25))
    faults = check_plan(plan(replicas=twice, **change), cluster(), SPEC, WORKLOAD)
    assert "device 0 of m is used 2 times" in faults
