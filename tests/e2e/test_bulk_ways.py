"""Bulk connections with members that cannot be dialled: called back, and through a relay; real sockets on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from daemon.models.cached_model import About, CachedModel
from daemon.models.model_source import resolve_model
from daemon.models.tensor_files import FolderTensors, tensor_places
from daemon.models.weight_fetch import WeightFetch, WeightPeer
from daemon.models.weight_server import WeightServer
from daemon.peering import bulk_ways
from daemon.peering.address import LOOPBACK, Address
from daemon.peering.bulk import BulkSocket
from daemon.peering.bulk_dial import BulkDialler
from daemon.peering.peers import PeerNetwork
from daemon.peering.tls import client_context
from hexmesh.errors import Lost
from hexmesh.identity.authority import MeshAuthority
from hexmesh.ids import NodeId
from hexmesh.wire.circuits import CallMe
from hexmesh.wire.data import GenerateCancel
from hexmesh.wire.frames import frame_parts
from hexmesh.wire.peering import PeerRefused
from tests.e2e.members import Member, make_member
from tests.e2e.test_bulk import ENDED, LIMITS, Echoes, ask
from tests.e2e.test_circuits import a_scene, hidden, introduce
from tests.e2e.weight_peers import MIB, write_random_model

PAYLOAD = bytes(range(256)) * 20_000


@dataclass
class Pair:
    """`a` can be dialled; `b` cannot, and has dialled `a`. Both echo."""

    a: PeerNetwork
    at_a: Member
    b: PeerNetwork
    at_b: Member
    at_a_echoes: Echoes = field(default_factory=Echoes)
    at_b_echoes: Echoes = field(default_factory=Echoes)
    removed: set[NodeId] = field(default_factory=set)
    """Whom b refuses."""


@asynccontextmanager
async def a_pair(authority: MeshAuthority, folder: Path, *, b_serves: bool = True) -> AsyncIterator[Pair]:
    at_a, at_b = make_member(authority, folder, "a"), hidden(make_member(authority, folder, "b"))
    for_a, for_b = Echoes(), Echoes()
    removed: set[NodeId] = set()
    refusal = PeerRefused(code="removed", message="it was removed")
    events_of_b = replace(
        at_b.events,
        on_bulk=for_b.serve if b_serves else None,
        judge=lambda member: refusal if member.node_id in removed else None,
    )
    a = PeerNetwork(at_a.local, at_a.listener, replace(at_a.events, on_bulk=for_a.serve))
    b = PeerNetwork(at_b.local, at_b.listener, events_of_b)
    async with a, b:
        b.learn_address(at_a.node_id, LOOPBACK, at_a.port)
        b.connect(at_a.node_id)
        await at_a.until(lambda: ("up", at_b.node_id) in at_a.seen)
        yield Pair(a, at_a, b, at_b, for_a, for_b, removed)
    await asyncio.gather(*for_a.ends, *for_b.ends, return_exceptions=True)


async def test_one_that_cannot_be_dialled_calls_back_and_answers(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    async with a_pair(authority, tmp_path) as pair:
        first, second, other = await asyncio.gather(
            pair.a.open_bulk(pair.at_b.node_id),
            pair.a.open_bulk(pair.at_b.node_id),
            pair.b.open_bulk(pair.at_a.node_id),
        )
        with first, second, other:
            assert [sock.node_id for sock in (first, second, other)] == [
                *[pair.at_b.node_id] * 2,
                pair.at_a.node_id,
            ]
            asked = [asyncio.to_thread(ask, sock, PAYLOAD) for sock in (first, second, other)]
            assert await asyncio.gather(*asked) == [PAYLOAD] * 3
        assert [len(echoes.ends) for echoes in (pair.at_a_echoes, pair.at_b_echoes)] == [1, 2]


async def test_the_first_question_may_come_with_the_greeting(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    async with a_pair(authority, tmp_path) as pair:
        for is_one_record in (False, True):
            question = frame_parts(b"question", b"early", LIMITS)
            with await pair.a.open_bulk(pair.at_b.node_id) as sock:
                if is_one_record:
                    sock._unsent = [b"".join([*sock._unsent, *question])]
                sock.prepare(LIMITS, 10.0)  # in the event loop, so that the other side sees it all at once
                if not is_one_record:
                    sock.send(question)
                answer = await asyncio.to_thread(sock.receive)
            assert bytes(answer.payload) == b"early"


async def test_called_back_connections_end_with_the_membership(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    async with a_pair(authority, tmp_path) as pair:
        with await pair.a.open_bulk(pair.at_b.node_id) as sock:
            await asyncio.to_thread(ask, sock, b"x")
            pair.removed.add(pair.at_a.node_id)
            pair.b.review()
            with pytest.raises(Lost, match=ENDED):
                await asyncio.to_thread(sock.receive)
    async with a_pair(authority, tmp_path / "again") as pair:
        with await pair.a.open_bulk(pair.at_b.node_id) as sock:
            await asyncio.to_thread(ask, sock, b"x")
            pair.a.forget(pair.at_b.node_id)
            with pytest.raises(Lost, match=ENDED):
                await asyncio.to_thread(sock.receive)


@pytest.mark.parametrize("why", ["serves nothing", "refuses"])
async def test_who_does_not_call_back_is_not_waited_for(
    authority: MeshAuthority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    monkeypatch.setattr(bulk_ways, "CALL_BACK_S", 0.5)
    async with a_pair(authority, tmp_path, b_serves=why != "serves nothing") as pair:
        if why == "refuses":
            pair.removed.add(pair.at_a.node_id)
        with pytest.raises(Lost, match="did not call back"):
            await pair.a.open_bulk(pair.at_b.node_id)
        assert pair.at_b_echoes.ends == []
    assert ("it was removed" in caplog.text) == (why == "refuses")


async def test_who_calls_back_unasked_is_hung_up_on(authority: MeshAuthority, tmp_path: Path) -> None:
    async with a_pair(authority, tmp_path) as pair:
        dialler = BulkDialler(pair.at_b.local, client_context(pair.at_b.local.tls), pair.b)
        with pytest.raises(Lost):
            await dialler.dial(pair.at_a.node_id, Address(LOOPBACK, pair.at_a.port), is_call_back=True)
        assert pair.at_a_echoes.ends == []


async def test_a_peer_that_asks_for_many_calls_gets_few_at_once(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dial = BulkDialler.dial
    n_dials = 0
    may_go_on = asyncio.Event()

    async def slow_dial(
        dialler: BulkDialler, node_id: NodeId, address: Address, *, is_call_back: bool = False
    ) -> BulkSocket:
        nonlocal n_dials
        n_dials += 1
        await may_go_on.wait()
        return await dial(dialler, node_id, address, is_call_back=is_call_back)

    async with a_pair(authority, tmp_path) as pair:
        with monkeypatch.context() as patch:
            patch.setattr(BulkDialler, "dial", slow_dial)
            for _ in range(3 * bulk_ways.MAX_CALLS_BACK):
                pair.a.send(pair.at_b.node_id, CallMe(channel="bulk"))
            pair.a.send(pair.at_b.node_id, GenerateCancel(sequence="after them", attempt=0))
            await pair.at_b.until(lambda: len(pair.at_b.messages) == 1)
            assert n_dials == bulk_ways.MAX_CALLS_BACK
            may_go_on.set()
        for _ in range(bulk_ways.MAX_CALLS_BACK + 1):  # those that waited may come for the first
            with await pair.a.open_bulk(pair.at_b.node_id) as sock:
                assert await asyncio.to_thread(ask, sock, b"x") == b"x"


async def test_two_that_cannot_dial_each_other_ask_through_the_relay(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    echoes = Echoes()
    async with a_scene(authority, tmp_path, serve=echoes.serve) as scene:
        introduce(scene)
        with await scene.a.open_bulk(scene.at_b.node_id) as sock:
            assert sock.node_id == scene.at_b.node_id
            assert await asyncio.to_thread(ask, sock, PAYLOAD) == PAYLOAD
            assert scene.relay.n_bytes > 2 * len(PAYLOAD)
            scene.relay.close()
            with pytest.raises(Lost, match=ENDED):
                await asyncio.to_thread(ask, sock, PAYLOAD)
        with await scene.a.open_bulk(scene.at_b.node_id) as sock:
            assert await asyncio.to_thread(ask, sock, b"again") == b"again"
            scene.a.forget(scene.at_b.node_id)
            with pytest.raises(Lost, match=ENDED):
                await asyncio.to_thread(sock.receive)
    await asyncio.gather(*echoes.ends, return_exceptions=True)


async def test_without_a_relay_they_are_told_why(authority: MeshAuthority, tmp_path: Path) -> None:
    at_a, at_b = (hidden(make_member(authority, tmp_path, name)) for name in ("a", "b"))
    networks = [PeerNetwork(one.local, one.listener, one.events) for one in (at_a, at_b)]
    async with networks[0] as a, networks[1]:
        where = at_b.local.address
        a.learn_address(at_b.node_id, LOOPBACK, int(where.rpartition(":")[2]))
        with pytest.raises(Lost, match=where):
            await a.open_bulk(at_b.node_id)


async def test_weights_come_through_the_relay(authority: MeshAuthority, tmp_path: Path) -> None:
    local = write_random_model(tmp_path / "model", n_tensors=4, tensor_bytes=5 * MIB)
    source = resolve_model(str(tmp_path / "model"))
    server = WeightServer(
        model_id=local.id,
        manifest=local.manifest,
        encoded=local.encoded,
        folder=source.folder,
        tensors=FolderTensors(tensor_places(source), local.manifest),
        is_busy=lambda: False,
    )
    cache = CachedModel(tmp_path / "cache", local.manifest)
    cache.describe(local.encoded, About(name="random", folder=None), {})
    async with a_scene(authority, tmp_path, serve=server.serve) as scene:
        introduce(scene)
        fetch = WeightFetch(
            model_id=local.id,
            model=cache,
            chunks=cache.missing_chunks(range(4)),
            peers=lambda: [WeightPeer(scene.at_b.node_id, "b")],
            dial=scene.a.open_bulk,
            on_progress=lambda progress: None,
        )
        async with asyncio.timeout(30):
            await fetch.run()
        assert scene.relay.n_bytes > 20 * MIB
    assert cache.missing_chunks(range(4)) == {}
