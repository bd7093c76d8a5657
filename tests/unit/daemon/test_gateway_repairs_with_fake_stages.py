"""What lost messages leave behind at gateway and driver, silent drivers, full queues: noticed soon, and made up for."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from daemon.gateway import MAX_MISSED
from hexmesh.errors import Busy, NotReady
from hexmesh.wire.data import GenerateCancel, Generated, GenerateFailed, Holding, SampledToken, SequenceTokens
from tests.unit.daemon.fake_mesh import BLOCK_TOKENS, FakeMesh, answer_to, fake_mesh
from tests.unit.daemon.test_recovery_with_fake_stages import PROMPT, until


async def begun(mesh: FakeMesh, at: str, n_tokens: int = 20, n_before: int = 5) -> asyncio.Task[list[int]]:
    """A request at a node, once it has so many tokens."""
    asked = asyncio.get_running_loop().create_task(mesh.ask(at, PROMPT, n_tokens))
    gateway = mesh.nodes[at].gateway
    await until(lambda: any(len(flight.emitted) >= n_before for flight in gateway.flights()))
    return asked


async def test_one_message_a_step_carries_all_tokens_for_a_gateway() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        sizes: list[int] = []
        mesh.lose = lambda message: (
            isinstance(message, Generated) and sizes.append(len(message.answers)) is not None
        )
        await asyncio.gather(*(mesh.ask("b", [*PROMPT, i], 30, name=str(i)) for i in range(5)))
        assert max(sizes) == 5
        assert len(sizes) == mesh.nodes["a"].driver().steps_run


async def test_the_driver_says_how_much_of_a_prompt_was_cached() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        told: list[int] = []

        def note(message: object) -> bool:
            if isinstance(message, Generated):
                told.extend(answer.n_cached for answer in message.answers if answer.first == 0)
            return False

        mesh.lose = note
        for name in ("first", "second"):
            await mesh.ask("b", [*PROMPT, 3, 4], 5, name=name)
        assert told == [0, 2 * BLOCK_TOKENS]


@pytest.mark.parametrize("last", [False, True], ids=["in-the-middle", "at-the-end"])
async def test_lost_tokens_that_no_later_one_shows_are_noticed_by_the_drivers_list(last: bool) -> None:
    """In the middle the driver holds more than came; at the end it does not hold the sequence any more."""
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        first = 19 if last else 9
        is_lost = asyncio.Event()

        def lose(message: object) -> bool:
            if isinstance(message, Generated) and message.answers[0].first == first and not is_lost.is_set():
                is_lost.set()
                if not last:
                    mesh.nodes["a"].worker.may_run.clear()  # no later token shows the gap
                return True
            return False

        mesh.lose = lose
        asked = await begun(mesh, "b")
        await is_lost.wait()
        driver = mesh.nodes["a"]
        if last:
            await tell_until(mesh, "a", lambda: mesh.nodes["b"].gateway.flights()[0].route is None)
        else:
            driver.tell_holding()
            await until(lambda: mesh.n_recovered == 1)
            driver.worker.may_run.set()
        assert await asked == answer_to(PROMPT, 20)
        assert mesh.n_recovered == 1


async def tell_until(mesh: FakeMesh, name: str, holds: Callable[[], bool]) -> None:
    """Have a driver send its list again and again. Another sequence makes sure that there is one to send."""
    mesh.nodes[name].worker.may_run.clear()
    other = asyncio.get_running_loop().create_task(mesh.ask("b", PROMPT, 3, name="other"))
    await until(lambda: len(mesh.nodes[name].driver().sequences()) == 1)
    for _ in range(MAX_MISSED):
        assert not holds(), "a list or two may have been made before the driver had the request"
        mesh.nodes[name].tell_holding()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert holds()
    mesh.nodes[name].worker.may_run.set()
    await other


async def test_a_lost_word_of_failure_is_made_up_for_by_the_drivers_list() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.lose = lambda message: isinstance(message, GenerateFailed)
        asked = await begun(mesh, "b")
        mesh.nodes["a"].driver()._start_over("the fake stage lost its pool")
        await tell_until(mesh, "a", lambda: mesh.n_recovered == 1)
        assert await asked == answer_to(PROMPT, 20)


async def test_what_a_driver_holds_for_nobody_is_freed() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.nodes["a"].worker.may_run.clear()
        asked = asyncio.get_running_loop().create_task(mesh.ask("b", PROMPT, 20))
        driver = mesh.nodes["a"].driver()
        await until(lambda: len(driver.sequences()) == 1)
        mesh.lose = lambda message: isinstance(message, GenerateCancel)
        asked.cancel()
        await asyncio.wait([asked])
        mesh.nodes["a"].worker.may_run.set()
        await until(lambda: driver.steps_run > 3)
        mesh.lose = lambda message: False
        mesh.nodes["a"].tell_holding()
        await until(lambda: driver.is_idle)
        assert driver.steps_run < 20


async def test_a_list_of_a_node_that_drives_nothing_of_ours_changes_nothing() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        asked = await begun(mesh, "b")
        for _ in range(2 * MAX_MISSED):
            mesh.nodes["b"].gateway.on_holding("c", Holding(sequences=[]))
        assert await asked == answer_to(PROMPT, 20)
        assert mesh.n_recovered == 0


async def test_a_driver_that_sends_neither_tokens_nor_lists_is_given_up_although_its_node_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("daemon.gateway.SILENCE_S", 0.4)
    async with fake_mesh("abc") as mesh:
        await mesh.commit("a b")
        mesh.lose = lambda message: isinstance(message, Generated) and message.answers[0].attempt == 1
        assert await mesh.ask("c", PROMPT, 20) == answer_to(PROMPT, 20)
        assert mesh.n_recovered == 1


async def test_a_driver_whose_lists_come_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.gateway.SILENCE_S", 0.4)
    async with fake_mesh("ab") as mesh:
        await mesh.commit("a")
        mesh.nodes["a"].worker.may_run.clear()
        asked = asyncio.get_running_loop().create_task(mesh.ask("b", PROMPT, 20))
        n_lists = 0

        async def tell() -> None:
            nonlocal n_lists
            while n_lists < 12:
                await asyncio.sleep(0.1)
                mesh.nodes["a"].tell_holding()
                n_lists += 1

        await tell()
        assert mesh.n_recovered == 0
        mesh.nodes["a"].worker.may_run.set()
        assert await asked == answer_to(PROMPT, 20)
        assert mesh.n_recovered == 0


def limit_waiting(mesh: FakeMesh, name: str, n: int) -> None:
    """No more than so many requests wait at the node's driver."""
    batcher: Any = mesh.nodes[name].driver()._batcher
    batcher.limits = dataclasses.replace(batcher.limits, max_waiting=n)


