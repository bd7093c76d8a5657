"""Three steps in flight in a replica: the right tokens, whatever happens to one or all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest

from daemon.pipeline import ReplicaDriver
from hexmesh.errors import TimedOut
from hexmesh.serving.pacing import Pacing
from hexmesh.wire.data import GenerateCancel, ReplicaStats, Row, Step, StepRefused, StepResult
from tests.unit.daemon.fake_mesh import FakeMesh, FakeWorker, answer_to, fake_mesh
from tests.unit.daemon.test_recovery_with_fake_stages import PROMPT, until

N_STREAMS = 9
N_TOKENS = 24
EXPECTED = [answer_to([*PROMPT, n], N_TOKENS) for n in range(N_STREAMS)]


@pytest.fixture(autouse=True)
def three_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fake stages' times are."""
    monkeypatch.setattr(Pacing, "groups", lambda self, n_decoding: max(1, min(3, n_decoding)))
    monkeypatch.setattr(Pacing, "prompt_depth", lambda self, n_tokens: 3)


def ask_all(mesh: FakeMesh) -> asyncio.Future[list[list[int]]]:
    return asyncio.gather(*(mesh.ask("c", [*PROMPT, n], N_TOKENS, name=str(n)) for n in range(N_STREAMS)))


def number_of(mesh: FakeMesh, step: int) -> int:
    """What the driver on node a calls its step number `step` on the wire."""
    return mesh.nodes["a"].driver()._number_before + step


async def three_in_flight(mesh: FakeMesh) -> ReplicaDriver:
    driver = mesh.nodes["a"].driver()
    await until(lambda: len(driver._in_flight) == 3 and driver.steps_run > 12)
    return driver


@pytest.mark.parametrize("cut", ["a", "ab", "bac"])
async def test_three_steps_are_in_flight_and_never_more(cut: str) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit(cut)
        (driver,) = [driver for node in mesh.nodes.values() for driver in node.epochs.drivers()]
        seen = []

        def note(message: object) -> bool:
            seen.append(len(driver._in_flight))
            return False

        mesh.lose = note
        assert await ask_all(mesh) == EXPECTED
        assert max(seen) == 3
        await until(lambda: driver.is_idle)
        assert (len(driver._in_flight), driver.pool.n_available) == (0, 64)


async def test_the_chunks_of_one_prompt_follow_each_other_without_waiting() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        worker = mesh.nodes["b"].worker
        worker.may_run.clear()
        prompt = list(range(100, 164))  # four steps of 16 tokens
        asked = asyncio.ensure_future(mesh.ask("a", prompt, 5))
        driver = mesh.nodes["a"].driver()
        await until(lambda: len(driver._in_flight) == 3)
        worker.may_run.set()
        assert await asked == answer_to(prompt, 5)


async def test_answers_that_come_in_another_order_lead_to_the_same_tokens() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        held: list[StepResult] = []
        n_swapped = 0

        def swap_some(message: object) -> bool:
            nonlocal n_swapped
            if not isinstance(message, StepResult):
                return False
            if held:
                late = held.pop()
                n_swapped += 1
                asyncio.get_running_loop().call_later(0.001, mesh.nodes["a"].receive, "b", late, b"")
                return False
            if message.step % 7 == 0:
                held.append(message)
                return True
            return False

        mesh.lose = swap_some
        assert await ask_all(mesh) == EXPECTED
        assert n_swapped >= 3
        assert mesh.broken == []


def the_result(mesh: FakeMesh, message: object, step: int) -> bool:
    return isinstance(message, StepResult) and message.step == number_of(mesh, step)


def on_its_way(mesh: FakeMesh, message: object, step: int) -> bool:
    return isinstance(message, Step) and message.stage == 1 and message.step == number_of(mesh, step)


@pytest.mark.parametrize("is_lost", [the_result, on_its_way])
async def test_the_middle_one_of_three_that_gets_lost_is_missed_when_the_next_is_answered(
    is_lost: Callable[[FakeMesh, object, int], bool],
) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        lost: list[object] = []
        mesh.lose = lambda message: is_lost(mesh, message, 14) and lost.append(message) is None
        assert await ask_all(mesh) == EXPECTED
        assert len(lost) == 1
        assert (mesh.broken, mesh.n_recovered) == ([], 0)


async def test_the_first_chunk_of_a_prompt_that_gets_lost_is_computed_again_with_those_that_follow_it() -> (
    None
):
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        lost: list[object] = []
        mesh.lose = lambda message: on_its_way(mesh, message, 1) and lost.append(message) is None
        prompt = list(range(100, 164))
        assert await mesh.ask("a", prompt, 5) == answer_to(prompt, 5)
        assert len(lost) == 1


