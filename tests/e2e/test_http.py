"""The HTTP surface on a real socket, over a fake node: what clients send and the exact bytes they get."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from daemon.web.access import HttpOptions, read_api_keys
from daemon.web.completer import seed_of
from daemon.web.http import HttpSurface
from hexmesh import metrics
from hexmesh.errors import Busy, InvalidInput, Lost, NotReady, TimedOut
from hexmesh.wire.data import SamplingParams
from tests.e2e.fake_service import BLOCKER, EOS, REPLY, FakeService, serving

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 100}


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
async def session(service: FakeService) -> AsyncIterator[ClientSession]:
    async with serving(service) as (_, client):
        yield client


@asynccontextmanager
async def sdk(service: FakeService, **options: object) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, without its automatic retries."""
    async with (
        serving(service, **options) as (surface, _),
        openai.AsyncOpenAI(base_url=surface.url + "/v1", api_key="key-1", max_retries=0) as client,
    ):
        yield client


async def post(session: ClientSession, path: str, body: object, **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON and headers of an answer."""
    async with session.post(path, json=body, headers=headers) as response:
        return response.status, await response.json(content_type="application/json"), response.headers


async def post_raw(session: ClientSession, path: str, body: object) -> tuple[str, bytes]:
    """Content type and bytes of a stream."""
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return response.headers["Content-Type"], await response.read()


def events(raw: bytes) -> list[Any]:
    """The JSON of an event stream's data lines, after checking its framing to the byte."""
    frames = raw.decode().split("\n\n")
    assert frames.pop() == ""
    assert frames.pop() == "data: [DONE]"
    frames = [frame for frame in frames if not frame.startswith(":")]
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def n_reply_tokens(service: FakeService) -> int:
    return len(service.codec.encode(REPLY, add_special_tokens=False))


# The official client


async def test_sdk_chat(service: FakeService) -> None:
    async with sdk(service) as client:
        reply = await client.chat.completions.create(model="tiny", messages=CHAT["messages"], seed=5)
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.model, reply.system_fingerprint) == ("tiny", "plan-7")
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == REPLY
    assert reply.choices[0].finish_reason == "stop"
    prompt = service.codec.encode(service.codec.render_chat(CHAT["messages"]), add_special_tokens=False)
    n_tokens = n_reply_tokens(service) + 1
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), n_tokens)
    assert reply.usage.total_tokens == len(prompt) + n_tokens
    (asked,) = service.asked
    assert asked.prompt == prompt
    assert asked.max_tokens == 256 - len(prompt)
    assert asked.stop_token_ids == [EOS]
    assert (asked.sampling.seed, asked.sampling.temperature, asked.sampling.n_logprobs) == (5, 1.0, -1)
    assert asked.sequence == f"{asked.request_id}-0"


async def test_sdk_chat_stream(service: FakeService) -> None:
    async with sdk(service) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=CHAT["messages"], stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *texts, finish, usage = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    assert texts[0].choices[0].delta.content
    assert [chunk.choices[0].delta.role for chunk in texts[1:]] == [None] * (len(texts) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == REPLY
    assert finish.choices[0].finish_reason == "stop"
    assert finish.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == n_reply_tokens(service) + 1
    assert usage.usage.prompt_tokens_details is not None
    assert usage.usage.prompt_tokens_details.cached_tokens == 0


async def test_sdk_completion_of_every_kind_of_prompt(service: FakeService) -> None:
    ids = service.codec.encode("hi there")
    async with sdk(service) as client:
        for prompt in ("hi there", ["hi there"], ids, [ids]):
            reply = await client.completions.create(model="tiny", prompt=prompt, max_tokens=100)
            assert reply.object == "text_completion"
            assert [choice.text for choice in reply.choices] == [REPLY]
        two = await client.completions.create(model="tiny", prompt=[ids, ids[:2]], n=2, max_tokens=3)
    assert all(asked.prompt == ids for asked in service.asked[:4])
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in two.choices} == {"length"}
    assert two.usage is not None
    assert (two.usage.prompt_tokens, two.usage.completion_tokens) == (len(ids) + 2, 12)
    last = sorted(service.asked[4:], key=lambda asked: asked.sequence)
    assert [(asked.prompt, asked.sampling.choice) for asked in last] == [
        (ids, 0),
        (ids, 1),
        (ids[:2], 0),
        (ids[:2], 1),
    ]


async def test_sdk_n_answers_interleave_in_a_stream(service: FakeService) -> None:
    service.replies = ("one 1", "two 2", "three 3")
    texts = ["", "", ""]
    roles = [0, 0, 0]
    async with sdk(service) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=CHAT["messages"], n=3, stream=True, stream_options={"include_usage": True}
        )
        order = []
        async for chunk in stream:
            for choice in chunk.choices:
                order.append(choice.index)
                texts[choice.index] += choice.delta.content or ""
                roles[choice.index] += choice.delta.role is not None
    assert texts == ["one 1", "two 2", "three 3"]
    assert roles == [1, 1, 1]
    assert order != sorted(order)
    assert len({asked.request_id for asked in service.asked}) == 1
    assert len({asked.sampling.seed for asked in service.asked}) == 1


async def test_sdk_chat_logprobs(service: FakeService) -> None:
    async with sdk(service) as client:
        reply = await client.chat.completions.create(
            model="tiny", messages=CHAT["messages"], logprobs=True, top_logprobs=2
        )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(token.bytes or []) for token in content) == REPLY.encode()
    assert len(content) == n_reply_tokens(service)
    assert any(token.token.startswith("bytes:\\x") for token in content)
    assert [token.logprob for token in content] == [-0.5] * len(content)
    assert [[top.logprob for top in token.top_logprobs] for token in content] == [[-0.5, -1.5]] * len(content)
    assert content[0].top_logprobs[0].token == content[0].token


async def test_sdk_completion_logprobs(service: FakeService) -> None:
    service.replies = ("12 nodes",)
    async with sdk(service) as client:
        reply = await client.completions.create(model="tiny", prompt="hi", logprobs=1, max_tokens=50)
        stream = await client.completions.create(
            model="tiny", prompt="hi", logprobs=1, max_tokens=50, stream=True
        )
        chunks = [chunk async for chunk in stream]
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == "12 nodes"
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:n])) for n in range(len(logprobs.tokens))]
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens]
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in streamed for token in part.tokens or []] == logprobs.tokens
    assert [at for part in streamed for at in part.text_offset or []] == logprobs.text_offset


