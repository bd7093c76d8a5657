"""Plans of several replicas: what they are made of, and what a change of the mesh leaves alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import Plan, Replica
from hexmesh.schedule.check import check_plan
from hexmesh.schedule.layout import KEEP_GAIN, KEEP_GAIN_AFTER_LOSS, lay_out
from hexmesh.workload import Workload

MIB = 2**20
SPEC: ModelSpec = model_spec_from_config(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }
)
WORKLOAD = Workload(prompt_tokens=64, output_tokens=64, max_concurrent_sequences=4)
WHOLE, HALF, LITTLE = 64 * MIB, 7 * MIB, MIB // 2


@dataclass
class Mesh:
    """Nodes by name, each with one device of so much memory, all linked."""

    memory: dict[str, int]
    speed: dict[str, float]
    boots: dict[str, int]
    unlinked: set[frozenset[str]] = field(default_factory=set)

    def cluster(self) -> Cluster:
        nodes = tuple(
            Node(
                id=name,
                name=name,
                site="s",
                tp_degrees=(1,),
                roles=("mixed",),
                devices=(
                    Device(
                        index=0,
                        kind="cpu",
                        name="cpu",
                        budget_bytes=budget,
                        flops_per_s=1e9 * self.speed.get(name, 1.0),
                        bytes_per_s=1e9 * self.speed.get(name, 1.0),
                    ),
                ),
            )
            for name, budget in self.memory.items()
        )
        links = tuple(
            Link(src=src, dst=dst, rtt_p50_s=1e-3, rtt_p95_s=1e-3, bytes_per_s=1e8, lower_bound=False)
            for src, dst in itertools.permutations(self.memory, 2)
            if frozenset((src, dst)) not in self.unlinked
        )
        return Cluster(nodes=nodes, links=links)

    def plan(
        self, *, current: Plan | None = None, max_model_tokens: int = 256, keep_gain: float = KEEP_GAIN
    ) -> Plan:
        cluster = self.cluster()
        plan = lay_out(
            cluster,
            SPEC,
            "float32",
            WORKLOAD,
            model_id="id",
            model_name="name",
            hosts={name: self.boots.get(name, 1) for name in self.memory},
            max_model_tokens=max_model_tokens,
            current=current,
            keep_gain=keep_gain,
        )
        assert isinstance(plan, Plan), plan
        assert check_plan(plan, cluster, SPEC, WORKLOAD) == []
        return plan


def mesh(**memory: int) -> Mesh:
    return Mesh(memory, {}, {})


def nodes_of(plan: Plan) -> dict[str, str]:
    return {replica.id: "".join(sorted(stage.node for stage in replica.stages)) for replica in plan.replicas}


def places(replica: Replica) -> list[tuple[str, int, int, int]]:
    """What a host is told to hold, without predictions."""
    return [(stage.node, stage.start, stage.stop, stage.kv_blocks) for stage in replica.stages]


def replica(plan: Plan, replica_id: str) -> Replica:
    return next(replica for replica in plan.replicas if replica.id == replica_id)


def test_nodes_that_each_hold_the_model_get_a_replica_each() -> None:
    plan = mesh(a=WHOLE, b=WHOLE, c=WHOLE).plan()
    assert nodes_of(plan) == {"r0": "a", "r1": "b", "r2": "c"}
    assert [(flow.src, flow.dst) for flow in plan.flows] == [("r0", "r0"), ("r1", "r1"), ("r2", "r2")]
    assert [flow.share for flow in plan.flows] == pytest.approx([1 / 3] * 3)
    assert plan.unused == ()
    assert plan.explanation[0].startswith("3 replicas share the requests, ")


def test_four_halves_make_two_replicas() -> None:
    plan = mesh(a=HALF, b=HALF, c=HALF, d=HALF).plan()
    assert sorted(len(replica.stages) for replica in plan.replicas) == [2, 2]
    assert plan.unused == ()


def test_shares_follow_speed_and_the_fastest_comes_first() -> None:
    slow_and_fast = mesh(a=WHOLE, b=WHOLE)
    slow_and_fast.speed["b"] = 3.0
    plan = slow_and_fast.plan()
    assert nodes_of(plan) == {"r0": "b", "r1": "a"}
    fast, slow = plan.replicas
    assert fast.predicted_tokens_per_s > 1.5 * slow.predicted_tokens_per_s
    assert plan.flows[0].share / plan.flows[1].share == pytest.approx(
        fast.predicted_tokens_per_s / slow.predicted_tokens_per_s
    )


def test_like_goes_with_like() -> None:
    """Two fast halves and two slow ones: mixed, both replicas would be slow."""
    halves = mesh(a=HALF, b=HALF, c=HALF, d=HALF)
    halves.speed.update(a=10.0, d=10.0)
    assert nodes_of(halves.plan()) == {"r0": "ad", "r1": "bc"}


def test_a_device_in_no_replica_says_why() -> None:
    nodes = mesh(a=WHOLE, b=HALF, c=LITTLE)
    nodes.speed["b"] = 0.01
    plan = nodes.plan()
    assert nodes_of(plan) == {"r0": "a"}
    why = {unused.node: unused.reason for unused in plan.unused}
    assert why["b"].startswith("the replicas are no faster with it: ")
    assert why["c"].startswith("too little memory: ")


def test_a_small_replica_does_not_shorten_the_context_of_a_fast_one() -> None:
    """b alone would hold 128 tokens, a holds 4096: the sum of both is not worth it."""
    nodes = mesh(a=WHOLE, b=10 * MIB)
    nodes.speed["a"] = 50.0
    plan = nodes.plan(max_model_tokens=4096)
    assert nodes_of(plan) == {"r0": "a"}
    (unused,) = plan.unused
    assert unused.reason.startswith("too little memory for sequences of 4096 tokens")
    assert len(nodes.plan(max_model_tokens=128).replicas) == 2


def test_context_is_halved_until_more_replicas_can_hold_it() -> None:
    """Each of three holds 1024 tokens but not 4096; together they could, at a third of the rate."""
    plan = mesh(a=26 * MIB, b=26 * MIB, c=26 * MIB).plan(max_model_tokens=4096)
    assert len(plan.replicas) == 3
    assert all(1024 <= replica.kv_blocks * replica.block_tokens < 4096 for replica in plan.replicas)


# --- what changes leave alone ---


def test_a_node_that_joins_gets_its_own_replica_and_moves_nothing() -> None:
    nodes = mesh(b=WHOLE, c=WHOLE)
    before = nodes.plan()
    nodes.memory["a"] = WHOLE
    nodes.speed["a"] = 1.04
    after = nodes.plan(current=before)
    assert nodes_of(after) == {**nodes_of(before), "r2": "a"}
    assert after.explanation[-1] == "2 of the replicas stay where they are"
    assert nodes.plan(current=after).explanation[-1] == "the layout is as before"
    assert [places(replica(after, name)) for name in ("r0", "r1")] == [places(one) for one in before.replicas]


def test_a_lost_node_leaves_other_replicas_where_they_are() -> None:
    nodes = mesh(a=HALF, b=HALF, c=HALF, d=HALF)
    before = nodes.plan()
    lost = replica(before, "r0").stages[0].node
    del nodes.memory[lost]
    after = nodes.plan(current=before, keep_gain=KEEP_GAIN_AFTER_LOSS)
    assert [one.id for one in after.replicas] == ["r1"]
    assert places(after.replicas[0]) == places(replica(before, "r1"))
    assert len(after.unused) == 1


def test_what_is_left_of_a_lost_replica_makes_another() -> None:
    nodes = mesh(a=HALF, b=HALF, c=HALF, d=HALF, e=HALF)
    before = nodes.plan()
    two, three = sorted(before.replicas, key=lambda one: len(one.stages))
    lost, *survivors = (stage.node for stage in three.stages)
    del nodes.memory[lost]
    after = nodes.plan(current=before)
    assert places(replica(after, two.id)) == places(two)
    assert {stage.node for stage in replica(after, three.id).stages} == set(survivors)


def test_a_restarted_node_is_not_counted_as_staying() -> None:
    nodes = mesh(a=HALF, b=HALF, c=HALF, d=HALF)
    before = nodes.plan()
    nodes.speed.update({stage.node: 1.3 for stage in replica(before, "r1").stages})
    nodes.boots[replica(before, "r0").stages[0].node] = 2
    after = nodes.plan(current=before)
    assert places(replica(after, "r1")) == places(replica(before, "r1"))


def test_replicas_are_kept_unless_others_are_clearly_better() -> None:
    nodes = mesh(a=HALF, b=HALF, c=HALF, d=HALF)
    before = nodes.plan()
    one, other = (replica(before, name).stages[0].node for name in ("r0", "r1"))
    nodes.speed.update({one: 1.1, other: 1.1})
    assert [places(one) for one in nodes.plan().replicas] != [places(one) for one in before.replicas]
    kept = nodes.plan(current=before)
    assert [places(one) for one in kept.replicas] == [places(one) for one in before.replicas]
    assert "kept the present layout: another layout would give" in kept.explanation[-1]
    nodes.speed.update({one: 20.0, other: 20.0})
    assert set(nodes_of(nodes.plan(current=before)).values()) != set(nodes_of(before).values())


def test_a_pipeline_gives_way_to_replicas_when_memory_comes() -> None:
    nodes = mesh(a=HALF, b=HALF)
    before = nodes.plan()
    assert nodes_of(before) == {"r0": "ab"}
    nodes.memory.update(a=WHOLE, b=WHOLE)
    assert sorted(nodes_of(nodes.plan(current=before)).values()) == ["a", "b"]


def test_two_replicas_are_better_than_one_that_is_as_fast() -> None:
    """Three of four halves in one pipeline and two replicas of two may differ by little; then two are wanted."""
    nodes = mesh(a=HALF, b=HALF)
    nodes.memory.update(c=HALF, d=HALF)
    plan = nodes.plan()
    assert len(plan.replicas) == 2
    nodes.unlinked = {frozenset("cd"), frozenset("ad"), frozenset("bc")}
    assert sorted(nodes_of(nodes.plan()).values()) == ["ac", "bd"]