async def test_a_step_that_one_stage_could_not_pass_on_costs_nobody_a_token() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        refused: list[Step] = []

        def refuse_one(message: object) -> bool:
            if isinstance(message, Step) and message.stage == 1 and message.step == number_of(mesh, 14):
                refused.append(message)
                refusal = StepRefused(
                    epoch=message.epoch,
                    replica=message.replica,
                    stage=0,
                    step=message.step,
                    reason="the next stage's node b cannot be reached",
                    is_transient=True,
                )
                asyncio.get_running_loop().call_soon(mesh.nodes["a"].receive, "a", refusal, b"")
                return True
            return False

        mesh.lose = refuse_one
        assert await ask_all(mesh) == EXPECTED
        assert len(refused) == 1
        assert (mesh.broken, mesh.n_recovered) == ([], 0)


async def test_all_three_are_lost_with_the_connection() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        asked = ask_all(mesh)
        driver = await three_in_flight(mesh)
        mesh.nodes["b"].worker.may_run.clear()
        mesh.lose = lambda message: isinstance(message, StepResult)
        mesh.nodes["b"].worker.may_run.set()
        await until(lambda: not mesh.nodes["b"].worker._steps)
        driver.link_reset("b")
        assert len(driver._in_flight) == 0
        mesh.lose = lambda message: False
        assert await asked == EXPECTED
        assert (mesh.broken, mesh.n_recovered) == ([], 0)


async def test_steps_that_get_lost_again_and_again_break_the_replica() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        driver = mesh.nodes["a"].driver()

        def lose_the_way(message: object) -> bool:
            if isinstance(message, Step) and message.stage == 1:
                asyncio.get_running_loop().call_soon(driver.link_reset, "b")
                return True
            return False

        mesh.lose = lose_the_way
        began_s = time.monotonic()
        asked = ask_all(mesh)
        await mesh.is_broken.wait()
        assert mesh.broken == ["steps were lost 10 times: the connection to b was cut"]
        assert 0.5 < time.monotonic() - began_s < 5
        mesh.lose = lambda message: False
        await mesh.commit("ac")
        assert await asked == EXPECTED


async def carried_over_while_three_are_held(
    mesh: FakeMesh, disturb: Callable[[], Awaitable[None] | None]
) -> list[list[int]]:
    """All answers; the same plan is committed again while node a computes three steps."""
    await mesh.commit("ab")
    asked = ask_all(mesh)
    driver = await three_in_flight(mesh)
    worker = mesh.nodes["a"].worker
    worker.may_run.clear()
    await until(lambda: len(worker._steps) == 2)
    disturb()
    await mesh.commit("ab")
    assert mesh.nodes["a"].driver() is driver
    assert not driver.has_moved
    worker.may_run.set()
    answers = await asked
    assert driver.has_moved
    await until(lambda: not any(node.epochs.draining for node in mesh.nodes.values()))
    return answers


async def test_three_steps_of_the_epoch_before_end_in_the_next_one() -> None:
    async with fake_mesh("abc") as mesh:
        assert await carried_over_while_three_are_held(mesh, lambda: None) == EXPECTED
        assert (mesh.broken, mesh.n_recovered) == ([], 0)


async def test_three_steps_over_a_pool_that_is_new_are_replayed_and_no_cached_block_is_believed() -> None:
    async with fake_mesh("abc") as mesh:
        b = mesh.nodes["b"]

        def lose_b() -> None:
            b.stages.worker_died(cast(Any, b.worker), "it was killed")
            b.worker = FakeWorker()

        assert await carried_over_while_three_are_held(mesh, lose_b) == EXPECTED
        assert mesh.n_recovered >= 1


async def test_steps_of_an_epoch_that_was_released_come_again_in_the_present_one() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        asked = ask_all(mesh)
        driver = await three_in_flight(mesh)
        old = driver.epoch
        mesh.lose = lambda message: isinstance(message, StepResult) and message.epoch == old
        await until(lambda: not mesh.nodes["b"].worker._steps)
        await mesh.commit("ab")
        assert not driver.has_moved
        for node in mesh.nodes.values():
            node.epochs.release(old, "no room for two")
        assert driver.has_moved
        assert await asked == EXPECTED
        assert (mesh.broken, mesh.n_recovered) == ([], 0)


async def test_a_stage_refuses_a_step_that_comes_after_a_later_one() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        refusals: list[StepRefused] = []
        mesh.lose = lambda message: isinstance(message, StepRefused) and refusals.append(message) is None
        held = mesh.nodes["b"].epochs.committed
        assert held is not None
        row = Row(start=0, n_tokens=1, blocks=[0])
        later = Step(epoch=held.epoch, cert=None, replica="r0", stage=1, step=8, driver="a", rows=[row])
        for step in (later, msgspec.structs.replace(later, step=7), later):
            mesh.nodes["b"].stages.on_step(step, bytes(8))
        await until(lambda: mesh.nodes["b"].worker.n_steps == 1)
        assert [(refusal.step, refusal.is_transient) for refusal in refusals] == [(7, True), (8, True)]