@pytest.mark.parametrize(
    ("refusal", "kind", "retry_after"),
    [
        (NotReady("no route", code="no_route", retry_after_s=2.4), openai.InternalServerError, "3"),
        (Busy("the queue is full", code="queue_full", retry_after_s=0.2), openai.RateLimitError, "1"),
        (Lost("node two is gone"), openai.InternalServerError, None),
        (TimedOut("too slow"), openai.InternalServerError, None),
        (InvalidInput("a sequence of that name runs"), openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_sdk_raises_by_status(
    service: FakeService,
    refusal: Any,
    kind: type[openai.APIStatusError],
    retry_after: str | None,
    stream: bool,
) -> None:
    service.refusal = refusal
    async with sdk(service) as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="tiny", messages=CHAT["messages"], stream=stream)
    error = caught.value
    assert error.status_code == refusal.http_status
    assert error.response.headers.get("Retry-After") == retry_after
    assert (error.code, error.param) == (refusal.code or None, None)
    assert refusal.message in error.message


async def test_sdk_sees_a_stream_break(service: FakeService) -> None:
    service.failure_after = (3, Lost("node two is gone", code="stage_lost"))
    async with sdk(service) as client:
        stream = await client.chat.completions.create(model="tiny", messages=CHAT["messages"], stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="node two is gone"):  # noqa: PT012 (the loop raises)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert text
    assert REPLY.startswith(text)


async def test_sdk_lists_and_retrieves_the_model(service: FakeService) -> None:
    async with sdk(service) as client:
        (listed,) = (await client.models.list()).data
        assert listed == await client.models.retrieve("tiny")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
    assert listed.model_dump(exclude_unset=True) == {
        "id": "tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "hexmesh",
        "root": "shipped/tiny",
        "parent": None,
        "max_model_len": 256,
        "permission": [],
    }


# Bytes on the wire


async def test_chat_stream_to_the_byte(service: FakeService, session: ClientSession) -> None:
    service.replies = ("12",)
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "abc"}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["X-Request-Id"] == "abc"
        raw = (await response.read()).decode()
    created = json.loads(raw.split("\n\n")[0].removeprefix("data: "))["created"]
    n_prompt = len(service.asked[0].prompt)
    head = (
        f'{{"id":"chatcmpl-abc","object":"chat.completion.chunk","created":{created},"model":"tiny",'
        f'"system_fingerprint":"plan-7","choices":'
    )
    lines = [
        head
        + '[{"index":0,"delta":{"role":"assistant","content":"1"},"logprobs":null,"finish_reason":null}]',
        head + '[{"index":0,"delta":{"content":"2"},"logprobs":null,"finish_reason":null}]',
        head + '[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]',
    ]
    usage = (
        f'[],"usage":{{"prompt_tokens":{n_prompt},"completion_tokens":3,"total_tokens":{n_prompt + 3},'
        f'"prompt_tokens_details":{{"cached_tokens":0}}}}}}'
    )
    expected = [*(line + ',"usage":null}' for line in lines), head + usage, "[DONE]"]
    assert raw == "".join(f"data: {line}\n\n" for line in expected)


async def test_an_old_client_gets_its_stream_unframed(service: FakeService) -> None:
    body = json.dumps({**PROMPT, "stream": True}).encode()
    async with serving(service) as (surface, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(
            b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        async with asyncio.timeout(5):
            head, _, raw = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert b"chunked" not in head.lower()
    assert "".join(event["choices"][0]["text"] for event in events(raw)) == REPLY


async def test_usage_runs_along_when_asked(service: FakeService, session: ClientSession) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**PROMPT, "stream": True, "stream_options": options}
    _, raw = await post_raw(session, "/v1/completions", body)
    counts = [event["usage"]["completion_tokens"] for event in events(raw)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] == n_reply_tokens(service) + 1


async def test_a_waiting_stream_says_that_it_lives(service: FakeService) -> None:
    service.delay_s = 0.25
    async with serving(service, keep_alive_s=0.05) as (_, session):
        _, raw = await post_raw(session, "/v1/chat/completions", {**CHAT, "stream": True})
    assert raw.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events(raw)) == REPLY


async def test_a_refusal_after_the_first_comment_ends_the_stream(service: FakeService) -> None:
    service.delay_s, service.refusal = 0.2, Busy("full", code="queue_full")
    async with serving(service, keep_alive_s=0.05) as (_, session):
        _, raw = await post_raw(session, "/v1/chat/completions", {**CHAT, "stream": True})
    (event,) = events(raw)
    assert event == {
        "error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}
    }


async def test_a_bug_in_the_middle_shows_no_trace(
    service: FakeService, session: ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    service.failure_after = (2, KeyError("secret detail"))
    _, raw = await post_raw(session, "/v1/chat/completions", {**CHAT, "stream": True})
    assert events(raw)[-1]["error"]["code"] == "internal_error"
    status, answer, headers = await post(session, "/v1/chat/completions", CHAT)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert headers["x-should-retry"] == "false"
    assert b"secret" not in raw + json.dumps(answer).encode()
    assert "secret detail" in caplog.text


async def test_parts_of_several_tokens_give_the_same_text(
    service: FakeService, session: ClientSession
) -> None:
    service.tokens_a_part = 4
    _, raw = await post_raw(session, "/v1/completions", {**PROMPT, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events(raw)) == REPLY


async def test_an_empty_answer_still_has_its_role(service: FakeService, session: ClientSession) -> None:
    service.replies = ("",)
    _, raw = await post_raw(session, "/v1/chat/completions", {**CHAT, "stream": True})
    first, last = events(raw)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


# Stops, cancels, disconnects


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_the_text_and_ends_the_sequence(
    service: FakeService, session: ClientSession, stream: bool
) -> None:
    service.tokens_a_part = 3
    body = {**CHAT, "stop": ["nowhere", "2 nod"], "stream": stream, "logprobs": True}
    if stream:
        _, raw = await post_raw(session, "/v1/chat/completions", body)
        choices = [event["choices"][0] for event in events(raw)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        tokens = [
            token["token"] for choice in choices for token in (choice["logprobs"] or {}).get("content", [])
        ]
        last = choices[-1]
    else:
        _, answer, _ = await post(session, "/v1/chat/completions", body)
        last = answer["choices"][0]
        text = last["message"]["content"]
        tokens = [token["token"] for token in last["logprobs"]["content"]]
    assert text == "".join(tokens) == "The mesh has 1"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "2 nod")
    await service.until(lambda: len(service.ended) == 1)


async def test_the_stop_string_is_kept_on_demand(service: FakeService, session: ClientSession) -> None:
    body = {**PROMPT, "stop": "2 nod", "include_stop_str_in_output": True}
    _, answer, _ = await post(session, "/v1/completions", body)
    assert answer["choices"][0]["text"] == "The mesh has 12 nod"


async def test_stop_tokens_and_ignored_ends_reach_the_service(
    service: FakeService, session: ClientSession
) -> None:
    service.replies = ("123",)
    two = service.codec.encode("2", add_special_tokens=False)[-1]
    _, answer, _ = await post(session, "/v1/completions", {**PROMPT, "stop_token_ids": [two]})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("1", "stop", two)
    _, answer, _ = await post(session, "/v1/completions", {**PROMPT, "ignore_eos": True, "max_tokens": 9})
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("123123" + "1", "length")
    _, answer, _ = await post(
        session,
        "/v1/completions",
        {**PROMPT, "ignore_eos": True, "max_tokens": 5, "skip_special_tokens": False},
    )
    assert answer["choices"][0]["text"] == "123<|eos|>1"
    assert [asked.stop_token_ids for asked in service.asked] == [[EOS, two], [], []]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_sequences(service: FakeService, path: str, stream: bool) -> None:
    service.hang_after = 2
    body = {"prompt": "hi"} if path == "/generate" else {**CHAT, **PROMPT, "n": 2}
    n_sequences = 1 if path == "/generate" else 2
    async with serving(service) as (_, session):
        task = asyncio.create_task(post_raw(session, path, {**body, "stream": stream}))
        await service.until(lambda: service.n_hanging == n_sequences)
        left_s = time.monotonic()
        task.cancel()
        await asyncio.wait([task])
        await service.until(lambda: len(service.ended) == n_sequences)
    assert max(service.ended.values()) - left_s < 1.0
    assert outcomes(service) == {"cancelled": 1.0}


@pytest.mark.parametrize("stream", [False, True])
async def test_cancel_by_id(service: FakeService, session: ClientSession, stream: bool) -> None:
    service.hang_after = 2
    body = {**CHAT, "stream": stream}
    asking = session.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "job/1"})
    task = asyncio.create_task(asking.__aenter__())
    await service.until(lambda: service.n_hanging == 1)
    assert (await post(session, "/v1/cancel/other", {}))[0] == 404
    assert (await post(session, "/v1/cancel/chatcmpl-job/1", {}))[1] == {"id": "job/1", "cancelled": True}
    response = await task
    raw = await response.read()
    response.close()
    assert response.status == (200 if stream else 499)
    error = (events(raw)[-1] if stream else json.loads(raw))["error"]
    assert (error["type"], error["code"]) == ("request_cancelled", "cancelled")
    assert outcomes(service) == {"cancelled": 1.0}


@pytest.mark.parametrize(
    ("allowed_bytes", "allowed_s"), [(2**20, 60.0), (2**40, 0.2)], ids=["too-much-unread", "nothing-read"]
)
async def test_a_client_that_stops_reading_is_given_up(
    service: FakeService, allowed_bytes: int, allowed_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.web.stream_writer.MAX_UNREAD_BYTES", allowed_bytes)
    service.max_model_tokens = 10**6
    async with serving(service, write_timeout_s=allowed_s) as (surface, _):
        narrow = socket.socket()
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        narrow.connect(("127.0.0.1", surface.port))
        reader, writer = await asyncio.open_connection(sock=narrow, limit=1)
        # Twenty log-probabilities a token fill the socket's buffers quickly.
        wide = {**PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 100_000, "logprobs": 20}
        body = json.dumps(wide).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        await service.until(lambda: len(service.ended) == 1)
        writer.close()
        del reader
    assert outcomes(service) == {"cancelled": 1.0}


async def test_a_bug_in_one_requests_text_ends_that_request_alone(
    service: FakeService, session: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise KeyError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr("daemon.web.answers.AnswerText.push", fail)
        status, answer, _ = await post(session, "/v1/completions", {**PROMPT, "n": 2})
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    await service.until(lambda: len(service.ended) == 2)
    assert outcomes(service) == {"failed": 1.0}
    assert (await post(session, "/v1/completions", PROMPT))[0] == 200


async def test_cached_prompt_tokens_are_told_and_counted(
    service: FakeService, session: ClientSession
) -> None:
    service.n_cached = 1
    prompt = service.codec.encode("hi there")
    body = {"prompt": [prompt, prompt[:2]], "n": 2, "max_tokens": 3}
    _, answer, _ = await post(session, "/v1/completions", body)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    _, answer, _ = await post(session, "/v1/chat/completions", CHAT)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    _, raw = await post_raw(session, "/generate", {"prompt": prompt, "stream": True})
    assert json.loads(raw.splitlines()[-1])["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert service.registry.get_sample_value("hexmesh_prefix_cache_hit_tokens_total") == 4


async def test_one_request_id_runs_once_at_a_time(service: FakeService, session: ClientSession) -> None:
    service.hang_after = 0
    first = asyncio.create_task(post(session, "/v1/completions", PROMPT, **{"X-Request-Id": "same"}))
    await service.until(lambda: service.n_hanging == 1)
    status, answer, _ = await post(session, "/v1/completions", PROMPT, **{"X-Request-Id": "same"})
    assert (status, answer["error"]["code"]) == (409, "request_id_in_use")
    first.cancel()
    await asyncio.wait([first])
    await service.until(lambda: "same-0" in service.ended)
    service.hang_after = None
    assert (await post(session, "/v1/completions", PROMPT, **{"X-Request-Id": "same"}))[0] == 200


# /generate


async def test_generate_whole(service: FakeService, session: ClientSession) -> None:
    status, answer, headers = await post(session, "/generate", {"prompt": "hi"}, **{"X-Request-Id": "r1"})
    reply = service.codec.encode(REPLY, add_special_tokens=False)
    n_prompt = len(service.codec.encode("hi"))
    assert status == 200
    assert answer == {
        "request_id": "r1",
        "text": REPLY,
        "token_ids": [*reply, EOS],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": len(reply) + 1,
            "total_tokens": n_prompt + len(reply) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert headers["X-Request-Id"] == "r1"
    (asked,) = service.asked
    assert (asked.sampling.temperature, asked.max_tokens) == (0.0, 128)


async def test_generate_lines(service: FakeService, session: ClientSession) -> None:
    kind, raw = await post_raw(session, "/generate", {"prompt": [0, 5], "stream": True, "max_tokens": 100})
    *lines, end = [json.loads(line) for line in raw.decode().removesuffix("\n").split("\n")]
    assert kind == "application/x-ndjson; charset=utf-8"
    assert "".join(line["text"] for line in lines) == REPLY
    assert [line["index"] for line in lines] == list(range(n_reply_tokens(service) + 1))
    assert [line["token_id"] for line in lines] == service.script(service.asked[0])
    assert end == {"finish_reason": "stop", "usage": end["usage"]}
    assert end["usage"]["completion_tokens"] == len(lines)


@pytest.mark.parametrize("field", [{"n": 2}, {"logprobs": 3}])
async def test_generate_refuses_what_only_the_openai_routes_do(
    service: FakeService, session: ClientSession, field: dict[str, Any]
) -> None:
    status, answer, _ = await post(session, "/generate", {"prompt": "hi", **field})
    assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert (await post(session, "/generate", {"prompt": "hi", "n": 1}))[0] == 200


async def test_generate_breaks_with_an_error_line(service: FakeService, session: ClientSession) -> None:
    service.failure_after = (1, Lost("gone"))
    _, raw = await post_raw(session, "/generate", {"prompt": "hi", "stream": True})
    assert json.loads(raw.splitlines()[-1])["error"]["message"] == "gone"


# Parameters


async def test_sampling_parameters_arrive(service: FakeService, session: ClientSession) -> None:
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -1}
    await post(session, "/v1/completions", {**PROMPT, **body})
    sampling = service.asked[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert sampling.seed == 2**63 - 1
    await post(session, "/v1/completions", {**PROMPT, "top_p": 0, "top_k": -1, "temperature": 0})
    sampling = service.asked[1].sampling
    assert 0 < sampling.top_p < 1e-5
    assert (sampling.top_k, sampling.temperature) == (0, 0.0)


async def test_without_a_seed_the_request_id_is_the_seed(
    service: FakeService, session: ClientSession
) -> None:
    for _ in range(2):
        await post(session, "/v1/completions", PROMPT, **{"X-Request-Id": "again"})
    await post(session, "/v1/completions", PROMPT)
    await post(session, "/v1/completions", {**PROMPT, "seed": 0})
    seeds = [asked.sampling.seed for asked in service.asked]
    assert seeds[0] == seeds[1] == seed_of("again")
    assert seeds[2] != seeds[0]
    assert seeds[3] == 0
    assert all(0 <= seed < 2**63 for seed in seeds)


NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "best_of": 1,
    "logit_bias": {},
    "echo": False,
    "suffix": None,
    "tools": None,
    "tool_choice": "none",
    "user": "me",
    "response_format": {"type": "text"},
    "logprobs": None,
    "min_tokens": 0,
    "store": True,
    "metadata": {"a": "b"},
    "never_heard_of": [1],
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_neutral_and_unknown_fields_are_accepted(session: ClientSession, path: str) -> None:
    status, answer, _ = await post(session, path, {**CHAT, **PROMPT, **NEUTRAL})
    assert status == 200, answer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 3),
        ("suffix", "end"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {}),
        ("continue_final_message", True),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_unsupported_parameters_are_refused_by_name(
    service: FakeService, session: ClientSession, path: str, name: str, value: object
) -> None:
    base: dict[str, object] = {"prompt": "hi"} if path == "/generate" else {**CHAT, **PROMPT}
    status, answer, headers = await post(session, path, {**base, name: value})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", name)
    assert name in answer["error"]["message"]
    assert headers["x-should-retry"] == "false"
    assert service.asked == []


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/v1/chat/completions", "echo", True),
        ("/generate", "echo", True),
        ("/generate", "prompt_logprobs", 0),
        ("/generate", "return_token_ids", True),
    ],
)
async def test_what_one_route_takes_another_may_refuse(
    session: ClientSession, path: str, name: str, value: object
) -> None:
    base: dict[str, object] = {"prompt": "hi"} if path == "/generate" else CHAT
    status, answer, _ = await post(session, path, {**base, name: value})
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_parameter", name)


SAMPLED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "logit_bias": {"5": 1, "1023": -100},
    "seed": 3,
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_everything_that_sampling_knows_reaches_the_service(
    service: FakeService, session: ClientSession, path: str
) -> None:
    base: dict[str, object] = {"prompt": "hi"} if path == "/generate" else {**CHAT, **PROMPT}
    extra = {"min_tokens": 2, "priority": -4}
    status, answer, _ = await post(session, path, {**base, **SAMPLED, **extra, "max_tokens": 50})
    assert status == 200, answer
    (asked,) = service.asked
    bias = [(5, 1.0), (1023, -100.0)]
    assert asked.sampling == SamplingParams(**{**SAMPLED, "logit_bias": bias})
    assert (asked.min_tokens, asked.priority, asked.n_prompt_logprobs) == (2, -4, -1)


async def test_a_stop_string_is_not_looked_for_before_min_tokens(
    service: FakeService, session: ClientSession
) -> None:
    service.replies = ("1212",)
    body = {**PROMPT, "stop": "2"}
    texts = []
    for min_tokens in (0, 2, 3, 4):
        _, answer, _ = await post(session, "/v1/completions", {**body, "min_tokens": min_tokens})
        texts.append((answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]))
    assert texts == [("1", "2"), ("121", "2"), ("121", "2"), ("1212", None)]


async def test_sdk_echo_begins_with_the_prompt(service: FakeService) -> None:
    service.replies = ("12",)
    prompt = service.codec.encode("Köln hi")
    async with sdk(service) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "Köln hi", "echo": True}
        plain = await client.completions.create(**asked)
        scored = await client.completions.create(**asked, logprobs=1)
        stream = await client.completions.create(**asked, logprobs=1, stream=True)
        chunks = [chunk async for chunk in stream]
        none = await client.completions.create(**asked, logprobs=0, max_tokens=0)
    assert [one.choices[0].text for one in (plain, scored, none)] == ["Köln hi12", "Köln hi12", "Köln hi"]
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[1:] == [*(service.codec.token_text(token) for token in prompt[1:]), "1", "2"]
    assert logprobs.token_logprobs == [None, *[-0.5] * (len(prompt) + 1)]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert len(logprobs.top_logprobs[1]) == 2  # the likeliest and the prompt's own
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[-2:] == [7, 8]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Köln hi12"
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in streamed for token in part.tokens or []] == logprobs.tokens
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.token_logprobs == [None, *[-0.5] * (len(prompt) - 1)]
    assert none.choices[0].finish_reason == "length"
    assert none.usage is not None
    assert (none.usage.prompt_tokens, none.usage.completion_tokens) == (len(prompt), 0)
    assert [asked.n_prompt_logprobs for asked in service.asked] == [-1, 1, 1, 0]


