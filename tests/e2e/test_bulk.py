"""Bulk connections: a socket that leaves the event loop, between members alone, and only as long as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.peering.bulk import BulkSocket
from daemon.peering.peers import PeerNetwork
from hexmesh.errors import HexmeshError, Lost, Refused
from hexmesh.identity.authority import MeshAuthority
from hexmesh.wire.frames import FrameLimits, frame_parts
from hexmesh.wire.peering import PeerRefused
from tests.e2e.members import Member, make_member

LIMITS = FrameLimits(header_bytes=100, payload_bytes=10_000_000)
ENDED = "closed the connection|broke"
"""What a thread is told when its connection was ended; one that merely waited in vain would hear of a stand-still."""


@asynccontextmanager
async def network(
    member: Member, on_bulk: Callable[[BulkSocket], None] | None = None
) -> AsyncIterator[PeerNetwork]:
    async with PeerNetwork(member.local, member.listener, replace(member.events, on_bulk=on_bulk)) as running:
        yield running


def echo(sock: BulkSocket) -> None:
    """Send one frame back, then wait until the connection ends."""
    with sock:
        sock.prepare(LIMITS, 10.0)
        frame = sock.receive()
        sock.send(frame_parts(bytes(frame.header), frame.payload, LIMITS))
        sock.receive()


def ask(sock: BulkSocket, payload: bytes) -> bytes:
    sock.prepare(LIMITS, 10.0)
    sock.send(frame_parts(b"question", payload, LIMITS))
    frame = sock.receive()
    assert bytes(frame.header) == b"question"
    return bytes(frame.payload)


class Echoes:
    """Serves in threads, and keeps how each ended."""

    def __init__(self) -> None:
        self.ends: list[asyncio.Future[None]] = []

    def serve(self, sock: BulkSocket) -> None:
        self.ends.append(asyncio.get_running_loop().run_in_executor(None, echo, sock))


async def test_megabytes_go_there_and_back_while_messages_flow(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    a, b = make_member(authority, tmp_path, "a"), make_member(authority, tmp_path, "b")
    echoes = Echoes()
    payload = bytes(range(256)) * 20_000
    async with network(a) as from_a, network(b, echoes.serve):
        from_a.learn_address(b.node_id, "127.0.0.1", b.port)
        with await from_a.open_bulk(b.node_id) as sock:
            assert sock.node_id == b.node_id
            assert await asyncio.to_thread(ask, sock, payload) == payload
        with pytest.raises(Lost):
            await echoes.ends[0]


async def test_a_member_that_is_removed_loses_its_bulk_connections(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    a, b = make_member(authority, tmp_path, "a"), make_member(authority, tmp_path, "b")
    echoes = Echoes()
    removed: list[PeerRefused] = []
    events = replace(b.events, on_bulk=echoes.serve, judge=lambda member: removed[0] if removed else None)
    async with network(a) as from_a, PeerNetwork(b.local, b.listener, events) as from_b:
        from_a.learn_address(b.node_id, "127.0.0.1", b.port)
        with await from_a.open_bulk(b.node_id) as sock:
            await asyncio.to_thread(ask, sock, b"x")
            removed.append(PeerRefused(code="removed", message="it was removed"))
            from_b.review()
            with pytest.raises(Lost, match=ENDED):
                await asyncio.to_thread(sock.receive)
        with pytest.raises(Lost):
            await echoes.ends[0]
        with pytest.raises(Refused, match="was removed"):
            await from_a.open_bulk(b.node_id)


async def test_nobody_serves_where_nothing_is_served_and_others_get_nothing(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    a, b = make_member(authority, tmp_path, "a"), make_member(authority, tmp_path, "b")
    stranger = make_member(MeshAuthority.found(datetime.now(UTC)), tmp_path, "stranger")
    async with network(a) as from_a, network(b), network(stranger) as from_stranger:
        with pytest.raises(Lost, match="no way to node"):
            await from_a.open_bulk(b.node_id)
        from_a.learn_address(b.node_id, "127.0.0.1", b.port)
        from_stranger.learn_address(b.node_id, "127.0.0.1", b.port)
        for dialling in (from_a, from_stranger):
            with pytest.raises(HexmeshError):
                await dialling.open_bulk(b.node_id)


async def test_bulk_connections_end_with_the_network(authority: MeshAuthority, tmp_path: Path) -> None:
    a, b = make_member(authority, tmp_path, "a"), make_member(authority, tmp_path, "b")
    echoes = Echoes()
    async with network(a) as from_a:
        async with network(b, echoes.serve):
            from_a.learn_address(b.node_id, "127.0.0.1", b.port)
            sock = await from_a.open_bulk(b.node_id)
            await asyncio.to_thread(ask, sock, b"x")
        with sock, pytest.raises(Lost, match=ENDED):
            await asyncio.to_thread(sock.receive)
    with pytest.raises(Lost):
        await echoes.ends[0]
