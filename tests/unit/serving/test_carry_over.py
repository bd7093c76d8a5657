"""Which replicas go on when the plan changes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hexmesh.plan import Plan, Replica, Stage
from hexmesh.serving.carry_over import carried_over

HOSTS = {"a": 1, "b": 2, "c": 3}


def replica(name: str, nodes: str, **changes: Any) -> Replica:
    stages = tuple(
        Stage(
            node=node,
            devices=(0,),
            start=4 * index,
            stop=4 * index + 4,
            kv_blocks=64,
            needed_bytes=1,
            room_bytes=2,
            predicted_step_s=0.1,
        )
        for index, node in enumerate(nodes)
    )
    fields: dict[str, Any] = {
        "id": name,
        "role": "mixed",
        "stages": stages,
        "block_tokens": 16,
        "predicted_tokens_per_s": 1.0,
        "predicted_batch": 1,
    }
    return Replica(**{**fields, **changes})


def plan(*replicas: Replica, hosts: dict[str, int] | None = None, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "model_id": "m",
        "model_name": "m",
        "n_layers": 8,
        "dtype": "float32",
        "max_model_tokens": 512,
        "hosts": HOSTS if hosts is None else hosts,
        "replicas": replicas,
    }
    return Plan(**{**fields, **changes})


OLD = plan(replica("r0", "ab"), replica("r1", "ca"))


def test_ids_predictions_and_other_hosts_do_not_count() -> None:
    new = plan(
        replica("r0", "ca", predicted_tokens_per_s=9.0, predicted_batch=4),
        replica("r1", "ab"),
        hosts={**HOSTS, "d": 4},
    )
    assert carried_over(OLD, new) == {"r0": "r1", "r1": "r0"}


def test_a_host_that_restarted_takes_its_replicas_with_it() -> None:
    new = plan(*OLD.replicas, hosts={**HOSTS, "b": 22})
    assert carried_over(OLD, new) == {"r1": "r1"}


STAGE = replica("r0", "ab").stages[1]


@pytest.mark.parametrize(
    "change",
    [{"devices": (1,)}, {"start": 3}, {"kv_blocks": 63}, {"node": "c"}],
    ids=lambda change: next(iter(change)),
)
def test_a_stage_that_differs_ends_the_replica(change: dict[str, Any]) -> None:
    stages = (replica("r0", "ab").stages[0], msgspec.structs.replace(STAGE, **change))
    assert carried_over(OLD, plan(replica("r0", "ab", stages=stages))) == {}


@pytest.mark.parametrize("change", [{"block_tokens": 8}, {"role": "decode"}])
def test_so_does_another_block_size_or_role(change: dict[str, Any]) -> None:
    assert carried_over(OLD, plan(replica("r0", "ab", **change))) == {}


@pytest.mark.parametrize("change", [{"model_id": "other"}, {"dtype": "bfloat16"}])
def test_and_another_model_or_dtype_ends_all(change: dict[str, Any]) -> None:
    assert carried_over(OLD, plan(*OLD.replicas, **change)) == {}


def test_no_replica_is_carried_over_twice() -> None:
    twins = plan(replica("r0", "ab"), replica("r1", "ab"))
    assert carried_over(OLD, twins) == {"r0": "r0"}
    assert carried_over(twins, twins) == {"r0": "r0", "r1": "r1"}
