"""Members that answer nonsense or ask for the impossible: it costs them their replica or their request, nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from daemon.stages import MAX_STEPS_WAITING
from hexmesh.wire.data import (
    Generate,
    GenerateFailed,
    Row,
    SampledToken,
    SamplingParams,
    ScoredToken,
    Step,
    StepRefused,
    StepResult,
)
from tests.unit.daemon.fake_mesh import VOCABULARY, FakeMesh, answer_to, fake_mesh

PROMPT = [3, 1, 4, 1, 5]


def no_tokens(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, sampled=[])


def too_many_tokens(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, sampled=[[SampledToken(token_id=1)]] * 9)


def no_such_token(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, sampled=[[SampledToken(token_id=VOCABULARY)]])


def a_negative_token(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, sampled=[[SampledToken(token_id=-1)]])


def two_tokens_for_a_row(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, sampled=[[SampledToken(token_id=1)] * 2])


def a_likely_token_that_does_not_exist(result: StepResult) -> StepResult:
    token = SampledToken(token_id=1, logprob=-1.0, top=[(VOCABULARY, -0.5)])
    return msgspec.structs.replace(result, sampled=[[token]])


def scores_nobody_asked_for(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, scored=[[ScoredToken(token_id=1, logprob=-1.0, rank=1)]])


LIES = [
    *(no_tokens, too_many_tokens, no_such_token, a_negative_token, two_tokens_for_a_row),
    *(a_likely_token_that_does_not_exist, scores_nobody_asked_for),
]


def no_times(result: StepResult) -> StepResult:
    return msgspec.structs.replace(result, stage_seconds=[])


@pytest.mark.parametrize("lie", [*LIES, no_times])
async def test_a_last_stage_that_lies_breaks_its_replica_and_no_request(
    lie: Callable[[StepResult], StepResult],
) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        mesh.nodes["b"].lie = lambda message: lie(message) if isinstance(message, StepResult) else message
        asking = asyncio.create_task(mesh.ask("c", PROMPT, 20))
        await mesh.is_broken.wait()
        await mesh.commit("ac")

        assert await asking == answer_to(PROMPT, 20)
        assert "on b answered nonsense" in mesh.broken[0]


def generate(mesh: FakeMesh, **changes: Any) -> Generate:
    held = mesh.nodes["a"].epochs.committed
    assert held is not None
    fields: dict[str, Any] = {
        "sequence": "c/bad",
        "attempt": 1,
        "epoch": held.epoch,
        "replica": "r0",
        "prompt": PROMPT,
        "emitted": [],
        "max_tokens": 5,
        "stop_token_ids": [],
        "sampling": SamplingParams(),
    }
    return Generate(**fields | changes)


@pytest.mark.parametrize(
    "absurd",
    [
        {"max_tokens": 2**62},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": 256 - len(PROMPT) + 1},
        {"prompt": []},
        {"prompt": [1] * 100_000},
        {"prompt": [2**63]},
        {"prompt": [-1]},
        {"emitted": [1] * 250, "max_tokens": 5},
        {"emitted": [VOCABULARY]},
    ],
)
async def test_an_absurd_request_is_refused_and_others_run_on(absurd: dict[str, Any]) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab", kv_blocks=512)
        failures: list[GenerateFailed] = []
        mesh.lose = lambda message: isinstance(message, GenerateFailed) and failures.append(message) is None
        asking = asyncio.create_task(mesh.ask("b", PROMPT, 20))
        mesh.nodes["c"].send("a", generate(mesh, **absurd))

        assert await asking == answer_to(PROMPT, 20)
        assert [(failure.sequence, failure.retry) for failure in failures] == [("c/bad", False)]
        assert mesh.broken == []


def step(mesh: FakeMesh, n: int, row: Row) -> Step:
    held = mesh.nodes["b"].epochs.committed
    assert held is not None
    return Step(epoch=held.epoch, cert=None, replica="r0", stage=1, step=n, driver="a", rows=[row])


def keep_refusals(mesh: FakeMesh) -> list[StepRefused]:
    refusals: list[StepRefused] = []
    mesh.lose = lambda message: isinstance(message, StepRefused) and refusals.append(message) is None
    return refusals


@pytest.mark.parametrize("n_tokens", [0, -3, 10**6, 2**63])
async def test_a_step_that_no_driver_would_ask_for_never_reaches_the_worker(n_tokens: int) -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        refusals = keep_refusals(mesh)
        mesh.nodes["b"].stages.on_step(step(mesh, 1, Row(start=0, n_tokens=n_tokens, blocks=[0])), b"")
        await mesh.ask("b", PROMPT, 20)

        assert [refusal.step for refusal in refusals] == [1]
        assert "tokens" in refusals[0].reason


async def test_a_flood_of_steps_is_not_queued_without_end() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        node, refusals = mesh.nodes["b"], keep_refusals(mesh)
        node.worker.may_run.clear()
        for n in range(1000):
            node.stages.on_step(step(mesh, 10_000 + n, Row(start=0, n_tokens=1, blocks=[0])), bytes(8))
        await asyncio.sleep(0)
        assert len(refusals) == 1000 - MAX_STEPS_WAITING

        node.worker.may_run.set()
        for _ in range(200):  # more turns of the loop than the steps that wait take
            await asyncio.sleep(0)
        assert node.worker.n_steps == MAX_STEPS_WAITING
        assert await mesh.ask("b", PROMPT, 20) == answer_to(PROMPT, 20)
