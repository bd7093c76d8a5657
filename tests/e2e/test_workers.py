"""Real worker processes: stages loaded, run and lost, and nothing left behind when a daemon dies."""

from __future__ import annotations

import array
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
import torch

from daemon.compute.workers import Worker, Workshop
from hexmesh.errors import Closed, HexmeshError, Internal, InvalidInput, Lost, NotReady, Refused
from hexmesh.wire.data import Row, SamplingParams
from hexmesh.wire.worker import LoadStage, RunStep, StageLoaded, StepDone
from tests.golden.tiny_models import save_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 9, 33, 80, 7, 11]
N_NEW = 5
BLOCKS = [3, 1, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder, and what transformers says after the prompt."""
    folder = tmp_path_factory.mktemp("llama")
    reference = save_tiny_model("llama", folder)
    out = reference.generate(torch.tensor([PROMPT]), max_new_tokens=N_NEW, do_sample=False)
    return folder, out[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def folder(model: tuple[Path, list[int]]) -> Path:
    return model[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workshop() -> AsyncIterator[Workshop]:
    async with Workshop() as shop:
        yield shop


@pytest_asyncio.fixture(loop_scope="module")
async def worker(workshop: Workshop) -> AsyncIterator[Worker]:
    async with asyncio.timeout(60):
        one = await workshop.start_worker("cpu", 1, None)
    yield one
    one.close()
    async with asyncio.timeout(10):
        await one.wait_closed()


def order(folder: Path, stage: str, start: int, stop: int, **changes: Any) -> LoadStage:
    fields: dict[str, Any] = {
        "model_dir": str(folder),
        "model_id": "tiny",
        "dtype": "float32",
        "kv_blocks": 16,
        "block_tokens": 8,
        "pool": stage,
        "budget_bytes": 2**30,
    }
    return LoadStage(stage=stage, start=start, stop=stop, **{**fields, **changes})


def ids(tokens: list[int]) -> bytes:
    return array.array("q", tokens).tobytes()


def step_of(stage: str, number: int, start: int, n_tokens: int) -> RunStep:
    row = Row(start=start, n_tokens=n_tokens, blocks=BLOCKS, sample=SamplingParams())
    return RunStep(stage=stage, step=number, rows=[row], sent_s=time.monotonic())


async def run_step(
    worker: Worker, order: RunStep, payload: bytes | memoryview
) -> tuple[StepDone, memoryview]:
    """A step's answer. Raises what went wrong."""
    answer: asyncio.Future[tuple[StepDone, memoryview]] = asyncio.get_running_loop().create_future()

    def on_end(done: StepDone | HexmeshError, out: memoryview) -> None:
        if isinstance(done, StepDone):
            answer.set_result((done, out))
        else:
            answer.set_exception(done)

    worker.run_step(order, payload, on_end)
    return await answer


async def generate(*stages: tuple[Worker, str]) -> list[int]:
    """Greedy tokens after the prompt, through stages on any workers."""
    tokens = list(PROMPT)
    n_computed = 0
    for number in range(N_NEW):
        new = tokens[n_computed:]
        payload: bytes | memoryview = ids(new)
        for worker, stage in stages:
            done, payload = await run_step(worker, step_of(stage, number, n_computed, len(new)), payload)
        assert done.compute_s > 0
        n_computed = len(tokens)
        tokens.append(done.sampled[0][0].token_id)
    return tokens[len(PROMPT) :]


def needed(loaded: StageLoaded) -> int:
    return loaded.weight_bytes + loaded.pool_bytes


async def test_two_workers_generate_what_transformers_does(
    workshop: Workshop, worker: Worker, model: tuple[Path, list[int]]
) -> None:
    folder, expected = model
    second = await workshop.start_worker("cpu", 1, (min(os.sched_getaffinity(0)),))

    await asyncio.gather(worker.load(order(folder, "front", 0, 2)), second.load(order(folder, "back", 2, 5)))

    assert await generate((worker, "front"), (second, "back")) == expected
    assert psutil.Process(worker.pid).name() == "hexmesh-worker"
    assert len(psutil.Process(second.pid).cpu_affinity()) == 1
    second.close()
    assert await second.wait_closed() == "closed by the daemon"


async def test_steps_in_flight_come_back_to_their_callers(
    worker: Worker, model: tuple[Path, list[int]]
) -> None:
    folder, expected = model
    await worker.load(order(folder, "whole", 0, 5))

    answers = await asyncio.gather(
        *(run_step(worker, step_of("whole", number, 0, len(PROMPT)), ids(PROMPT)) for number in range(20))
    )

    assert [done.step for done, _ in answers] == list(range(20))
    assert {done.sampled[0][0].token_id for done, _ in answers} == {expected[0]}


async def test_a_stage_loads_while_another_runs_and_reuses_its_layers(
    worker: Worker, model: tuple[Path, list[int]]
) -> None:
    folder, expected = model
    await worker.load(order(folder, "old", 0, 5))

    loading = asyncio.create_task(worker.load(order(folder, "new", 0, 4)))
    assert await generate((worker, "old")) == expected
    loaded = await loading

    assert loaded.n_layers_reused == 4
    assert not loaded.pool_deferred


async def test_device_is_measured(worker: Worker) -> None:
    async with asyncio.timeout(30):
        measured = await worker.measure("float32")

    assert measured.flops_per_s > 1e8
    assert measured.bytes_per_s > 1e8
    assert measured.total_bytes > 2**28
    assert measured.flops_spread >= 0
    assert measured.name


async def test_deferred_pool_runs_its_steps_once_there_is_room(
    worker: Worker, model: tuple[Path, list[int]]
) -> None:
    folder, expected = model
    old = await worker.load(order(folder, "old", 0, 5))
    new = await worker.load(order(folder, "new", 0, 5, budget_bytes=needed(old) + 2048))
    assert new.pool_deferred

    waiting = asyncio.create_task(run_step(worker, step_of("new", 0, 0, len(PROMPT)), ids(PROMPT)))
    assert await generate((worker, "old")) == expected
    assert not waiting.done()
    worker.drop("old")

    async with asyncio.timeout(20):
        done, payload = await waiting
    assert (done.sampled[0][0].token_id, len(payload)) == (expected[0], 0)


async def test_failure_of_a_deferred_stage_is_reported(worker: Worker, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    old = await worker.load(order(tmp_path, "old", 0, 3))
    new = await worker.load(order(tmp_path, "new", 3, 5, budget_bytes=needed(old) + 1024))
    assert new.pool_deferred
    failed: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    worker.on_stage_failed(lambda stage, reason: failed.set_result((stage, reason)))
    (tmp_path / "model.safetensors").unlink()

    worker.drop("old")

    async with asyncio.timeout(20):
        stage, reason = await failed
    assert stage == "new"
    assert "model.safetensors" in reason


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"budget_bytes": 1000}, NotReady, "1000 bytes"),
        ({"stop": 9}, InvalidInput, "5 layers"),
        ({"model_dir": "/nowhere"}, InvalidInput, "/nowhere"),
    ],
)
async def test_stages_that_cannot_be_are_refused(
    changes: dict[str, Any], error: type[Exception], named: str, worker: Worker, folder: Path
) -> None:
    stop = changes.pop("stop", 5)

    with pytest.raises(error, match=named):
        await worker.load(order(folder, "bad", 0, stop, **changes))

    await worker.load(order(folder, "good", 0, 5))


