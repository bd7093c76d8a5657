"""A mesh of three real daemons on loopback, with so little memory that the model needs all of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.errors import Busy
from hexmesh.serving.batcher import BatchLimits
from tests.e2e.asking import Stream, expected, expected_logprobs, penalised, prompt_logprobs, token_ids

FLAGS = ("--device", "cpu", "--threads", "1")
QUESTION = "What is a KV cache?"
ANSWER = (
    "A KV cache keeps the keys and values of all earlier tokens, so that each new token attends to them "
    "without computing them again."
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Three nodes in two sites. The third has more memory than the others; no two hold the model."""
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        flags = (*FLAGS, "--min-nodes", "3", "--memory")
        mesh.found("one", "--site", "tokyo", *flags, "6.5MiB")
        mesh.join("two", "--site", "tokyo", *flags, "6.5MiB")
        mesh.join("three", "--site", "osaka", *flags, "10MiB")
        mesh.await_ready(plan_reaches=3)
        yield mesh


def openai_client(daemon: LocalDaemon) -> OpenAI:
    return OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0)


def coordinator(mesh: LocalMesh) -> LocalDaemon:
    node_id = mesh.daemons[0].get("/admin/topology")["coordinator"]
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


def driver(mesh: LocalMesh) -> LocalDaemon:
    (replica,) = mesh.daemons[0].get("/admin/topology")["replicas"]
    return next(daemon for daemon in mesh.daemons if daemon.node_id == replica["stages"][0]["node"])


def kv_blocks(daemon: LocalDaemon) -> dict[str, int]:
    blocks: dict[str, int] = daemon.get("/admin/status")["kv_blocks"]
    return blocks


def test_the_openai_client_works_against_every_peer(mesh: LocalMesh) -> None:
    for daemon in mesh.daemons:
        with openai_client(daemon) as client:
            (model,) = client.models.list().data
            answer = client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": QUESTION}], temperature=0
            )
            pieces = client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": QUESTION}], temperature=0, stream=True
            )
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
        assert answer.choices[0].message.content == ANSWER
        assert streamed == ANSWER
        assert answer.choices[0].finish_reason == "stop"


