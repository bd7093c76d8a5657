"""Plans that no planner writes are refused before anything acts on them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hexmesh.plan import Flow, Plan, decode_plan, encode_plan, plan_fault
from tests.unit.daemon.fake_mesh import even_plan

GOOD = even_plan(["ab"], 8, "ab")


def with_stage(index: int, **changes: Any) -> Plan:
    (replica,) = GOOD.replicas
    stages = list(replica.stages)
    stages[index] = msgspec.structs.replace(stages[index], **changes)
    return with_replica(stages=tuple(stages))


def with_replica(**changes: Any) -> Plan:
    (replica,) = GOOD.replicas
    return msgspec.structs.replace(GOOD, replicas=(msgspec.structs.replace(replica, **changes),))


def test_a_sound_plan_passes() -> None:
    assert plan_fault(GOOD) is None
    assert plan_fault(msgspec.structs.replace(GOOD, replicas=())) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        encode_plan(GOOD)[:-1],
        encode_plan(GOOD).replace(b"float32", b"float\xd8\xff"),
        encode_plan(GOOD).replace(b"r0", b"\xd8\xff"),
        b"\x91" * 100_000,
    ],
    ids=lambda data: repr(data[:8]),
)
def test_what_is_no_plan_is_a_msgspec_error(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_plan(data)


@pytest.mark.parametrize(
    "plan",
    [
        msgspec.structs.replace(GOOD, replicas=GOOD.replicas * 2),
        msgspec.structs.replace(GOOD, max_model_tokens=0),
        msgspec.structs.replace(GOOD, n_layers=7),
        with_replica(stages=()),
        msgspec.structs.replace(with_replica(stages=()), n_layers=0),
        with_replica(block_tokens=0),
        with_replica(predicted_batch=0),
        msgspec.structs.replace(GOOD, flows=(Flow(src="r0", dst="r0", share=-1.0),)),
        msgspec.structs.replace(GOOD, flows=(Flow(src="r0", dst="r0", share=float("nan")),)),
        with_stage(0, start=1),
        with_stage(0, stop=5),
        with_stage(1, stop=4),
        with_stage(1, kv_blocks=0),
        with_stage(1, devices=()),
        with_stage(1, predicted_step_s=float("inf")),
        with_stage(1, predicted_step_s=float("nan")),
        with_stage(1, predicted_step_s=-1.0),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: Plan) -> None:
    assert plan_fault(plan)
