"""Attacks on the peer port over real sockets: what each comes to, and that honest members go on meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from daemon.peering import peers
from daemon.peering.address import LOOPBACK
from daemon.peering.peers import CHANNELS, PeerNetwork
from daemon.peering.tls import TlsFiles, client_context, stranger_context
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.keys import NodeKey
from hexmesh.wire import codec
from hexmesh.wire.frames import frame_parts
from hexmesh.wire.peering import MeshRoot, PeerHello, PeerRefused, WantRoot
from tests.e2e.members import (
    DHT_PEER_ID,
    Member,
    Raw,
    dialled,
    introduce,
    make_member,
    network_of,
    note,
    write_files,
)

OTHER_HOST = "127.0.0.2"
"""Another source address on loopback."""


async def is_let_in(port: int, files: TlsFiles, hello: PeerHello) -> bool:
    """Whether a client with these files gets a greeting back."""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        async with dialled(port, client_context(files)) as raw:
            raw.say(hello)
            return any(isinstance(message, PeerHello) for message in await raw.hear())
    return False


async def check_that_they_talk(a: Member, b: Member, at_b: PeerNetwork) -> None:
    """B's next message reaches A."""
    n_before = len(a.messages)
    introduce(at_b, a)
    at_b.send(a.node_id, note("honest"), channel="data")
    await a.until(lambda: len(a.messages) > n_before)


