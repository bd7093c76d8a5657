"""Requests through gateways, drivers and stage hosts: the right tokens, whatever breaks on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from daemon.gateway import Flight
from daemon.web.service import GenerationPart, GenerationRequest
from hexmesh.errors import InvalidInput, NotReady, TimedOut
from hexmesh.wire.data import (
    Generate,
    Generated,
    PromptScored,
    SampledToken,
    SamplingParams,
    ScoredToken,
    Step,
    StepResult,
)
from tests.unit.daemon.fake_mesh import VOCABULARY, FakeMesh, FakeWorker, answer_to, fake_mesh


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until something holds; five seconds at most."""
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 the fake mesh has no event for everything that tests look at
            await asyncio.sleep(0)


PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("cut", ["a", "ab", "cab"])
async def test_any_cut_and_any_gateway_give_the_same_answer(cut: str) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit(cut)
        answers = await asyncio.gather(
            *(mesh.ask(at, [*PROMPT, i], 20, name=f"{at}{i}") for at in "abc" for i in range(4))
        )
    assert answers == [answer_to([*PROMPT, i], 20) for _ in "abc" for i in range(4)]


async def test_streams_share_steps() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        await asyncio.gather(*(mesh.ask("b", [*PROMPT, i], 30, name=str(i)) for i in range(5)))
        assert mesh.nodes["a"].driver().steps_run <= 2.2 * 31, "two stages, two groups at most"


async def answer_while(mesh: FakeMesh, at: str, disturb: Callable[[], Awaitable[None]]) -> list[int]:
    """An answer of 30 tokens at node `at`, with a disturbance after the tenth."""
    got = []
    disturbed = None
    async with aclosing(mesh.stream(at, PROMPT, 30)) as stream:
        async for token in stream:
            got.append(token)
            if len(got) == 10:
                disturbed = asyncio.ensure_future(disturb())
    assert disturbed is not None
    await disturbed
    return got


@pytest.mark.parametrize(("victim", "left"), [("c", "ab"), ("a", "cb")], ids=["stage", "driver"])
async def test_what_ran_over_a_dead_node_is_replayed_over_the_rest_with_the_same_tokens(
    victim: str, left: str
) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")

        async def kill_and_plan() -> None:
            mesh.kill(victim)
            await mesh.commit(left)

        assert await answer_while(mesh, "b", kill_and_plan) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 1


@pytest.mark.parametrize(("victim", "left"), [("c", "ab"), ("a", "cb")], ids=["stage", "driver"])
async def test_what_ran_over_a_node_that_is_not_heard_is_replayed_without_anyone_being_told(
    victim: str, left: str
) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")

        async def cut_and_plan() -> None:
            mesh.cut(victim)
            await until(lambda: mesh.n_recovered == 1)
            await mesh.commit(left)

        assert await answer_while(mesh, "b", cut_and_plan) == answer_to(PROMPT, 30)


@pytest.mark.parametrize(("victim", "left"), [("c", "ab"), ("a", "cb")], ids=["stage", "driver"])
async def test_a_prompts_scores_come_once_and_whole_though_a_node_dies_amid_them(
    victim: str, left: str
) -> None:
    prompt = list(range(100, 170))  # in chunks of 16 tokens
    parts: list[GenerationPart] = []
    told: list[int] = []

    def note(message: object) -> bool:
        if isinstance(message, Generate):
            told.append(message.n_scored)
        return False

    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")
        request = GenerationRequest(
            request_id="r",
            sequence="r",
            prompt=prompt,
            max_tokens=3,
            stop_token_ids=[],
            sampling=SamplingParams(),
            timeout_s=20.0,
            n_prompt_logprobs=0,
        )
        killed = None
        mesh.lose = note
        async with aclosing(mesh.nodes["b"].gateway.generate(request)) as stream:
            async for part in stream:
                parts.append(part)
                if len(parts) == 2:
                    mesh.kill(victim)
                    killed = asyncio.ensure_future(mesh.commit(left))
        assert killed is not None
        await killed
        assert mesh.n_recovered == 1
    assert told[0] == 0
    assert told[-1] in (32, 48, 64)  # what the first attempt scored is not scored again
    assert [one.logprob for part in parts for one in part.scores] == [-token for token in prompt[1:]]
    assert [one.token_id for part in parts for one in part.tokens] == answer_to(prompt, 3)
    assert not any(part.scores for part in parts if part.tokens)


