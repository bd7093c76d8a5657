"""check_plan accepts a sound plan and names each single fault."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Flow, Plan, Stage, Unused
from hexmesh.schedule.check import check_plan
from hexmesh.schedule.layout import lay_out
from hexmesh.workload import Workload

MIB = 2**20
WORKLOAD = Workload(prompt_tokens=64, output_tokens=64, max_concurrent_sequences=4)
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


def _cluster() -> Cluster:
    device = Device(index=0, kind="cpu", name="cpu", budget_bytes=6 * MIB, flops_per_s=1e11, bytes_per_s=2e10)
    nodes = tuple(
        Node(id=name, name=name, site="s", devices=(device,), tp_degrees=(1,), roles=("mixed",))
        for name in "abc"
    )
    links = tuple(
        Link(src=src, dst=dst, rtt_p50_s=1e-3, rtt_p95_s=1e-3, bytes_per_s=1e8, lower_bound=False)
        for src in "abc"
        for dst in "abc"
        if src != dst
    )
    return Cluster(nodes=nodes, links=links)


def _plan() -> Plan:
    plan = lay_out(
        _cluster(),
        SPEC,
        "float32",
        WORKLOAD,
        model_id="id",
        model_name="name",
        hosts={"a": 1, "b": 2, "c": 3},
        max_model_tokens=256,
        step_tokens=64,
    )
    assert isinstance(plan, Plan)
    assert [stage.node for stage in plan.replicas[0].stages] == ["a", "b"]
    return plan


def _with_stages(change: Callable[[list[Stage]], list[Stage]]) -> Callable[[Plan], Plan]:
    def changed(plan: Plan) -> Plan:
        (replica,) = plan.replicas
        replica = msgspec.structs.replace(replica, stages=tuple(change(list(replica.stages))))
        return msgspec.structs.replace(plan, replicas=(replica,))

    return changed


def _with_second(**fields: object) -> Callable[[Plan], Plan]:
    return _with_stages(lambda stages: [stages[0], msgspec.structs.replace(stages[1], **fields)])


def _with_another(plan: Plan, node: str, stop: int = 8) -> Plan:
    """The plan with a replica of one stage beside its own."""
    (replica,) = plan.replicas
    stage = msgspec.structs.replace(replica.stages[0], node=node, start=0, stop=stop)
    another = msgspec.structs.replace(replica, id="r1", stages=(stage,))
    return msgspec.structs.replace(plan, replicas=(replica, another), unused=())


def _with(**fields: object) -> Callable[[Plan], Plan]:
    return lambda plan: msgspec.structs.replace(plan, **fields)


def test_a_sound_plan_has_no_faults() -> None:
    assert check_plan(_plan(), _cluster(), SPEC, WORKLOAD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with_second(start=5), "r0: layers [5, 8) follow layer 4"),
        (_with_second(stop=7), "r0: stages end at layer 7 of 8"),
        (_with_stages(lambda stages: stages[::-1]), "r0: layers [4, 8) follow layer 0"),
        (_with_stages(lambda stages: []), "r0: no stage"),
        (_with_second(node="a"), "device 0 of a is used 2 times"),
        (_with_second(node="z"), "layers [4, 8) on z: no such node"),
        (_with_second(node="z"), "layers [4, 8) on z: the node is not among the plan's hosts"),
        (_with_second(devices=(1,)), "layers [4, 8) on b: no device 1"),
        (_with_second(devices=()), "layers [4, 8) on b: no device"),
        (
            _with_second(needed_bytes=11 * MIB),
            "layers [4, 8) on b: needs 11534336 bytes, device 0 has 6291456",
        ),
        (_with_second(needed_bytes=1000), "layers [4, 8) on b: says 1000 bytes, weights and KV alone are "),
        (_with_second(kv_blocks=7), "r0: 7 KV blocks do not hold a sequence of 128 tokens"),
        (_with(n_layers=9), "the plan is for 9 layers, the model has 8"),
        (_with(replicas=()), "no replica"),
        (_with(hosts={"a": 1}), "layers [4, 8) on b: the node is not among the plan's hosts"),
        (_with(unused=(Unused(node="a", device=0, reason=""),)), "device 0 of a is both used and unused"),
        (_with(flows=(Flow(src="r0", dst="r0", share=0.5),)), "the flows' shares sum to 0.5"),
        (
            _with(flows=(Flow(src="r0", dst="r1", share=1.0),)),
            "flow from r0 to r1: no such prefill and decode replicas",
        ),
        (
            _with(flows=(Flow(src="r0", dst="r0", share=1.5), Flow(src="r0", dst="r0", share=-0.5))),
            "flow from r0 to r0 has share 1.5",
        ),
        (lambda plan: _with(replicas=plan.replicas * 2)(plan), "two replicas have the same id"),
        (lambda plan: _with_another(plan, "a"), "device 0 of a is used 2 times"),
        (lambda plan: _with_another(plan, "c", stop=7), "r1: stages end at layer 7 of 8"),
    ],
)
def test_a_fault_is_named(change: Callable[[Plan], Plan], said: str) -> None:
    faults = check_plan(change(_plan()), _cluster(), SPEC, WORKLOAD)
    assert any(fault.startswith(said) for fault in faults), faults


@pytest.mark.parametrize("missing", [("a", "b"), ("b", "a")])
def test_a_hop_without_a_measured_link_is_named(missing: tuple[str, str]) -> None:
    cluster = _cluster()
    links = tuple(link for link in cluster.links if (link.src, link.dst) != missing)
    faults = check_plan(_plan(), msgspec.structs.replace(cluster, links=links), SPEC, WORKLOAD)
    assert faults == [f"r0: no measured link from {missing[0]} to {missing[1]}"]


def test_without_a_workload_one_block_is_enough() -> None:
    assert check_plan(_with_second(kv_blocks=1)(_plan()), _cluster(), SPEC) == []
    assert check_plan(_with_second(kv_blocks=0)(_plan()), _cluster(), SPEC) == [
        "r0: 0 KV blocks do not hold a sequence of 1 tokens"
    ]
