"""Attacks on the HTTP surface over real sockets: what trickles, what never ends, what is shaped to hurt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path

import pytest
from aiohttp import ClientSession

from daemon.web.http import HttpSurface
from daemon.web.service import GenerationRequest
from hexmesh.wire import codec
from hexmesh.wire.control import LEAST_BALLOT, Epoch
from hexmesh.wire.data import Generate
from tests.e2e.fake_service import FakeService, serving

PROMPT = {"model": "tiny", "prompt": "hi", "max_tokens": 100}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


async def raw_answer(surface: HttpSurface, sent: bytes) -> bytes:
    """Everything that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
    writer.write(sent)
    try:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                return await reader.read()
        return b""
    finally:
        writer.close()


async def check_that_it_serves(session: ClientSession) -> None:
    async with session.post("/v1/completions", json=PROMPT) as response:
        assert response.status == 200, await response.text()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEAD, HEAD + b"X-Slow: 1"], ids=len)
async def test_a_head_that_never_ends(service: FakeService, sent: bytes) -> None:
    async with serving(service, idle_s=0.3) as (surface, session):
        assert await raw_answer(surface, sent) == b""
        await check_that_it_serves(session)


@pytest.mark.parametrize(
    "sent",
    [HEAD + b"Content-Length: 1000\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"],
    ids=["length", "chunked"],
)
async def test_a_body_that_never_ends(service: FakeService, sent: bytes) -> None:
    async with serving(service, body_s=0.3, idle_s=0.3) as (surface, session):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(sent)
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n")
        writer.close()
        await check_that_it_serves(session)

    assert answer.split()[1] == b"408"


async def test_a_body_without_a_key_is_not_waited_for(service: FakeService) -> None:
    async with serving(service, api_keys=("key-1",)) as (surface, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(HEAD + b"Content-Length: 5000000\r\n\r\n{")
        async with asyncio.timeout(5):
            answer = await reader.readuntil(b"\r\n")
        writer.close()

    assert answer.split()[1] == b"401"


async def test_idle_connections_keep_nobody_out(service: FakeService) -> None:
    async with serving(service, max_connections=10) as (surface, session):
        idle = [await asyncio.open_connection("127.0.0.1", surface.port) for _ in range(40)]
        await check_that_it_serves(session)
        for reader, _ in idle[:25]:
            async with asyncio.timeout(10):
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Big: " + b"a" * 100_000 + b"\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: -5\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n", b"400"),
    ],
    ids=["long path", "long header", "two lengths", "negative", "unlike lengths", "huge chunk"],
)
async def test_heads_that_are_shaped_to_hurt(
    service: FakeService, sent: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(service, idle_s=0.5, body_s=0.5) as (surface, session):
        answer = await raw_answer(surface, sent)
        await check_that_it_serves(session)

    assert answer.split()[1] == status
    assert b"Traceback" not in answer
    assert caplog.records == []


async def test_an_endless_body_costs_its_limit(service: FakeService) -> None:
    """Sent as fast as the socket takes it, with no end: the answer comes and the reading stops."""
    async with serving(service, max_body_bytes=100_000) as (surface, session):
        reader, writer = await asyncio.open_connection("127.0.0.1", surface.port)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"

        async def pour() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(chunk)
                    await writer.drain()

        pouring = asyncio.create_task(pour())
        async with asyncio.timeout(10):
            answer = await reader.readuntil(b"\r\n")
        await check_that_it_serves(session)
        pouring.cancel()
        writer.close()

    assert answer.split()[1] == b"413"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "hi", "max_tokens": 1e999}',
        b'{"prompt": "hi", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "hi", "seed": ' + b"9" * 4000 + b"}",
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": [1, 2, 99999999999999999999999]}',
        b'{"prompt": "hi", "stop_token_ids": [99999999999999999999999]}',
        b'{"prompt": "hi", "stop": ["' + b"a" * 100_000 + b'"], "n": 1000000}',
        b"\xff\xfe\x00",
        b"null",
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/tokenize"])
async def test_bodies_that_are_shaped_to_hurt(
    service: FakeService, path: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    async with serving(service) as (_, session):
        async with session.post(path, data=body, headers={"Content-Type": "application/json"}) as response:
            answer = await response.text()
        await check_that_it_serves(session)

    for asked in service.asked:  # whatever is let through can be sent to a driver on another node
        codec.encode(generate_of(asked))
    assert response.status in (200, 400, 404, 422), answer
    assert "Traceback" not in answer
    assert caplog.records == []


def generate_of(asked: GenerationRequest) -> Generate:
    return Generate(
        sequence=asked.sequence,
        attempt=1,
        epoch=Epoch(ballot=LEAST_BALLOT, n=1),
        replica="r0",
        prompt=asked.prompt,
        emitted=[],
        max_tokens=asked.max_tokens,
        stop_token_ids=asked.stop_token_ids,
        sampling=asked.sampling,
    )


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        "/static/../../etc/passwd",
        "//etc/passwd",
        "/admin/..%2ftoken",
        "/%00",
        "/v1/models/%0d%0aSet-Cookie:%20x=1",
    ],
)
async def test_no_path_leads_to_a_file_or_into_a_header(service: FakeService, path: str) -> None:
    async with serving(service) as (surface, _):
        answer = await raw_answer(
            surface, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
        )

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"404")
    assert b"root:" not in body
    assert b"set-cookie" not in head.lower()
    json.loads(body)


@pytest.mark.parametrize("request_id", ["x\r\nX-Evil: 1", "x\nINFO all is well", "\x1b[2J", "x\x00"])
async def test_a_request_id_adds_no_header_and_no_log_line(
    service: FakeService, request_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hexmesh")
    async with serving(service) as (surface, _):
        head = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n"
        answer = await raw_answer(surface, head.encode())

    assert b"x-evil" not in answer.partition(b"\r\n\r\n")[0].lower().replace(b"x-request-id", b"")
    assert "all is well" not in caplog.text


async def test_open_routes_show_no_secret(service: FakeService, tmp_path: Path) -> None:
    secrets = ("key-0123456789", "admin-9876543210")
    async with serving(service, api_keys=secrets[:1], admin_key=secrets[1]) as (_, session):
        shown = ""
        for path in ("/health", "/live", "/ready", "/version", "/metrics", "/nothing", "/v1/models"):
            for headers in ({}, {"Authorization": f"Bearer {secrets[0]}x"}):
                async with session.get(path, headers=headers) as response:
                    shown += await response.text() + str(response.headers)

    assert not [secret for secret in secrets if secret in shown]
    assert os.fspath(tmp_path.parents[1]) not in shown