async def test_prompt_logprobs_are_shaped_as_vllm_shapes_them(
    service: FakeService, session: ClientSession
) -> None:
    body = {"prompt": [0, 70, 71], "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}
    _, answer, _ = await post(session, "/v1/completions", body)
    text = service.codec.token_text
    expected = [
        None,
        *(
            {
                str(token + 1): {"logprob": -0.25, "rank": 1, "decoded_token": text(token + 1)},
                str(token): {"logprob": -0.5, "rank": 2, "decoded_token": text(token)},
            }
            for token in (70, 71)
        ),
    ]
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"] == expected
        assert choice["prompt_token_ids"] == [0, 70, 71]
        assert choice["token_ids"] == service.codec.encode(REPLY, add_special_tokens=False)[:2]
    assert [asked.n_prompt_logprobs for asked in service.asked] == [1, -1]  # a prompt is scored once

    _, chat, _ = await post(
        session, "/v1/chat/completions", {**CHAT, "prompt_logprobs": 0, "return_token_ids": True}
    )
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert len(chat["choices"][0]["token_ids"]) == chat["usage"]["completion_tokens"]
    assert "prompt_logprobs" not in chat["choices"][0]


BAD_BODIES: list[tuple[str, bytes, str, str | None]] = [
    ("/v1/completions", b"", "invalid_json", None),
    ("/v1/completions", b"{", "invalid_json", None),
    ("/v1/completions", b"[]", "invalid_json", None),
    ("/v1/completions", b"null", "invalid_json", None),
    ("/v1/completions", b"\xff\xfe", "invalid_json", None),
    ("/v1/completions", b'{"prompt": "\\ud800"}', "invalid_json", None),
    ("/v1/completions", b"[" * 100_000, "invalid_json", None),
    ("/v1/completions", b"{}", "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": 5}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": {"a": 1}}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": ["a", 1]}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": []}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": [[]]}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": [-1]}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": [1024]}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": ["a", "b"], "n": 100}', "invalid_value", "prompt"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', "invalid_value", "max_tokens"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1, "echo": true}', "invalid_value", "max_tokens"),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": "7"}', "invalid_value", "max_tokens"),
    ("/v1/completions", b'{"prompt": "a", "min_tokens": 17}', "invalid_value", "min_tokens"),
    ("/v1/completions", b'{"prompt": "a", "presence_penalty": 2.1}', "invalid_value", "presence_penalty"),
    ("/v1/completions", b'{"prompt": "a", "frequency_penalty": -3}', "invalid_value", "frequency_penalty"),
    ("/v1/completions", b'{"prompt": "a", "repetition_penalty": 0}', "invalid_value", "repetition_penalty"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"5": 101}}', "invalid_value", "logit_bias"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"x": 1}}', "invalid_value", "logit_bias"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": {"1024": 1}}', "invalid_value", "logit_bias"),
    ("/v1/completions", b'{"prompt": "a", "logit_bias": [5]}', "invalid_value", "logit_bias"),
    ("/v1/completions", b'{"prompt": "a", "priority": 4294967296}', "invalid_value", "priority"),
    ("/v1/completions", b'{"prompt": "a", "prompt_logprobs": 21}', "invalid_value", "prompt_logprobs"),
    (
        "/v1/completions",
        b'{"prompt": "a", "prompt_logprobs": 1, "stream": true}',
        "invalid_value",
        "prompt_logprobs",
    ),
    (
        "/v1/completions",
        b'{"prompt": "a", "return_token_ids": true, "stream": true}',
        "invalid_value",
        "return_token_ids",
    ),
    ("/v1/completions", b'{"prompt": "a", "temperature": 3}', "invalid_value", "temperature"),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', "invalid_value", "temperature"),
    ("/v1/completions", b'{"prompt": "a", "temperature": true}', "invalid_value", "temperature"),
    ("/v1/completions", b'{"prompt": "a", "top_p": 1.5}', "invalid_value", "top_p"),
    ("/v1/completions", b'{"prompt": "a", "top_k": -2}', "invalid_value", "top_k"),
    ("/v1/completions", b'{"prompt": "a", "n": 0}', "invalid_value", "n"),
    ("/v1/completions", b'{"prompt": "a", "stop": ""}', "invalid_value", "stop"),
    ("/v1/completions", b'{"prompt": "a", "stop": ["x", ""]}', "invalid_value", "stop"),
    ("/v1/completions", b'{"prompt": "a", "logprobs": 21}', "invalid_value", "logprobs"),
    ("/v1/completions", b'{"prompt": "a", "stop_token_ids": [5000]}', "invalid_value", "stop_token_ids"),
    ("/v1/completions", b'{"prompt": "a", "stream_options": {}}', "invalid_value", "stream_options"),
    ("/v1/chat/completions", b"{}", "invalid_value", "messages"),
    ("/v1/chat/completions", b'{"messages": []}', "invalid_value", "messages"),
    ("/v1/chat/completions", b'{"messages": "hi"}', "invalid_value", "messages"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}]}', "invalid_value", "messages[0].content"),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "boss", "content": "b"}]}',
        "invalid_value",
        "messages[1].role",
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": 7}]}',
        "invalid_value",
        "messages[0].content",
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "unsupported_parameter",
        "messages[0].content[0]",
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}',
        "invalid_value",
        "top_logprobs",
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "tool", "content": "a"}]}',
        "chat_template_refused",
        None,
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": []}}',
        "invalid_value",
        None,
    ),
    ("/generate", b"{}", "invalid_value", "prompt"),
    ("/generate", b'{"prompt": ["a"]}', "invalid_value", "prompt"),
    ("/tokenize", b"{}", "invalid_value", "prompt"),
    ("/detokenize", b'{"tokens": [1024]}', "invalid_value", "tokens"),
]