def test_greedy_tokens_equal_transformers_for_mixed_lengths_at_once(mesh: LocalMesh) -> None:
    asked = [
        (QUESTION, 60),
        ("What is prefill? What is decode?", 45),
        ("What is a stage?", 120),
        ("Define goodput. " * 20 + "What is TTFT?", 30),
        ("Explain pipeline parallelism.", 90),
        ("What is 12 + 30?", 12),
    ]
    wanted = [expected(token_ids(text), n_tokens) for text, n_tokens in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        runs = [
            pool.submit(Stream(mesh.daemons[at % 3].client, token_ids(text), n_tokens).run)
            for at, (text, n_tokens) in enumerate(asked)
        ]
        answers = [run.result(timeout=120) for run in runs]
    assert answers == wanted


def test_sampling_is_reproducible_and_a_seed_changes_it(mesh: LocalMesh) -> None:
    body = {"prompt": "Q", "max_tokens": 24, "temperature": 1.5, "ignore_eos": True}

    def ask(daemon: LocalDaemon, seed: int) -> list[int]:
        answer = json.loads(daemon.client.post("/generate", body | {"seed": seed}, key=None))
        ids: list[int] = answer["token_ids"]
        return ids

    first = ask(mesh.daemons[0], 7)
    assert ask(mesh.daemons[2], 7) == first
    assert ask(mesh.daemons[1], 8) != first


def test_log_probabilities_are_those_of_transformers(mesh: LocalMesh) -> None:
    prompt = token_ids(QUESTION)
    with openai_client(mesh.daemons[1]) as client:
        answer = client.completions.create(
            model=client.models.list().data[0].id, prompt=prompt, max_tokens=8, temperature=0, logprobs=2
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    wanted = expected_logprobs(prompt, 8)
    assert logprobs.token_logprobs == pytest.approx(wanted, abs=1e-3)
    assert all(len(top) == 2 for top in logprobs.top_logprobs or [])


def test_a_scored_and_echoed_prompt_is_scored_as_by_transformers(mesh: LocalMesh) -> None:
    prompt = token_ids("Define goodput. " * 40)  # more than one step takes
    wanted = [None, *(pytest.approx(one, abs=1e-3) for one in prompt_logprobs(prompt))]
    with openai_client(mesh.daemons[2]) as client:
        model = client.models.list().data[0].id
        scored = client.completions.create(model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        named = client.completions.create(
            model=model, prompt=prompt, max_tokens=3, temperature=0, extra_body={"prompt_logprobs": 0}
        )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == wanted
    assert scored.choices[0].text == "Define goodput. " * 40
    told = named.choices[0].model_extra["prompt_logprobs"]  # type: ignore[index]
    own = [at and at[str(token)]["logprob"] for at, token in zip(told, prompt, strict=True)]
    assert own == wanted


def test_penalties_are_those_of_transformers(mesh: LocalMesh) -> None:
    prompt = token_ids(QUESTION)
    with openai_client(mesh.daemons[1]) as client:
        answer = client.completions.create(
            model=client.models.list().data[0].id,
            prompt=prompt,
            max_tokens=24,
            temperature=0,
            extra_body={"repetition_penalty": 1.3, "min_tokens": 24, "return_token_ids": True},
        )
    assert answer.choices[0].model_extra is not None
    told = answer.choices[0].model_extra["token_ids"]
    assert told == penalised(prompt, 24, repetition_penalty=1.3)


def test_several_answers_to_one_prompt_differ_and_repeat_with_the_seed(mesh: LocalMesh) -> None:
    with openai_client(mesh.daemons[2]) as client:

        def ask() -> list[str]:
            answer = client.completions.create(
                model=client.models.list().data[0].id,
                prompt="Q",
                max_tokens=16,
                temperature=1.5,
                n=3,
                seed=5,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 48
            return [choice.text for choice in answer.choices]

        first = ask()
        assert len(set(first)) == 3
        assert ask() == first


def test_a_fifth_stream_joins_four_long_ones_and_ends_before_them(mesh: LocalMesh) -> None:
    prompts = [token_ids(f"What is {index} + {index}?") for index in range(5)]
    longest = 160
    with ThreadPoolExecutor(5) as pool:
        streams = [Stream(mesh.daemons[at % 3].client, prompts[at], longest) for at in range(4)]
        runs = [pool.submit(stream.run) for stream in streams]
        mesh.await_value(
            lambda: True if all(len(stream.token_ids) > 5 for stream in streams) else None,
            timeout_s=30,
            what="four streams to run",
        )
        fifth = Stream(mesh.daemons[1].client, prompts[4], 20)
        fifth.run()
        for run in runs:
            run.result(timeout=120)
    assert fifth.times_s[-1] < min(stream.times_s[-1] for stream in streams)


def test_a_client_that_leaves_frees_its_blocks_at_once(mesh: LocalMesh) -> None:
    gateway = next(daemon for daemon in mesh.daemons if daemon is not driver(mesh))
    await_idle(mesh, timeout_s=10)
    lines = gateway.client.stream(
        "/generate", {"prompt": token_ids(QUESTION), "max_tokens": 500, "ignore_eos": True, "stream": True}
    )
    next(lines)
    mesh.await_value(
        lambda: True if running(driver(mesh)) == 1 else None,
        timeout_s=5,
        what="the driver to tell of the stream",
    )
    lines.close()
    await_idle(mesh, timeout_s=3)
    assert gateway.get("/admin/requests") == []


def await_idle(mesh: LocalMesh, timeout_s: float) -> None:
    """Until the driver runs nothing and holds no block for anybody."""
    mesh.await_value(
        lambda: True if running(driver(mesh)) == 0 and n_used(driver(mesh)) == 0 else None,
        timeout_s=timeout_s,
        what="the blocks to be free",
    )


def n_used(daemon: LocalDaemon) -> int:
    count: int = daemon.get("/admin/status")["kv_blocks"]["used"]
    return count


def running(daemon: LocalDaemon) -> int:
    count: int = daemon.get("/admin/status")["requests_running"]
    return count


def test_bad_requests_get_openai_shaped_errors(mesh: LocalMesh) -> None:
    with openai_client(mesh.daemons[1]) as client:
        model = client.models.list().data[0].id
        with pytest.raises(NotFoundError) as unknown:
            client.completions.create(model="gpt-5", prompt="x")
        with pytest.raises(BadRequestError) as too_long:
            client.completions.create(model=model, prompt=[5] * 4000)
        with pytest.raises(BadRequestError) as unsupported:
            client.completions.create(model=model, prompt="x", suffix="y")
    codes = [error_code(error.value) for error in (unknown, too_long, unsupported)]
    assert codes == ["model_not_found", "context_length_exceeded", "unsupported_parameter"]


def error_code(error: APIStatusError) -> Any:
    return error.body["code"] if isinstance(error.body, dict) else None


def test_unequal_memory_gives_unequal_layers(mesh: LocalMesh) -> None:
    plan = mesh.daemons[0].get("/admin/plan")
    layers = {device["name"]: device["layers"][1] - device["layers"][0] for device in plan["devices"]}
    assert sum(layers.values()) == 8
    assert layers["three"] > max(layers["one"], layers["two"])
    assert all(device["needed_bytes"] <= device["room_bytes"] for device in plan["devices"])
    assert all(any(name in line for line in plan["explanation"]) for name in layers)


def test_every_peer_tells_the_same_topology(mesh: LocalMesh) -> None:
    seen = [daemon.get("/admin/topology") for daemon in mesh.daemons]
    for key in ("mesh_id", "plan_id", "term", "epoch", "coordinator", "model"):
        assert len({topology[key] for topology in seen}) == 1, key
    topology = seen[2]
    assert {node["name"]: (node["site"], node["state"]) for node in topology["nodes"]} == {
        "one": ("tokyo", "alive"),
        "two": ("tokyo", "alive"),
        "three": ("osaka", "alive"),
    }
    assert all(device["flops_per_s"] > 0 for node in topology["nodes"] for device in node["devices"])
    links = {(link["from"], link["to"]) for link in topology["links"]}
    ids = [daemon.node_id for daemon in mesh.daemons]
    assert links == {(src, dst) for src in ids for dst in ids if src != dst}
    assert sum(link["in_use"] for link in topology["links"]) == 3
    assert all(link["bytes_per_s"] > 0 and link["rtt_p50_s"] > 0 for link in topology["links"])


def test_the_command_line_shows_the_mesh(mesh: LocalMesh) -> None:
    daemon = next(one for one in mesh.daemons if one is not coordinator(mesh))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "daemon", *arguments, "--url", daemon.url],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return done.stdout

    assert all(word in run("topology") for word in ("one", "two", "three", "tokyo", "osaka", "PIPELINE"))
    assert all(name in run("members") for name in ("one", "two", "three"))
    assert json.loads(run("status", "-o", "json"))["ready"] is True
    assert len(json.loads(run("links", "-o", "json"))) == 6
    assert "layers" in run("plan")
    generated = json.loads(run("generate", QUESTION, "--max-tokens", "60", "-o", "json"))
    assert ANSWER in generated["text"]


def test_peers_answer_while_streams_run(mesh: LocalMesh) -> None:
    """No read verb waits for the model."""

    async def ask() -> float:
        started_s = time.monotonic()
        await asyncio.to_thread(mesh.daemons[0].get, "/admin/topology")
        return time.monotonic() - started_s

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(Stream(mesh.daemons[1].client, token_ids(QUESTION), 100).run)
        slowest_s = max(asyncio.run(ask()) for _ in range(5))
        run.result(timeout=60)
    assert slowest_s < 2.0


_BURST = 32
"""More than the mesh can end in a second."""


async def first_refusal(
    session: aiohttp.ClientSession, url: str, body: dict[str, object], asked: list[asyncio.Task[int]]
) -> aiohttp.ClientResponse:
    """The first answer of a request that is not taken: a burst may find no place to wait while more could run yet.

    Those that are taken are added to `asked`.
    """
    async with asyncio.timeout(60):
        while True:
            burst = [asyncio.ensure_future(session.post(url, json=body)) for _ in range(_BURST)]
            answered, _ = await asyncio.wait(burst, timeout=1.0)
            asked += [asyncio.create_task(status_of(request)) for request in burst]
            refusals = [request.result() for request in answered if request.result().status == 429]
            if refusals:
                return refusals[0]


async def status_of(request: asyncio.Future[aiohttp.ClientResponse]) -> int:
    return (await request).status


async def test_a_full_queue_says_when_to_come_back_and_empties_when_clients_leave(mesh: LocalMesh) -> None:
    busy_with = driver(mesh)
    body = {"prompt": token_ids(QUESTION), "max_tokens": 500, "ignore_eos": True}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(at: int) -> int:
            async with session.post(f"{mesh.daemons[at % 3].url}/generate", json=body) as response:
                return response.status

        limits = BatchLimits()
        n_too_many = limits.max_running + limits.max_waiting + 20
        asked = [asyncio.create_task(ask(at)) for at in range(n_too_many)]
        done, _ = await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        assert {task.result() for task in done} == {429}
        refusal = await first_refusal(session, f"{mesh.daemons[0].url}/generate", body, asked)
        assert int(refusal.headers["Retry-After"]) >= 1
        assert (await refusal.json())["error"]["code"] == "queue_full"
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
    await asyncio.to_thread(
        mesh.await_value,
        lambda: True if busy_with.get("/admin/status")["kv_blocks"]["used"] == 0 else None,
        timeout_s=10,
        what="the abandoned requests to be gone",
    )
    prompt = token_ids(QUESTION)

    def once_taken() -> list[int] | None:
        """A gateway learns once a second how full a driver is."""
        try:
            return Stream(mesh.daemons[0].client, prompt, 24).run()
        except Busy:
            return None

    tokens = mesh.await_value(once_taken, timeout_s=10, what="a place in the queue")
    assert tokens == expected(prompt, 24)


def test_no_daemon_logged_an_unforeseen_error(mesh: LocalMesh) -> None:
    for daemon in mesh.daemons:
        log = daemon.log.read_text()
        assert "Traceback" not in log, log
        assert " ERROR " not in log, log