async def test_scores_that_come_twice_reach_the_client_once() -> None:
    prompt = list(range(100, 170))
    scores: list[ScoredToken] = []
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        gateway = mesh.nodes["b"].gateway
        request = GenerationRequest(
            request_id="r",
            sequence="r",
            prompt=prompt,
            max_tokens=1,
            stop_token_ids=[],
            sampling=SamplingParams(),
            timeout_s=20.0,
            n_prompt_logprobs=0,
        )
        async with aclosing(gateway.generate(request)) as stream:
            async for part in stream:
                scores += part.scores
                for flight in gateway.flights():
                    again = PromptScored(
                        sequence=flight.key, attempt=flight.attempt, first=0, scores=scores.copy()
                    )
                    gateway.on_message("a", again)
    assert [one.token_id for one in scores] == prompt[1:]


async def test_a_step_between_two_nodes_that_lost_each_other_is_refused_by_the_one_that_sent_it() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")
        mesh.lose = lambda message: isinstance(message, Step) and message.stage == 2
        mesh.nodes["b"].hears_not = "c"
        task = asyncio.get_running_loop().create_task(mesh.ask("a", PROMPT, 10))
        driver = mesh.nodes["a"].driver()
        await until(lambda: driver.broken is not None)
        assert driver.broken == "stage 1 on b refused: the next stage's node c is not heard"
        mesh.lose = lambda message: False
        await mesh.commit("ab")
        assert await task == answer_to(PROMPT, 10)


async def test_a_worker_that_hangs_is_killed_and_its_epoch_broken_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hexmesh.serving.watchdog.FIRST_S", 0.3)
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        worker = mesh.nodes["b"].worker
        task = asyncio.get_running_loop().create_task(mesh.ask("a", PROMPT, 20))
        await until(lambda: worker.n_steps >= 1)
        worker.may_run.clear()
        await until(lambda: bool(worker.killed_because))
        assert worker.killed_because == (
            "stage 1 of replica r0 (layers 4-7) hung: no answer to a step of 1 token within 0.3 s"
        )
        worker.may_run.set()
        await mesh.commit("ab")
        assert await task == answer_to(PROMPT, 20)


async def test_a_broken_replica_that_nobody_else_noticed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.epochs.COMPLAIN_AFTER_S", 0.05)
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.nodes["a"].driver().close("stage 1 refused: for some reason")
        await until(lambda: mesh.broken == ["stage 1 refused: for some reason"])


async def test_a_plan_that_leaves_the_replica_as_it_is_does_not_touch_what_runs() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        driver = mesh.nodes["a"].driver()
        for at in "ac":
            assert await answer_while(mesh, at, lambda: mesh.commit("ab")) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 0
        assert mesh.nodes["a"].driver() is driver
        assert driver.steps_run <= 2 * 31
        await until(lambda: not any(node.epochs.draining for node in mesh.nodes.values()))
        assert [node.worker.n_pools for node in mesh.nodes.values()] == [1, 1, 0]
        assert driver.stats(0.0).kv_blocks_free == 64


@pytest.mark.parametrize("first", ["a", "b", "c"])
async def test_such_a_plan_may_reach_the_hosts_one_after_the_other(first: str) -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")

        async def commit_slowly() -> None:
            commits = mesh.commit_one_by_one("abc", first + "abc".replace(first, ""))
            async for _ in commits:
                target = mesh.nodes["a"].driver().steps_run + 3
                await until(lambda target=target: mesh.nodes["a"].driver().steps_run >= target)  # type: ignore[misc]

        assert await answer_while(mesh, "b", commit_slowly) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 0
        await until(lambda: not any(node.epochs.draining for node in mesh.nodes.values()))


async def test_kv_that_a_worker_lost_is_not_taken_for_carried_over() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        b = mesh.nodes["b"]

        async def lose_b_and_plan_the_same() -> None:
            b.stages.worker_died(cast(Any, b.worker), "it was killed")
            b.worker = FakeWorker()
            await mesh.commit("ab")

        assert await answer_while(mesh, "b", lose_b_and_plan_the_same) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 1