@pytest.mark.parametrize(("path", "body", "code", "param"), BAD_BODIES)
async def test_bad_bodies(
    service: FakeService, session: ClientSession, path: str, body: bytes, code: str, param: str | None
) -> None:
    async with session.post(path, data=body) as response:
        assert response.content_type == "application/json"
        error = (await response.json())["error"]
    assert (response.status, error["type"], error["code"], error["param"]) == (
        400,
        "invalid_request_error",
        code,
        param,
    )
    assert error["message"]
    assert service.asked == []


async def test_too_long_prompts_are_refused_with_the_numbers(
    service: FakeService, session: ClientSession
) -> None:
    service.max_model_tokens = 20
    status, answer, _ = await post(session, "/v1/completions", {"prompt": [5] * 20})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "20 tokens and the request needs 21: 20 in the prompt" in answer["error"]["message"]
    status, answer, _ = await post(session, "/v1/completions", {"prompt": [5] * 18, "max_tokens": 3})
    assert (status, answer["error"]["param"]) == (400, "max_tokens")
    assert "18 in the prompt and 3 to generate" in answer["error"]["message"]
    status, answer, _ = await post(session, "/v1/completions", {"prompt": [5] * 18})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


async def test_list_content_is_text(service: FakeService, session: ClientSession) -> None:
    parts = [{"type": "text", "text": "hi"}]
    await post(session, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    await post(session, "/v1/chat/completions", CHAT)
    assert service.asked[0].prompt == service.asked[1].prompt


async def test_tokenize_and_detokenize(service: FakeService, session: ClientSession) -> None:
    _, answer, _ = await post(session, "/tokenize", {"model": "tiny", "prompt": "hi 12"})
    ids = service.codec.encode("hi 12")
    assert answer == {"count": len(ids), "max_model_len": 256, "tokens": ids}
    _, answer, _ = await post(session, "/tokenize", {"prompt": "hi 12", "add_special_tokens": False})
    assert answer["tokens"] == ids[1:]
    assert (await post(session, "/detokenize", {"tokens": ids[1:]}))[1] == {"prompt": "hi 12"}
    _, answer, _ = await post(session, "/tokenize", {"messages": CHAT["messages"]})
    assert (await post(session, "/detokenize", answer))[1]["prompt"] == service.codec.render_chat(
        CHAT["messages"]
    )
    _, long, _ = await post(session, "/tokenize", {"prompt": "mesh " * 5000})
    assert long["tokens"] == service.codec.encode("mesh " * 5000)


# Readiness


async def test_ready_names_the_blocker(service: FakeService, session: ClientSession) -> None:
    async with session.get("/ready") as response:
        assert (response.status, await response.json()) == (200, {"ready": True, "blocker": None})
    service.blocker = BLOCKER
    async with session.get("/ready") as response:
        assert response.status == 503
        assert await response.json() == {
            "ready": False,
            "blocker": {
                "code": "model_does_not_fit",
                "message": BLOCKER.message,
                "next_step": "join another node",
                "needed_bytes": 8 * 2**20,
                "room_bytes": 4 * 2**20,
            },
        }
    async with session.get("/v1/models") as response:
        assert (response.status, await response.json()) == (200, {"object": "list", "data": []})
    async with session.get("/v1/models/tiny") as response:
        assert response.status == 404
    for path, body in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", PROMPT),
        ("/generate", {"prompt": "a"}),
    ):
        status, answer, headers = await post(session, path, body)
        assert (status, headers["Retry-After"], headers["x-should-retry"]) == (503, "2", "false")
        assert answer["error"] == {
            "message": BLOCKER.message,
            "type": "service_unavailable",
            "param": None,
            "code": BLOCKER.code,
            "next_step": BLOCKER.next_step,
            "needed_bytes": BLOCKER.needed_bytes,
            "room_bytes": BLOCKER.room_bytes,
        }
    assert service.asked == []
    for path in ("/health", "/live", "/ping", "/version", "/metrics"):
        async with session.get(path) as response:
            assert response.status == 200