async def test_what_one_driver_has_no_place_for_goes_to_another_at_once() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("a b")
        limit_waiting(mesh, "a", 0)
        asked = [mesh.ask("c", [*PROMPT, i], 10, name=str(i)) for i in range(6)]
        assert await asyncio.gather(*asked) == [answer_to([*PROMPT, i], 10) for i in range(6)]
        assert mesh.nodes["a"].driver().steps_run == 0
        assert mesh.n_recovered == 0, "no attempt had begun"


async def test_a_request_that_every_driver_refuses_is_not_held() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("a b")
        mesh.refusal = Busy("every replica is full", retry_after_s=3.0)
        for name in "ab":
            limit_waiting(mesh, name, 0)
        turns = count_turns()
        with pytest.raises(Busy, match="full") as refused:
            await mesh.ask("c", PROMPT, 10)
        assert refused.value.retry_after_s == 3.0
        assert turns() < 20, "it was asked for more than once a driver, or waited"


def count_turns() -> Callable[[], int]:
    """How often the loop turned since."""
    loop, n_turns = asyncio.get_running_loop(), 0

    def turn() -> None:
        nonlocal n_turns
        n_turns += 1
        if n_turns < 1000:
            loop.call_soon(turn)

    loop.call_soon(turn)
    return lambda: n_turns


async def test_a_replay_waits_for_a_place_in_a_full_queue() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("a b")
        asked = await begun(mesh, "c")
        (flight,) = mesh.nodes["c"].gateway.flights()
        assert flight.route is not None
        driven_by = flight.route.driver
        other = "b" if driven_by == "a" else "a"
        limit_waiting(mesh, other, 0)
        mesh.nodes[driven_by].driver().close("a stage was silent")
        await until(lambda: flight.attempt >= 3)
        limit_waiting(mesh, other, 5)
        assert await asked == answer_to(PROMPT, 20)


async def test_a_driver_cannot_send_more_tokens_than_were_asked_for() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        asked = await begun(mesh, "b")
        gateway = mesh.nodes["b"].gateway
        (flight,) = gateway.flights()

        flood = SequenceTokens(
            sequence=flight.key, attempt=flight.attempt, first=0, tokens=[SampledToken(token_id=1)] * 5000
        )
        gateway.on_tokens("a", Generated(answers=[flood]))
        assert len(flight.emitted) == 20
        gateway.end_all(NotReady("the test is over"))
        with pytest.raises(NotReady):
            await asked