async def test_word_of_an_idle_replica_that_comes_before_the_plan_that_ends_it_is_kept() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        async for node in mesh.commit_one_by_one("cb", "acb"):
            if node == "a":  # nothing ran: its driver says so while b and c still hold the epoch as committed
                await asyncio.sleep(0.01)
        await until(lambda: not any(node.epochs.draining for node in mesh.nodes.values()))


async def test_a_planned_change_lets_running_sequences_end_where_they_are() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("ab")
        assert await answer_while(mesh, "c", lambda: mesh.commit("cb")) == answer_to(PROMPT, 30)
        assert mesh.n_recovered == 0
        await until(lambda: not any(node.epochs.draining for node in mesh.nodes.values()))


def is_third(mesh: FakeMesh, answer: StepResult) -> bool:
    return answer.step == mesh.nodes["a"].driver()._number_before + 3


async def test_a_lost_step_is_sent_again() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        lost: list[StepResult] = []

        def lose_third(message: object) -> bool:
            if isinstance(message, StepResult) and is_third(mesh, message) and not lost:
                lost.append(message)
                asyncio.get_running_loop().call_soon(mesh.nodes["a"].driver().link_reset, "b")
                return True
            return False

        mesh.lose = lose_third
        assert await mesh.ask("a", PROMPT, 10) == answer_to(PROMPT, 10)
        assert len(lost) == 1
        assert mesh.broken == []


async def test_lost_tokens_are_noticed_and_made_up_for() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.lose = lambda message: (
            isinstance(message, Generated) and message.first == 4 and message.attempt == 1
        )
        assert await mesh.ask("b", PROMPT, 12) == answer_to(PROMPT, 12)


async def test_a_dead_worker_breaks_its_epoch_and_says_so() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        worker = mesh.nodes["b"].worker
        task = asyncio.get_running_loop().create_task(mesh.ask("a", PROMPT, 20))
        await until(lambda: worker.n_steps >= 5)
        worker.is_dead = True
        mesh.nodes["b"].stages.worker_died(cast(Any, worker), "it was killed")
        assert mesh.broken == ["it was killed"]
        worker.is_dead = False
        await mesh.commit("ab")
        assert await task == answer_to(PROMPT, 20)


async def test_a_client_that_leaves_frees_its_blocks() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        async with aclosing(mesh.stream("b", PROMPT, 200)) as stream:
            async for _ in stream:
                break
        driver = mesh.nodes["a"].driver()
        await until(lambda: driver.is_idle)
        assert driver.stats(0.0).kv_blocks_free == 64


async def test_without_a_route_a_running_request_ends_at_its_deadline_naming_the_blocker() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        asyncio.get_running_loop().call_later(0.01, mesh.kill, "b")
        with pytest.raises(TimedOut, match="no plan"):
            await mesh.ask("a", PROMPT, 240, timeout_s=0.5)


async def test_a_request_that_cannot_fit_is_refused_at_once() -> None:
    async with fake_mesh("a") as mesh:
        await mesh.commit("a", kv_blocks=2)
        with pytest.raises(InvalidInput, match="KV pool holds 8"):
            await mesh.ask("a", PROMPT, 50)


async def test_the_same_request_twice_at_once_is_refused() -> None:
    async with fake_mesh("a") as mesh:
        await mesh.commit("a")
        async with aclosing(mesh.stream("a", PROMPT, 20)) as stream:
            async for _ in stream:
                with pytest.raises(InvalidInput, match="under way already"):
                    await mesh.ask("a", PROMPT, 20)
                break


async def test_the_same_request_id_at_two_peers_gives_two_answers() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        answers = await asyncio.gather(*(mesh.ask(at, PROMPT, 20, name="same") for at in "ab"))
    assert answers == [answer_to(PROMPT, 20)] * 2


async def test_a_token_that_the_model_lacks_is_refused_and_breaks_nothing() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        with pytest.raises(InvalidInput, match="token id"):
            await mesh.ask("b", [VOCABULARY], 5)
        assert await mesh.ask("b", PROMPT, 5) == answer_to(PROMPT, 5)
        assert mesh.broken == []