async def test_what_three_steps_held_is_replayed_when_the_replica_is_closed() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        asked = ask_all(mesh)
        driver = await three_in_flight(mesh)
        driver.close("its end")
        assert (driver.is_idle, driver.has_moved, driver.pool.n_available) == (True, True, 64)
        await mesh.commit("ac")
        assert await asked == EXPECTED


async def test_a_worker_that_hangs_with_three_steps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexmesh.serving.watchdog.FIRST_S", 0.3)
    monkeypatch.setattr("hexmesh.serving.watchdog.FLOOR_S", 0.3)
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        asked = ask_all(mesh)
        await three_in_flight(mesh)
        worker = mesh.nodes["b"].worker
        worker.may_run.clear()
        await until(lambda: bool(worker.killed_because))
        assert (
            "stage 1 of replica r0 (layers 4-7) hung: no answer to a step of 3 tokens"
            in worker.killed_because
        )
        await mesh.commit("ac")
        assert await asked == EXPECTED


async def test_a_late_step_of_the_epoch_before_is_refused_where_the_pool_was_carried_over() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        sent: list[Step] = []
        mesh.lose = lambda message: isinstance(message, Step) and message.stage == 1 and sent.append(message)
        assert await ask_all(mesh) == EXPECTED
        await mesh.commit("ab")
        assert await mesh.ask("c", PROMPT, 5) == answer_to(PROMPT, 5)
        refusals: list[StepRefused] = []
        mesh.lose = lambda message: isinstance(message, StepRefused) and refusals.append(message) is None
        await mesh.commit("ab")
        late = msgspec.structs.replace(sent[0], epoch=mesh.nodes["a"].driver().epoch, cert=None)
        mesh.nodes["b"].stages.on_step(late, bytes(8 * len(late.rows)))
        await until(lambda: bool(refusals))
        assert [(refusal.step, refusal.is_transient) for refusal in refusals] == [(late.step, True)]


async def test_steps_of_the_next_driver_over_the_same_pool_come_after_those_of_the_one_before() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        assert await ask_all(mesh) == EXPECTED
        refusals: list[StepRefused] = []
        mesh.lose = lambda message: (
            isinstance(message, ReplicaStats)  # b does not hear that the replica broke, and keeps its pool
            or (isinstance(message, StepRefused) and refusals.append(message) is None)
        )
        mesh.nodes["a"].driver().close("its end")
        await mesh.commit("ab")
        assert await ask_all(mesh) == EXPECTED
        assert refusals == []


async def test_answers_over_another_pool_than_before_are_not_believed() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        lies: list[int] = []

        def of_a_new_pool(message: Any) -> Any:
            if isinstance(message, StepResult) and not lies and message.step >= number_of(mesh, 14):
                lies.append(message.step)
                return msgspec.structs.replace(message, pools=[message.pools[0], "new"])
            return message

        mesh.nodes["b"].lie = of_a_new_pool
        assert await ask_all(mesh) == EXPECTED
        assert len(lies) == 1
        assert (mesh.broken, mesh.n_recovered > 0) == ([], True)


async def test_what_nobody_waits_for_any_more_gives_its_blocks_back_and_ends_with_a_deadline_error() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        driver = mesh.nodes["a"].driver()
        mesh.nodes["b"].worker.may_run.clear()
        asked = [
            asyncio.ensure_future(mesh.ask("c", PROMPT, 100, name=str(n), timeout_s=0.3)) for n in range(3)
        ]
        mesh.lose = lambda message: isinstance(message, GenerateCancel)
        done, _ = await asyncio.wait(asked, timeout=5)
        assert [type(task.exception()) for task in done] == [TimedOut] * 3
        await until(lambda: not driver.sequences())
        mesh.nodes["b"].worker.may_run.set()
        await until(lambda: driver.is_idle and driver.pool.n_available == 64)


async def test_steps_that_were_lost_between_two_other_nodes_are_made_up_for() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")
        asked = ask_all(mesh)
        driver = await three_in_flight(mesh)
        lost: list[Step] = []
        mesh.lose = lambda message: (
            isinstance(message, Step) and message.stage == 2 and lost.append(message) is None
        )
        await until(
            lambda: [sent.step for sent in lost] == [step.number for step in driver._in_flight.steps()]
        )
        mesh.lose = lambda message: False
        mesh.nodes["b"].stages.link_lost("c")
        assert await asked == EXPECTED
        assert (mesh.broken, mesh.n_recovered, driver.broken) == ([], 0, None)
