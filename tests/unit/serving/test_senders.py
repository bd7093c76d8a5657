"""Who may say what in the data plane: everybody for their own part of the plan, nobody for another's."""

from __future__ import annotations

import msgspec
import pytest

from hexmesh.plan import Plan
from hexmesh.serving.senders import Judged, sender_fault
from hexmesh.wire.control import LEAST_BALLOT, Epoch
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    ReplicaIdle,
    ReplicaStats,
    Row,
    SamplingParams,
    Step,
    StepRefused,
    StepResult,
)
from tests.unit.daemon.fake_mesh import even_plan

EPOCH = Epoch(ballot=LEAST_BALLOT, n=1)
PLAN = even_plan(["abc"], 8, "abcd")


def step(stage: int, driver: str = "a") -> Step:
    row = Row(start=0, n_tokens=1, blocks=[0])
    return Step(epoch=EPOCH, cert=None, replica="r0", stage=stage, step=1, driver=driver, rows=[row])


def refused(stage: int) -> StepRefused:
    return StepRefused(epoch=EPOCH, replica="r0", stage=stage, step=1, reason="no")


RESULT = StepResult(epoch=EPOCH, replica="r0", step=1, sampled=[], stage_seconds=[])
STATS = ReplicaStats(
    replica="r0",
    epoch=EPOCH,
    requests_running=0,
    requests_waiting=0,
    kv_blocks_total=1,
    kv_blocks_free=1,
    tokens_per_s=0.0,
    stage_busy=[],
)
GENERATE = Generate(
    sequence="d/request-0",
    attempt=1,
    epoch=EPOCH,
    replica="r0",
    prompt=[1],
    emitted=[],
    max_tokens=1,
    stop_token_ids=[],
    sampling=SamplingParams(),
)
CANCEL = GenerateCancel(sequence="d/request-0", attempt=1)


def may_send(message: Judged, plan: Plan | None = PLAN) -> set[str]:
    return {src for src in "abcd" if sender_fault(src, message, plan) is None}


@pytest.mark.parametrize(
    ("message", "speaker"),
    [
        (step(0), "a"),
        (step(1), "a"),
        (step(2), "b"),
        (RESULT, "c"),
        (refused(0), "a"),
        (refused(1), "b"),
        (refused(2), "c"),
        (STATS, "a"),
        (ReplicaIdle(replica="r0", epoch=EPOCH), "a"),
        (GENERATE, "d"),
        (CANCEL, "d"),
    ],
)
def test_one_node_may_say_it(message: Judged, speaker: str) -> None:
    assert may_send(message) == {speaker}


@pytest.mark.parametrize("message", [step(-1), step(3), step(1, driver="b"), refused(-1), refused(3)])
def test_nobody_may_say_it(message: Judged) -> None:
    assert may_send(message) == set()


def test_a_replica_that_the_plan_lacks_has_no_speaker() -> None:
    assert may_send(msgspec.structs.replace(STATS, replica="r9")) == set()


def test_a_node_whose_name_begins_like_anothers_is_another() -> None:
    assert sender_fault("d", msgspec.structs.replace(CANCEL, sequence="dd/request-0"), PLAN) is not None


def test_of_an_epoch_that_is_not_held_nothing_is_known() -> None:
    assert may_send(RESULT, None) == set("abcd")