async def test_unknown_architecture_is_refused(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv"}))

    with pytest.raises(Refused, match="'rwkv' is not supported"):
        await worker.load(order(tmp_path, "bad", 0, 1))


async def test_corrupt_weights_fail_the_stage_and_not_the_worker(
    worker: Worker, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])

    with pytest.raises(InvalidInput, match=r"model\.safetensors"):
        await worker.load(order(tmp_path, "bad", 0, 2))

    await worker.load(order(folder, "good", 0, 2))


async def test_nonsense_steps_leave_the_stage_alone(worker: Worker, model: tuple[Path, list[int]]) -> None:
    folder, expected = model
    await worker.load(order(folder, "whole", 0, 5))

    outside = RunStep(stage="whole", step=1, rows=[Row(start=0, n_tokens=1, blocks=[99])], sent_s=0.0)
    with pytest.raises(InvalidInput, match="block ids"):
        await run_step(worker, outside, ids([3]))
    with pytest.raises(InvalidInput, match="whole number"):
        await run_step(worker, step_of("whole", 2, 0, 1), b"12345")
    with pytest.raises(InvalidInput, match="not in this worker"):
        await run_step(worker, step_of("none", 3, 0, 1), ids([3]))

    assert await generate((worker, "whole")) == expected


async def test_dropped_stage_fails_what_is_in_flight(worker: Worker, folder: Path) -> None:
    await worker.load(order(folder, "whole", 0, 5))
    running = asyncio.create_task(run_step(worker, step_of("whole", 1, 0, len(PROMPT)), ids(PROMPT)))
    await asyncio.sleep(0)

    worker.drop("whole")

    with pytest.raises(Closed):
        await running


