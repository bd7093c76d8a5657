"""When a better plan is worth moving to, and when figures have drifted."""

from __future__ import annotations

import msgspec
import pytest

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.schedule.drift import LASTING_S, Drift
from hexmesh.schedule.moving import HORIZON_S, PAUSE_S, moved_tokens_per_s, why_move


def replica(name: str, node: str, rate: float) -> Replica:
    stage = Stage(
        node=node,
        devices=(0,),
        start=0,
        stop=4,
        kv_blocks=8,
        needed_bytes=0,
        room_bytes=0,
        predicted_step_s=0.0,
    )
    return Replica(
        id=name,
        role="mixed",
        stages=(stage,),
        block_tokens=16,
        predicted_tokens_per_s=rate,
        predicted_batch=1,
    )


def plan(*replicas: Replica) -> Plan:
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=4,
        dtype="float32",
        max_model_tokens=64,
        hosts=dict.fromkeys("abcd", 1),
        replicas=replicas,
    )


NOW = plan(replica("r0", "a", 100.0), replica("r1", "b", 50.0))
MOVED = plan(replica("r0", "a", 100.0), replica("r1", "c", 80.0))


def test_only_what_is_not_in_the_other_plan_moves() -> None:
    assert moved_tokens_per_s(NOW, MOVED) == 50.0
    renamed = plan(replica("x", "b", 1.0), replica("y", "a", 1.0))
    assert moved_tokens_per_s(NOW, renamed) == 0.0
    restarted = msgspec.structs.replace(NOW, hosts={**NOW.hosts, "b": 2})
    assert moved_tokens_per_s(NOW, restarted) == 50.0


def test_a_gain_that_outlasts_its_cost_is_named() -> None:
    """30 tokens/s more, for 50 tokens/s that stand still while weights load."""
    enough_s = 30.0 * HORIZON_S / 50.0 - PAUSE_S
    assert why_move(NOW, MOVED, load_s=0.99 * enough_s, least_gain=1.05) == (
        "another layout gives 180 instead of 150 tokens/s"
    )
    assert why_move(NOW, MOVED, load_s=1.01 * enough_s, least_gain=1.05) is None


def test_a_gain_below_what_measurements_tell_apart_moves_nothing() -> None:
    assert why_move(NOW, MOVED, load_s=0.0, least_gain=1.25) is None
    assert why_move(NOW, NOW, load_s=0.0, least_gain=1.0) is None


def cluster(*, flops: float = 1e11, rtt_s: float = 0.01, link_rate: float = 1e8) -> Cluster:
    device = Device(index=0, kind="cpu", name="c", budget_bytes=1, flops_per_s=flops, bytes_per_s=1e10)
    nodes = tuple(Node(id=name, name=name, site="s", devices=(device,)) for name in "ab")
    link = Link(src="a", dst="b", rtt_p50_s=rtt_s, rtt_p95_s=rtt_s, bytes_per_s=link_rate, lower_bound=False)
    return Cluster(nodes=nodes, links=(link,))


@pytest.mark.parametrize(
    "changed",
    [cluster(flops=0.7e11), cluster(rtt_s=0.02), cluster(link_rate=2e8)],
    ids=["flops", "rtt", "rate"],
)
def test_what_stays_off_is_drift_and_a_busy_moment_is_not(changed: Cluster) -> None:
    drift = Drift()
    drift.planned_with(cluster())
    assert not drift.has_drifted(changed, 0.0)
    assert not drift.has_drifted(cluster(), LASTING_S - 1)
    assert not drift.has_drifted(changed, LASTING_S)
    assert not drift.has_drifted(changed, 2 * LASTING_S - 1)
    assert drift.has_drifted(changed, 2 * LASTING_S)
    drift.planned_with(changed)
    assert not drift.has_drifted(changed, 9 * LASTING_S)


def test_small_changes_and_delays_inside_a_millisecond_are_no_drift() -> None:
    drift = Drift()
    drift.planned_with(cluster(rtt_s=1e-4))
    for at_s in range(0, 600, 10):
        assert not drift.has_drifted(cluster(rtt_s=9e-4, flops=1.2e11), at_s)