async def test_other_models_do_not_exist(session: ClientSession) -> None:
    status, answer, _ = await post(session, "/v1/completions", {**PROMPT, "model": "gpt-4"})
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (
        404,
        "not_found_error",
        "model_not_found",
    )
    assert answer["error"]["param"] == "model"


# Paths, methods, sizes, ids


@pytest.mark.parametrize("path", ["/v1/models", "/v1//models", "//v1/models/", "/v1/models//"])
async def test_slashes_do_not_matter(service: FakeService, path: str) -> None:
    async with serving(service) as (surface, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert raw.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(raw.partition(b"\r\n\r\n")[2])["data"][0]["id"] == "tiny"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "route_not_found"),
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("POST", "/v1", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes(session: ClientSession, method: str, path: str, status: int, code: str) -> None:
    async with session.request(method, path, headers={"Accept": "text/html"}) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code
        assert response.headers["X-Request-Id"]
        assert ("Allow" in response.headers) == (status == 405)


async def test_bodies_have_a_limit(service: FakeService) -> None:
    async with serving(service, max_body_bytes=1000) as (_, session):
        status, answer, _ = await post(session, "/v1/completions", {"prompt": "x" * 2000})
        assert (status, answer["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("request_id", ["x" * 129, "with space", "é"])
async def test_request_ids_must_fit_a_header(session: ClientSession, request_id: str) -> None:
    status, answer, headers = await post(session, "/v1/completions", PROMPT, **{"X-Request-Id": request_id})
    assert (status, answer["error"]["param"]) == (400, "X-Request-Id")
    assert headers["X-Request-Id"] != request_id


async def test_garbage_is_answered_without_html(service: FakeService) -> None:
    async with serving(service) as (surface, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(b"\x16\x03\x01 nonsense\r\nAccept: text/html\r\n\r\n")
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert b"<html" not in raw.lower()
    assert b"Traceback" not in raw


# Keys, hosts, origins

BEARER = {"Authorization": "Bearer key-1"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("POST", "/v1/cancel/x"),
        ("POST", "/generate"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/admin/topology"),
    ],
)
async def test_keys(service: FakeService, method: str, path: str) -> None:
    async with serving(service, api_keys=("key-0", "key-1"), admin_key="root") as (_, session):
        for headers, code in (
            ({}, "missing_api_key"),
            ({"Authorization": "Basic key-1"}, "missing_api_key"),
            ({"Authorization": "Bearer "}, "missing_api_key"),
            ({"Authorization": "Bearer key"}, "invalid_api_key"),
            ({"Authorization": "Bearer key-12"}, "invalid_api_key"),
        ):
            async with session.request(method, path, headers=headers) as response:
                error = (await response.json())["error"]
                assert (response.status, error["type"], error["code"]) == (401, "authentication_error", code)
        for key in ("key-0", "key-1", "root"):
            headers = {"Authorization": f"bearer {key}"}
            async with session.request(method, path, headers=headers) as response:
                assert response.status != 401


async def test_open_routes_need_no_key(service: FakeService) -> None:
    async with serving(service, api_keys=("key-1",)) as (_, session):
        for path in ("/health", "/live", "/ping", "/ready", "/version", "/metrics"):
            async with session.get(path) as response:
                assert response.status == 200


async def test_sdk_with_a_key(service: FakeService) -> None:
    async with sdk(service, api_keys=("key-1",)) as client:
        assert (await client.models.list()).data
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="other").models.list()


@pytest.mark.parametrize(
    ("path", "body", "call", "status"),
    [
        ("/admin/token", {"ttl_s": 60, "uses": 2}, ("token", (60.0, 2)), 200),
        ("/admin/token", None, ("token", (3600.0, 1)), 200),
        ("/admin/token/revoke", {"id": "ab12"}, ("revoke", "ab12"), 200),
        ("/admin/node/remove", {"node": "b"}, ("remove", "b"), 200),
        ("/admin/replan", {"reason": "test"}, ("replan", "test"), 202),
        ("/admin/leave", {"forget": True}, ("leave", True), 202),
        ("/admin/node/drain", {"node": "two", "deadline_s": 5}, ("order", ("two", "drain", 5.0)), 200),
        ("/admin/node/cordon", {"node": "two"}, ("order", ("two", "cordon", 60.0)), 200),
        ("/admin/node/uncordon", {"node": "full"}, ("order", ("full", "uncordon", 60.0)), 409),
    ],
)
async def test_changing_the_mesh_needs_the_admin_key(
    service: FakeService, path: str, body: object, call: object, status: int
) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    async with serving(service, api_keys=("key-1",), admin_key="root") as (_, session):
        for key, refused in ((None, 401), ("key-1", 403)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with session.post(path, data=data, headers=headers) as response:
                assert (response.status, "error" in await response.json()) == (refused, True)
        assert service.calls == []
        async with session.post(path, data=data, headers={"Authorization": "Bearer root"}) as response:
            assert response.status == status
            answer = await response.json()
    assert service.calls == [call]
    if status == 409:
        assert (answer["error"]["needed_bytes"], answer["error"]["room_bytes"]) == (3, 2)
    if path == "/admin/token":
        assert set(answer) == {"token", "join_command", "expires_s", "uses"}


async def test_tokens_are_shown_to_the_admin_key_alone(service: FakeService) -> None:
    async with serving(service, api_keys=("key-1",), admin_key="root") as (_, session):
        for key, status in ((None, 401), ("key-1", 403), ("root", 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with session.get("/admin/tokens", headers=headers) as response:
                assert response.status == status
                answer = await response.json()
    assert answer == json.loads(msgspec.json.encode(service.tokens()))


async def test_without_an_admin_key_nobody_changes_the_mesh(
    service: FakeService, session: ClientSession
) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}):
        assert (await post(session, "/admin/leave", {}, **headers))[0] == 403
    assert service.calls == []


async def test_where_a_node_stands_can_be_read(service: FakeService, session: ClientSession) -> None:
    async with session.get("/admin/node?node=two") as response:
        assert (response.status, (await response.json())["name"]) == (200, "two")
    async with session.get("/admin/node") as response:
        assert response.status == 400
    assert service.calls == [("order", ("two", "show", 0.0))]


async def test_bad_admin_bodies(service: FakeService) -> None:
    async with serving(service, admin_key="root") as (_, session):
        headers = {"Authorization": "Bearer root"}
        for path, body in (
            ("/admin/token", {"ttl_s": -1}),
            ("/admin/token", {"uses": 0}),
            ("/admin/leave", []),
            ("/admin/node/drain", {}),
            ("/admin/node/drain", {"node": "two", "deadline_s": -1}),
            ("/admin/token/revoke", {}),
            ("/admin/node/remove", {"node": ""}),
        ):
            assert (await post(session, path, body, **headers))[0] == 400
    assert service.calls == []


@pytest.mark.parametrize("verb", ["status", "members", "links", "topology", "requests", "plan", "planning"])
async def test_admin_reads(service: FakeService, session: ClientSession, verb: str) -> None:
    async with session.get(f"/admin/{verb}") as response:
        assert response.content_type == "application/json"
        assert await response.json() == json.loads(msgspec.json.encode(getattr(service, verb)()))


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({"Host": "localhost:7700"}, True),
        ({"Host": "127.0.0.1"}, True),
        ({"Host": "[::1]:80"}, True),
        ({"Host": "192.168.1.5:7700"}, True),
        ({"Host": "mesh.lan"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "[evil"}, False),
        ({"Origin": "http://localhost:3000"}, True),
        ({"Origin": "http://mesh.lan:8080"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://[evil"}, False),
    ],
)
async def test_web_pages_of_others_do_not_reach_a_keyless_surface(
    service: FakeService, headers: dict[str, str], is_allowed: bool
) -> None:
    options = {"allowed_hosts": ("mesh.lan",), "cors_origins": ("http://mesh.lan:8080",)}
    async with serving(service, **options) as (_, session):
        async with session.get("/v1/models", headers=headers) as response:
            assert response.status == (200 if is_allowed else 403)
            allowed_origin = response.headers.get("Access-Control-Allow-Origin")
        assert allowed_origin == (headers.get("Origin") if is_allowed else None)


async def test_browsers_may_call_with_a_key_from_anywhere(service: FakeService) -> None:
    origin = {"Origin": "https://chat.example"}
    async with serving(service, api_keys=("key-1",)) as (_, session):
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        async with session.options("/v1/chat/completions", headers=preflight) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
        stream = {**CHAT, "stream": True}
        async with session.post(
            "/v1/chat/completions", json=stream, headers={**origin, **BEARER}
        ) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
            assert response.headers["Vary"] == "Origin"
            await response.read()


# Listening


async def test_a_taken_port_is_named_with_its_flag(service: FakeService) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        surface = HttpSurface(service, HttpOptions(port=port), service.telemetry)
        with pytest.raises(NotReady, match=f"HTTP port 127.0.0.1:{port} is in use") as caught:
            await surface.__aenter__()
    assert "--http-port" in caught.value.next_step
    assert caught.value.code == "port_in_use"


async def test_a_foreign_address_is_named_with_its_flag(service: FakeService) -> None:
    options = HttpOptions(host="192.0.2.1", port=0, is_open=True)
    with pytest.raises(InvalidInput) as caught:
        await HttpSurface(service, options, service.telemetry).__aenter__()
    assert "--http-listen" in caught.value.next_step


def test_other_hosts_are_not_served_without_a_key() -> None:
    with pytest.raises(InvalidInput, match=r"--http-listen 0\.0\.0\.0") as caught:
        HttpOptions(host="0.0.0.0")
    assert "--api-key-file" in caught.value.next_step
    assert "--no-auth" in caught.value.next_step
    assert HttpOptions(host="0.0.0.0", api_keys=("k",)) != HttpOptions(host="0.0.0.0", is_open=True)
    assert HttpOptions(host="::1").api_keys == ()


def test_api_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n key-1 \nkey-2\n")
    assert read_api_keys(file) == ("key-1", "key-2")
    file.write_text("# none\n")
    with pytest.raises(InvalidInput, match="holds no key"):
        read_api_keys(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_api_keys(tmp_path / "missing")


async def test_closing_ends_what_is_under_way(service: FakeService) -> None:
    service.hang_after = 1
    async with ClientSession() as session:
        options = HttpOptions(port=0, shutdown_s=0.1)
        async with HttpSurface(service, options, service.telemetry) as surface:
            url = surface.url + "/v1/chat/completions"
            task = asyncio.create_task(post_raw(session, url, {**CHAT, "stream": True}))
            await service.until(lambda: service.n_hanging == 1)
        async with asyncio.timeout(5):
            with pytest.raises(aiohttp.ClientError):
                await task
    assert len(service.ended) == 1


# Metrics


def outcomes(service: FakeService) -> dict[str, float]:
    """Requests by outcome, those that happened."""
    counts = {
        outcome: service.registry.get_sample_value("hexmesh_requests_total", {"outcome": outcome})
        for outcome in metrics.OUTCOMES
    }
    return {outcome: count for outcome, count in counts.items() if count}


async def test_metrics_follow_the_requests(service: FakeService, session: ClientSession) -> None:
    service.telemetry.set_kv_blocks(service.status().kv_blocks)
    service.telemetry.set_members(service.members())
    service.telemetry.set_links(service.links(), node="n1")
    service.telemetry.observe_step("r0", 0.02, [0.01], 0.01)
    await post(session, "/v1/completions", {**PROMPT, "n": 2})
    await post(session, "/v1/completions", {**PROMPT, "max_tokens": 2})
    await post(session, "/v1/completions", {"prompt": 5})
    service.refusal = Busy("full")
    await post(session, "/v1/completions", PROMPT)
    async with session.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        text = await response.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {spec.name.removesuffix("_total") for spec in metrics.ALL} <= set(families)
    assert all(families[spec.name.removesuffix("_total")].type == spec.kind for spec in metrics.ALL)
    assert outcomes(service) == {"stop": 1.0, "length": 1.0, "invalid": 1.0, "refused": 1.0}
    value = service.registry.get_sample_value
    n_reply, n_prompt = n_reply_tokens(service) + 1, len(service.codec.encode("hi"))
    assert value("hexmesh_generation_tokens_total") == 2 * n_reply + 2
    assert value("hexmesh_prompt_tokens_total") == 2 * n_prompt
    assert value("hexmesh_time_to_first_token_seconds_count") == 2
    assert value("hexmesh_inter_token_latency_seconds_count") == 2 * (n_reply - 1) + 1
    assert value("hexmesh_request_latency_seconds_count") == 2
    assert value("hexmesh_kv_blocks", {"state": "cached"}) == 2
    assert value("hexmesh_members", {"state": "alive"}) == 1
    assert value("hexmesh_link_rtt_seconds", {"peer": "n2"}) == 0.01
    service.telemetry.set_links([], node="n1")
    assert value("hexmesh_link_rtt_seconds", {"peer": "n2"}) is None


async def test_the_vllm_alias_has_the_same_figures(service: FakeService, session: ClientSession) -> None:
    service.telemetry.set_kv_blocks(service.status().kv_blocks)
    await post(session, "/v1/completions", PROMPT)
    labels = {"model_name": "tiny", "engine": "0"}
    value = service.registry.get_sample_value
    n_reply = n_reply_tokens(service) + 1
    assert value("vllm:generation_tokens_total", labels) == n_reply
    assert value("vllm:time_to_first_token_seconds_count", labels) == 1
    assert value("vllm:request_success_total", {**labels, "finished_reason": "stop"}) == 1
    assert value("vllm:num_requests_running", labels) == 0
    assert value("vllm:kv_cache_usage_perc", labels) == pytest.approx(0.4)
    async with session.get("/metrics") as response:
        assert "vllm:inter_token_latency_seconds_bucket{" in await response.text()