async def test_sequences_that_gave_their_blocks_away_still_give_the_right_answers() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab", kv_blocks=12)  # 48 tokens for four sequences that grow to 27 each
        answers = await asyncio.gather(*(mesh.ask("b", [*PROMPT, i], 19, name=str(i)) for i in range(4)))
        assert answers == [answer_to([*PROMPT, i], 19) for i in range(4)]
        assert mesh.nodes["a"].driver().steps_run > 30, "there was room for all at once"


async def test_a_replay_does_not_draw_again_what_the_client_has() -> None:
    async with fake_mesh("abc") as mesh:
        await mesh.commit("abc")

        async def plan_without_b() -> None:
            mesh.kill("b")
            await mesh.commit("ac")

        await answer_while(mesh, "c", plan_without_b)
        # 30 tokens, ten of them drawn before; the replayed prompt and output fit one or two steps.
        assert mesh.nodes["a"].driver().steps_run <= 22


async def answer_with_forgery(forge: Callable[[Flight], Generated], src: str = "a") -> list[int]:
    """An answer of 20 tokens; after the fifth its gateway gets a message that no driver sent just then."""
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        gateway = mesh.nodes["b"].gateway
        got = []
        async with aclosing(mesh.stream("b", PROMPT, 20)) as stream:
            async for token in stream:
                got.append(token)
                if len(got) == 5:
                    (flight,) = gateway.flights()
                    gateway.on_message(src, forge(flight))
    return got


async def test_tokens_that_come_twice_reach_the_client_once() -> None:
    def all_again(flight: Flight) -> Generated:
        again = [SampledToken(token_id=token_id) for token_id in flight.emitted]
        return Generated(sequence=flight.key, attempt=flight.attempt, first=0, tokens=again)

    assert await answer_with_forgery(all_again) == answer_to(PROMPT, 20)


async def test_tokens_of_a_node_that_does_not_drive_the_sequence_are_dropped() -> None:
    def a_wrong_one(flight: Flight) -> Generated:
        wrong = [SampledToken(token_id=1)]
        return Generated(sequence=flight.key, attempt=flight.attempt, first=len(flight.emitted), tokens=wrong)

    assert await answer_with_forgery(a_wrong_one, src="c") == answer_to(PROMPT, 20)


async def test_tokens_of_an_older_attempt_are_dropped() -> None:
    def a_wrong_one(flight: Flight) -> Generated:
        wrong = [SampledToken(token_id=1)]
        return Generated(
            sequence=flight.key, attempt=flight.attempt - 1, first=len(flight.emitted), tokens=wrong
        )

    assert await answer_with_forgery(a_wrong_one) == answer_to(PROMPT, 20)


async def test_a_gateway_that_goes_tells_its_clients_why() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.nodes["a"].worker.may_run.clear()
        asked = asyncio.ensure_future(mesh.ask("b", PROMPT, 30))
        await until(lambda: bool(mesh.nodes["b"].gateway.flights()))
        mesh.nodes["b"].gateway.end_all(NotReady("this node left", code="left"))
        with pytest.raises(NotReady, match="this node left"):
            await asked
        mesh.nodes["a"].worker.may_run.set()


async def test_what_drains_elsewhere_ends_as_soon_as_its_driver_is_closed() -> None:
    """Where memory is for one epoch the driver's host releases the old one at once; others must hear of it."""
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        mesh.lose = lambda message: isinstance(message, StepResult) and message.epoch.n == 1
        asked = asyncio.ensure_future(mesh.ask("b", PROMPT, 30))
        await until(lambda: mesh.nodes["b"].worker.n_steps == 1)
        await mesh.commit("ba")
        old = mesh.nodes["b"].epochs.draining
        assert old is not None
        assert mesh.nodes["b"].epochs.draining_here() is old
        mesh.nodes["a"].epochs.release(old.epoch, "no room for two")
        await until(lambda: mesh.nodes["b"].epochs.draining is None)
        assert await asked == answer_to(PROMPT, 30)
