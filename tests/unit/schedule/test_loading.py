"""How long getting ready may take, with weights on their way."""

from __future__ import annotations

import pytest

from hexmesh.cluster import Cluster, Link
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.schedule.loading import LOAD_BYTES_PER_S, UNKNOWN_LINK_BYTES_PER_S, load_estimate_s

GB = 10**9


def plan(**needed_bytes: int) -> Plan:
    stages = tuple(
        Stage(
            node=node,
            devices=(0,),
            start=index,
            stop=index + 1,
            kv_blocks=1,
            needed_bytes=n_bytes,
            room_bytes=n_bytes,
            predicted_step_s=0.1,
        )
        for index, (node, n_bytes) in enumerate(needed_bytes.items())
    )
    replica = Replica(
        id="r0", role="mixed", stages=stages, block_tokens=16, predicted_tokens_per_s=1.0, predicted_batch=1
    )
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=len(stages),
        dtype="float32",
        max_model_tokens=16,
        hosts=dict.fromkeys(needed_bytes, 1),
        replicas=(replica,),
    )


def links(**rates: float) -> Cluster:
    """`a_b=5.0`: from a to b."""
    return Cluster(
        nodes=(),
        links=tuple(
            Link(
                src=pair[0],
                dst=pair[2],
                rtt_p50_s=0.01,
                rtt_p95_s=0.01,
                bytes_per_s=rate,
                lower_bound=False,
            )
            for pair, rate in rates.items()
        ),
    )


def test_whoever_has_the_weights_only_reads_them() -> None:
    estimate = load_estimate_s(plan(a=4 * GB, b=2 * GB), links(), {"a", "b"})
    assert estimate == pytest.approx(4 * GB / LOAD_BYTES_PER_S)


def test_whoever_fetches_does_so_over_the_best_link_from_a_holder() -> None:
    cluster = links(a_b=1e6, c_b=5e7, d_b=1e9)
    estimate = load_estimate_s(plan(a=GB, b=2 * GB), cluster, {"a", "c"})
    assert estimate == pytest.approx(2 * GB / LOAD_BYTES_PER_S + 2 * GB / 5e7)


def test_those_who_fetch_share_the_holder() -> None:
    cluster = links(a_b=1e8, a_c=1e8)
    estimate = load_estimate_s(plan(b=GB, c=GB), cluster, {"a"})
    assert estimate == pytest.approx(GB / LOAD_BYTES_PER_S + 2 * GB / 1e8)


def test_an_unmeasured_link_is_taken_for_slow() -> None:
    estimate = load_estimate_s(plan(b=GB), links(), {"a"})
    assert estimate == pytest.approx(GB / LOAD_BYTES_PER_S + GB / UNKNOWN_LINK_BYTES_PER_S)
