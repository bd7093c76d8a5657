"""What hosts say of themselves, and what that does to plans."""

from __future__ import annotations

import pytest

from hexmesh.cluster import Availability, Cluster, Device, Node
from hexmesh.plan import Plan, Replica, Stage, Unused
from hexmesh.schedule.availability import barred_hosts, kept_hosts, why_outdated, with_barred


def plan_over(*stages: str, hosts: str = "abc", barred: str = "") -> Plan:
    """One replica with a stage on each of the nodes `stages`."""
    held = tuple(
        Stage(
            node=node,
            devices=(0,),
            start=at,
            stop=at + 1,
            kv_blocks=1,
            needed_bytes=1,
            room_bytes=1,
            predicted_step_s=1.0,
        )
        for at, node in enumerate(stages)
    )
    replica = Replica(
        id="r0", role="mixed", stages=held, block_tokens=16, predicted_tokens_per_s=1.0, predicted_batch=1
    )
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=len(stages),
        dtype="float32",
        max_model_tokens=16,
        hosts=dict.fromkeys(hosts, 1),
        replicas=(replica,),
        barred=tuple(barred),
    )


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("active", None),
        ("cordoned", None),
        ("drained", "node a drained by the operator"),
        ("leaving", "node a is leaving"),
        ("left", "node a left"),
    ],
)
def test_what_moves_stages_away(said: Availability, why: str | None) -> None:
    assert why_outdated(plan_over("a", "b"), {"a": said, "b": "active", "c": said}) == why


def test_a_host_that_may_be_used_again_is_a_reason_only_where_the_plan_did_without_it() -> None:
    plan = plan_over("a", "b", barred="c")
    assert why_outdated(plan, {"a": "active", "b": "active", "c": "cordoned"}) is None
    assert why_outdated(plan, {"a": "active", "c": "active"}) == "node c uncordoned by the operator"
    assert why_outdated(plan, {"a": "active", "b": "active"}) is None  # nobody knows of c any more
    assert why_outdated(plan_over("a", "b"), {"c": "active"}) is None


def test_only_cordoned_hosts_with_stages_may_be_kept() -> None:
    said: dict[str, Availability] = {"a": "cordoned", "b": "drained", "c": "cordoned"}
    assert barred_hosts(said) == {"a", "b", "c"}
    assert kept_hosts(said, plan_over("a", "b")) == {"a"}
    assert kept_hosts(said, None) == frozenset()


def test_a_plan_says_which_devices_it_did_without_and_why() -> None:
    device = Device(index=3, kind="cpu", name="cpu", budget_bytes=1, flops_per_s=1.0, bytes_per_s=1.0)
    cluster = Cluster(
        nodes=tuple(Node(id=node, name=node, site="s", devices=(device,)) for node in "abc"), links=()
    )
    plan = with_barred(plan_over("a", "b"), {"a": "active", "b": "active", "c": "cordoned"}, {"c"}, cluster)
    assert plan.barred == ("c",)
    assert plan.unused == (Unused(node="c", device=3, reason="cordoned by the operator"),)
    assert plan.idle_hosts() == {"c"}