async def test_same_step_twice_is_our_bug(worker: Worker, folder: Path) -> None:
    await worker.load(order(folder, "whole", 0, 5))
    first = asyncio.create_task(run_step(worker, step_of("whole", 1, 0, len(PROMPT)), ids(PROMPT)))
    await asyncio.sleep(0)

    with pytest.raises(Internal):
        await run_step(worker, step_of("whole", 1, 0, len(PROMPT)), ids(PROMPT))
    await first


async def test_killed_worker_is_lost_with_the_reason(workshop: Workshop) -> None:
    worker = await workshop.start_worker("cpu", 1, None)
    reasons: list[str] = []
    worker.on_closed(reasons.append)
    measuring = asyncio.create_task(worker.measure("float32"))
    await asyncio.sleep(0)

    os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(Lost, match="SIGKILL"):
        await measuring
    assert await worker.wait_closed() == "killed by SIGKILL"
    assert reasons == ["killed by SIGKILL"]
    with pytest.raises(Lost):
        await worker.measure("float32")


async def test_hung_worker_can_be_killed(workshop: Workshop) -> None:
    worker = await workshop.start_worker("cpu", 1, None)
    os.kill(worker.pid, signal.SIGSTOP)
    measuring = asyncio.create_task(worker.measure("float32"))
    await asyncio.sleep(0)

    worker.kill("a step took too long")

    with pytest.raises(Lost, match="a step took too long"):
        await measuring
    async with asyncio.timeout(10):
        assert await worker.wait_closed() == "a step took too long"
    assert not psutil.pid_exists(worker.pid)


async def test_worker_that_cannot_start_is_lost(workshop: Workshop) -> None:
    worker = await workshop.start_worker("gpu", 1, None)

    async with asyncio.timeout(10):
        assert await worker.wait_closed() == "the host has no such device"


async def test_workshop_that_died_or_hangs_is_replaced() -> None:
    async with Workshop() as shop, asyncio.timeout(150):
        first = await shop.start_worker("cpu", 1, None)
        parent = psutil.Process(first.pid).parent()
        assert parent is not None
        parent.kill()
        assert await first.wait_closed() == "the workshop died"

        second = await shop.start_worker("cpu", 1, None)

        assert (await second.measure("float32")).flops_per_s > 0
        parent = psutil.Process(second.pid).parent()
        assert parent is not None
        for process in (parent, psutil.Process(second.pid)):
            process.suspend()
        second.kill("a step took too long")
        assert await second.wait_closed() == "a step took too long"
        assert await asyncio.to_thread(all_end, [parent], 10.0)

        third = await shop.start_worker("cpu", 1, None)

        assert (await third.measure("float32")).flops_per_s > 0


DAEMON = """
import asyncio
from daemon.compute.workers import Workshop
from hexmesh.wire.worker import RunStep
async def main():
    async with Workshop() as shop:
        worker = await shop.start_worker("cpu", 1, None)
        answered = asyncio.Event()  # it is up
        worker.run_step(RunStep(stage="none", step=0, rows=[], sent_s=0.0), b"", lambda *_: answered.set())
        await answered.wait()
        print(worker.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_workers_die_with_a_killed_daemon() -> None:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, stdout=asyncio.subprocess.PIPE
    )
    assert daemon.stdout is not None
    worker = psutil.Process(int(await daemon.stdout.readline()))
    shop = worker.parent()
    assert shop is not None
    worker.suspend()  # it cannot see its socket close: the kernel must end it

    daemon.kill()

    await daemon.wait()
    assert await asyncio.to_thread(all_end, [worker, shop], 10.0)


def all_end(processes: list[psutil.Process], within_s: float) -> bool:
    """Whether processes that are not our children end in time."""
    deadline_s = time.monotonic() + within_s
    while any(is_alive(process) for process in processes):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def is_alive(process: psutil.Process) -> bool:
    """An ended process that nobody has waited for yet is not alive."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