async def test_a_stolen_certificate_that_expired(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    key = NodeKey.generate()
    long_ago = datetime.now(UTC) - timedelta(days=9)
    certificate = authority.issue(request_certificate(key), DHT_PEER_ID, long_ago)
    files = write_files(tmp_path / "thief", key, certificate, authority.root_der)
    async with network_of(a), network_of(b) as at_b:
        for _ in range(3):
            hello = msgspec.structs.replace(b.local.hello("control"), node_id=key.node_id)
            assert not await is_let_in(a.port, files, hello)
        await check_that_they_talk(a, b, at_b)

    assert caplog.text.count("certificate has expired") == 1


async def test_a_members_certificate_with_another_key_put_in(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who has a certificate and not its key can only exchange the key in it, which spoils the signature."""
    a, b = pair
    victim, thief = NodeKey.generate(), NodeKey.generate()
    certificate = authority.issue(request_certificate(victim), DHT_PEER_ID, datetime.now(UTC))
    own_key = thief.private.public_key().public_bytes_raw()
    forged = certificate.replace(victim.private.public_key().public_bytes_raw(), own_key)
    assert own_key in forged
    files = write_files(tmp_path / "thief", thief, forged, authority.root_der)
    async with network_of(a), network_of(b) as at_b:
        hello = msgspec.structs.replace(b.local.hello("control"), node_id=victim.node_id)
        assert not await is_let_in(a.port, files, hello)
        await check_that_they_talk(a, b, at_b)

    assert "certificate does not hold" in caplog.text
    with pytest.raises(ssl.SSLError, match="KEY_VALUES_MISMATCH"):
        client_context(write_files(tmp_path / "no", thief, certificate, authority.root_der))


async def test_a_stranger_that_asks_for_the_root_without_reading_it(pair: tuple[Member, Member]) -> None:
    """Each answer is some twenty times as long as the question; unread ones must not pile up."""
    a, b = pair
    questions = b"".join(bytes(part) for part in codec.PEERING.frame(WantRoot())) * 2000
    async with network_of(a), network_of(b) as at_b:
        async with dialled(a.port, stranger_context(a.local.tls.root_der)) as raw:
            raw.write(questions)
            heard = await raw.hear()
        await check_that_they_talk(a, b, at_b)

    assert len(heard) <= 1  # the close may overtake the one answer


async def test_half_open_connections_do_not_keep_members_out(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MAX_UNGREETED", 8)
    a, b = pair
    async with network_of(a), network_of(b) as at_b:
        idle = [await asyncio.open_connection(LOOPBACK, a.port) for _ in range(40)]
        await check_that_they_talk(a, b, at_b)
        closed = [await is_at_end(reader) for reader, _ in idle[:30]]
        for _, writer in idle:
            writer.close()

    assert closed == [True] * 30


async def is_at_end(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            return await reader.read() == b""
    return True


async def test_a_crowd_of_strangers_from_one_host_keeps_none_of_another_out(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MAX_STRANGERS", 3)
    a, _ = pair
    context = stranger_context(a.local.tls.root_der)
    async with network_of(a), contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            raw = await stack.enter_async_context(dialled(a.port, context))
            raw.say(WantRoot())
            assert isinstance(await raw.hear_one(), MeshRoot)
        (refusal,) = await (await stack.enter_async_context(dialled(a.port, context))).hear()
        elsewhere = await stack.enter_async_context(dialled_from(OTHER_HOST, a.port, context))
        elsewhere.say(WantRoot())
        answer = await elsewhere.hear_one()

    assert isinstance(refusal, PeerRefused)
    assert refusal.code == "too_many_strangers"
    assert isinstance(answer, MeshRoot)


@contextlib.asynccontextmanager
async def dialled_from(source: str, port: int, context: ssl.SSLContext) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(
        LOOPBACK, port, ssl=context, server_hostname="", local_addr=(source, 0)
    )
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


def member_frames(kind: str, rng: random.Random) -> bytes:
    match kind:
        case "unknown type":
            return joined(msgspec.msgpack.encode({"type": "LaunchMissiles", "at": 1}))
        case "no message":
            return joined(rng.randbytes(60))
        case "a greeting again":
            return joined(codec.encode(GREETING))
        case "a join request":
            return joined(codec.encode(WantRoot()))
        case "huge header":
            return (2**32 - 1).to_bytes(4, "big") + bytes(4)
        case "huge payload":
            return (10).to_bytes(4, "big") + (2**32 - 1).to_bytes(4, "big") + bytes(100)
        case _:
            raise AssertionError(kind)


GREETING = PeerHello(
    protocol_version=1, hexmesh_version="0", node_id="f" * 40, boot=1, name="x", clock_unix_s=0.0
)
BAD = ("unknown type", "no message", "a greeting again", "a join request", "huge header", "huge payload")


def joined(header: bytes, payload: bytes = b"") -> bytes:
    return b"".join(bytes(part) for part in frame_parts(header, payload))


@pytest.mark.parametrize("channel", sorted(CHANNELS.keys() - {"bulk"}))
async def test_bad_frames_of_a_member_close_their_connection_and_no_other(
    authority: MeshAuthority,
    pair: tuple[Member, Member],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    channel: str,
) -> None:
    a, b = pair
    evil = make_member(authority, tmp_path, "evil")
    evil.listener.close()
    rng = random.Random(5)
    async with network_of(a), network_of(b) as at_b:
        await check_that_they_talk(a, b, at_b)
        for kind in BAD * 2:
            async with dialled(a.port, client_context(evil.local.tls)) as raw:
                raw.say(evil.local.hello(channel))  # type: ignore[arg-type]
                assert isinstance(await raw.hear_one(), PeerHello)
                raw.write(joined(codec.encode(note("still good"))))
                raw.write(member_frames(kind, rng))
                assert await raw.hear() == [], kind
        at_b.send(a.node_id, note("honest to the end"), channel="data")
        await a.until(lambda: a.messages[-1][1] == note("honest to the end"))
        assert ("down", b.node_id) not in [event[:2] for event in a.seen]

    lines = [one for one in caplog.messages if one.startswith("no connection")]
    assert len(lines) == len(BAD)


async def test_a_line_break_in_a_message_makes_no_line_in_the_log(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    from daemon.terminal.logs import TextLines

    a, _ = pair
    evil = msgspec.msgpack.encode({"type": "x\n12:00:00 hexmesh.node all is well\x1b[2J" + "y" * 5000})
    async with network_of(a), dialled(a.port, stranger_context(a.local.tls.root_der)) as raw:
        raw.write(joined(evil))
        assert await raw.hear() == []

    (record,) = [one for one in caplog.records if "no connection" in one.getMessage()]
    line = TextLines(colours=False).format(record)
    assert line.isprintable()
    assert len(line) < 500
    assert r"x\n12:00:00" in line


async def test_frames_that_trickle_in_hold_up_nobody_else_and_cost_what_has_come(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path
) -> None:
    """Twenty connections claim 256 MiB each, which must not be had before the bytes are there."""
    a, b = pair
    claim = len(codec.encode(note("slow"))).to_bytes(4, "big") + (256 * 2**20).to_bytes(4, "big")
    evils = [make_member(authority, tmp_path, f"evil{n}") for n in range(20)]
    rss_before = resident_bytes()
    async with network_of(a), network_of(b) as at_b, contextlib.AsyncExitStack() as stack:
        for evil in evils:
            evil.listener.close()
            raw = await stack.enter_async_context(dialled(a.port, client_context(evil.local.tls)))
            raw.say(evil.local.hello("data"))
            assert isinstance(await raw.hear_one(), PeerHello)
            raw.write(claim + codec.encode(note("slow")) + bytes(1000))
        await check_that_they_talk(a, b, at_b)
        grown_bytes = resident_bytes() - rss_before

    assert grown_bytes < 200 * 2**20
    assert all(message == note("honest") for _, message, _ in a.messages)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_flood_of_small_messages_from_a_member_leaves_memory_and_others_alone(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    caplog.set_level(logging.INFO)
    n_seen = 0
    all_seen = asyncio.Event()

    def count(*_: object) -> None:
        nonlocal n_seen
        n_seen += 1
        if n_seen == 30_001:
            all_seen.set()

    evil = make_member(authority, tmp_path, "evil")
    evil.listener.close()
    chunk = joined(codec.encode(note("flood"))) * 1000
    events = replace(a.events, on_message=count)
    async with PeerNetwork(a.local, a.listener, events), network_of(b) as at_b:
        introduce(at_b, a)
        async with dialled(a.port, client_context(evil.local.tls)) as raw:
            raw.say(evil.local.hello("control"))
            assert isinstance(await raw.hear_one(), PeerHello)
            tracemalloc.start()
            try:
                for n in range(30):
                    raw.write(chunk)
                    await raw._writer.drain()
                    if n == 15:
                        at_b.send(a.node_id, note("honest"), channel="data")
                _, peak_bytes = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        async with asyncio.timeout(20):
            await all_seen.wait()

    assert peak_bytes < 20 * 2**20
    assert len(caplog.messages) < 20


async def test_a_reset_in_the_middle_of_a_frame_is_forgotten(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a), network_of(b) as at_b:
        for n_bytes in (1, 7, 8, 9, 20):
            reader, writer = await asyncio.open_connection(
                LOOPBACK, a.port, ssl=client_context(b.local.tls), server_hostname=""
            )
            raw = Raw(reader, writer)
            raw.say(b.local.hello("probe"))
            assert isinstance(await raw.hear_one(), PeerHello)
            raw.write(joined(codec.encode(note("cut off")), bytes(1000))[:n_bytes])
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()
        await check_that_they_talk(a, b, at_b)

    assert [message for _, message, _ in a.messages] == [note("honest")]
