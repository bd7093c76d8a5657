"""Members that cannot dial each other, and the relay between them, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bootstrap.relay import Relay
from daemon.peering import splice, ways
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp, parse_address
from daemon.peering.bulk import BulkSocket
from daemon.peering.peers import PeerNetwork
from daemon.peering.tls import client_context, stranger_context
from hexmesh.identity.authority import MeshAuthority
from hexmesh.identity.keys import NodeKey
from hexmesh.ids import NodeId
from hexmesh.membership import reach
from hexmesh.membership.circuits import CircuitBook
from hexmesh.wire import codec
from hexmesh.wire.circuits import CircuitReady, OpenCircuit, TakeCircuit
from hexmesh.wire.frames import FrameDecoder
from hexmesh.wire.peering import PeerRefused
from tests.e2e.members import Member, make_member, note

BIG_BYTES = 5_000_001


@dataclass
class Scene:
    """A relay that both can dial, and two members that nobody can dial."""

    relay: Relay
    relay_network: PeerNetwork
    at_relay: Member
    a: PeerNetwork
    at_a: Member
    b: PeerNetwork
    at_b: Member
    removed: set[NodeId]
    """Whom the relay refuses."""

    async def open_the_nat_of_b(self) -> asyncio.Server:
        """From now on the address that it gives leads to it."""

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection(LOOPBACK, self.at_b.port)
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

        given = parse_address(self.at_b.local.address)
        return await asyncio.start_server(forward, given.host, given.port)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def hidden(member: Member) -> Member:
    """The same member, giving an address at which nobody listens."""
    unused = listen_tcp(LOOPBACK, 0, flag="")
    address = str(bound_address(unused))
    unused.close()
    return Member(replace(member.local, address=address), member.listener)


@contextlib.asynccontextmanager
async def a_scene(
    authority: MeshAuthority,
    folder: Path,
    *,
    book: CircuitBook | None = None,
    serve: Callable[[BulkSocket], None] | None = None,
) -> AsyncIterator[Scene]:
    """`serve` takes bulk connections to b."""
    at_relay = make_member(authority, folder, "relay")
    at_a, at_b = (hidden(make_member(authority, folder, name)) for name in ("a", "b"))
    relay = Relay(
        is_connected=lambda node: (peer := relay_network.peer(node)) is not None and peer.is_up,
        send=lambda node, message: relay_network.send(node, message),
        rng=random.Random(1),
        book=book,
    )
    removed: set[NodeId] = set()
    refusal = PeerRefused(code="removed", message="it was removed")
    events = replace(
        at_relay.events,
        relay=relay,
        judge=lambda member: refusal if member.node_id in removed else None,
    )
    relay_network = PeerNetwork(at_relay.local, at_relay.listener, events)
    a = PeerNetwork(at_a.local, at_a.listener, at_a.events)
    b = PeerNetwork(at_b.local, at_b.listener, replace(at_b.events, on_bulk=serve))
    async with relay_network, a, b:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(relay.run())
            for network in (a, b):
                network.learn_address(at_relay.node_id, LOOPBACK, at_relay.port)
                network.learn_reach(at_relay.node_id, is_relay=True, is_dialable=True)
                network.connect(at_relay.node_id)
            await at_relay.until(lambda: len([one for one in at_relay.seen if one[0] == "up"]) == 2)
            yield Scene(relay, relay_network, at_relay, a, at_a, b, at_b, removed)
            running.cancel()
        relay.close()


def introduce(scene: Scene) -> None:
    """Each learns the other's address, as from a record; dialling it fails."""
    for network, other in ((scene.a, scene.at_b), (scene.b, scene.at_a)):
        address = parse_address(other.local.address)
        network.learn_address(other.node_id, address.host, address.port)


async def test_two_that_cannot_dial_each_other_talk_through_the_relay(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    payload = random.Random(2).randbytes(BIG_BYTES)
    async with a_scene(authority, tmp_path) as scene:
        introduce(scene)
        for channel in ("control", "data", "probe"):
            scene.a.send(scene.at_b.node_id, note(channel), channel=channel)
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 3)
        scene.a.send(scene.at_b.node_id, note("big"), payload, "data")
        scene.b.send(scene.at_a.node_id, note("back"), payload, "data")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 4)
        await scene.at_a.until(lambda: len(scene.at_a.messages) == 1)
        way = scene.a.peer(scene.at_b.node_id)
        n_bytes = scene.relay.n_bytes
        assert not [event for event in (*scene.at_a.seen, *scene.at_b.seen) if event[0] == "lost"]

    assert bytes(scene.at_b.messages[-1][2]) == payload
    assert bytes(scene.at_a.messages[-1][2]) == payload
    assert ("path", scene.at_b.node_id, "relayed") in scene.at_a.seen
    assert way is not None
    assert way.way == "circuit"
    assert n_bytes > 2 * BIG_BYTES


async def test_what_can_be_dialled_again_is_dialled(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "FIRST_CHECK_S", 1.0)
    async with a_scene(authority, tmp_path) as scene:
        introduce(scene)
        scene.a.send(scene.at_b.node_id, note("probe"), channel="probe")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 1)
        scene.a.send(scene.at_b.node_id, note("data"), channel="data")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 2)
        assert not scene.b.reach.is_dialable
        forwarder = await scene.open_the_nat_of_b()
        await scene.at_a.until(lambda: ("path", scene.at_b.node_id, "direct") in scene.at_a.seen)
        for channel in ("control", "data"):
            scene.a.send(scene.at_b.node_id, note("more"), channel=channel)
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 4)
        info = scene.a.peer(scene.at_b.node_id)
        await scene.at_b.until(lambda: not scene.b.reach.missed_by.keys() & {scene.at_a.node_id})
        gone = [one for one in (*scene.at_a.seen, *scene.at_b.seen) if one[0] in ("lost", "down")]
        forwarder.close()

    assert gone == []
    assert info is not None
    assert (info.way, info.why_undialable) == ("direct", None)


async def test_last_words_pass_through_a_circuit(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "BUFFER_BYTES", 1000)  # so that they take a while
    monkeypatch.setattr(splice, "TURN_BYTES", 1000)
    async with a_scene(authority, tmp_path) as scene:
        leaver = hidden(make_member(authority, tmp_path, "leaver"))
        async with PeerNetwork(leaver.local, leaver.listener, leaver.events) as network:
            network.learn_address(scene.at_relay.node_id, LOOPBACK, scene.at_relay.port)
            network.learn_reach(scene.at_relay.node_id, is_relay=True, is_dialable=True)
            network.connect(scene.at_relay.node_id)
            await leaver.until(lambda: bool(leaver.seen))
            address = parse_address(scene.at_b.local.address)
            network.learn_address(scene.at_b.node_id, address.host, address.port)
            network.send(scene.at_b.node_id, note("first"), channel="data")
            await scene.at_b.until(lambda: len(scene.at_b.messages) == 1)
            network.send(scene.at_b.node_id, note("last"), bytes(300_000), "data")
            assert await network.flush(5.0)
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 2)


async def test_the_relay_dies_and_is_seen_to(authority: MeshAuthority, tmp_path: Path) -> None:
    async with a_scene(authority, tmp_path) as scene:
        introduce(scene)
        scene.a.send(scene.at_b.node_id, note("data"), channel="data")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 1)
        scene.relay.close()
        await scene.at_a.until(lambda: ("lost", scene.at_b.node_id, "data") in scene.at_a.seen)
        scene.a.send(scene.at_b.node_id, note("again"), channel="data")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 2)


# What the relay refuses.


async def ask(scene: Scene, member: Member | None, request: object, authority: MeshAuthority) -> object:
    """What the relay answers to the first frame of a connection."""
    tls = scene.at_relay.local.tls
    context = client_context(member.local.tls) if member is not None else stranger_context(tls.root_der)
    reader, writer = await asyncio.open_connection(
        LOOPBACK, scene.at_relay.port, ssl=context, server_hostname=""
    )
    try:
        writer.writelines(codec.PEERING.frame(request))  # type: ignore[arg-type]
        decoder = FrameDecoder()
        async with asyncio.timeout(10):
            while data := await reader.read(65536):
                for frame in decoder.feed(data):
                    return codec.PEERING.decode(frame.header)
    finally:
        writer.close()
    return None


async def test_a_stranger_gets_no_circuit(authority: MeshAuthority, tmp_path: Path) -> None:
    async with a_scene(authority, tmp_path) as scene:
        for request in (OpenCircuit(to=scene.at_a.node_id), TakeCircuit(circuit=bytes(16))):
            answer = await ask(scene, None, request, authority)
            assert isinstance(answer, PeerRefused)
            assert answer.code == "no_certificate"


async def test_a_node_that_relays_for_nobody_says_so(authority: MeshAuthority, tmp_path: Path) -> None:
    async with a_scene(authority, tmp_path) as scene:
        plain = replace(scene, at_relay=scene.at_b)
        answer = await ask(plain, scene.at_a, OpenCircuit(to=scene.at_a.node_id), authority)
    assert isinstance(answer, PeerRefused)
    assert answer.code == "no_relay"


async def test_refusals_name_their_reason(authority: MeshAuthority, tmp_path: Path) -> None:
    book = CircuitBook(random.Random(1), max_of_member=0)
    async with a_scene(authority, tmp_path, book=book) as scene:
        me, other = scene.at_a.node_id, scene.at_b.node_id
        asked = {
            "bad_circuit": OpenCircuit(to=me),
            "not_connected": OpenCircuit(to=NodeKey.generate().node_id),
            "too_many_circuits": OpenCircuit(to=other),
            "no_such_circuit": TakeCircuit(circuit=bytes(16)),
            "protocol_mismatch": OpenCircuit(to=other, protocol_version=99),
        }
        told = [await ask(scene, scene.at_a, request, authority) for request in asked.values()]
    assert [answer.code for answer in told if isinstance(answer, PeerRefused)] == list(asked)


async def test_an_offer_that_nobody_takes_lapses(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hexmesh.membership.circuits.OFFER_S", 0.2)
    monkeypatch.setattr(ways, "MAX_TAKES", 0)
    async with a_scene(authority, tmp_path) as scene:
        answer = await ask(scene, scene.at_a, OpenCircuit(to=scene.at_b.node_id), authority)
    assert isinstance(answer, PeerRefused)
    assert answer.code == "not_taken"


async def test_a_removed_member_s_circuits_end(authority: MeshAuthority, tmp_path: Path) -> None:
    async with a_scene(authority, tmp_path) as scene:
        introduce(scene)
        scene.a.send(scene.at_b.node_id, note("data"), channel="data")
        await scene.at_b.until(lambda: len(scene.at_b.messages) == 1)
        scene.removed.add(scene.at_a.node_id)
        scene.relay_network.forget(scene.at_a.node_id)
        await scene.at_b.until(
            lambda: any(event[:2] == ("down", scene.at_a.node_id) for event in scene.at_b.seen)
        )
        assert scene.relay.n_circuits == 0
        answer = await ask(scene, scene.at_a, OpenCircuit(to=scene.at_b.node_id), authority)
    assert isinstance(answer, PeerRefused)
    assert answer.code == "removed"


# What the relay could do.


async def test_a_relay_that_alters_bytes_breaks_the_inner_tls_and_nothing_else(
    authority: MeshAuthority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    written = splice._Flow._write
    relay_sockets: list[object] = []

    def alter(flow: splice._Flow) -> int | None:
        if flow._src in relay_sockets and flow._dst in relay_sockets and len(flow._waiting) > 1000:
            flow._waiting = memoryview(bytes(flow._waiting[:-1]) + bytes([flow._waiting[-1] ^ 1]))
        return written(flow)

    made = Relay._join

    def join(relay: Relay, offer: object, taker: object) -> None:
        made(relay, offer, taker)  # type: ignore[arg-type]
        for one in relay._splices.values():
            relay_sockets.extend(one._sockets)

    monkeypatch.setattr(splice._Flow, "_write", alter)
    monkeypatch.setattr(Relay, "_join", join)
    async with a_scene(authority, tmp_path) as scene:
        introduce(scene)
        scene.a.send(scene.at_b.node_id, note("altered"), bytes(BIG_BYTES), "data")
        async with asyncio.timeout(10):
            while "TLS failed" not in caplog.text:  # noqa: ASYNC110 (a log record sets no event)
                await asyncio.sleep(0.01)
        assert scene.at_b.messages == []
        scene.a.send(scene.at_relay.node_id, note("still here"))
        await scene.at_relay.until(lambda: len(scene.at_relay.messages) == 1)


async def test_a_relay_cannot_stand_in_for_a_node(authority: MeshAuthority, tmp_path: Path) -> None:
    """A member that takes another's circuit is found out by its certificate, if the relay lets it."""
    async with a_scene(authority, tmp_path) as scene:
        impostor = make_member(authority, tmp_path, "impostor")
        async with PeerNetwork(impostor.local, impostor.listener, impostor.events) as network:
            network.learn_address(scene.at_relay.node_id, LOOPBACK, scene.at_relay.port)
            network.learn_reach(scene.at_relay.node_id, is_relay=True, is_dialable=True)
            network.connect(scene.at_relay.node_id)
            await impostor.until(lambda: bool(impostor.seen))
            network._local = replace(impostor.local, node_id=scene.at_b.node_id)  # it says that it is b
            opened = CircuitBook.open

            def redirect(book: CircuitBook, src: str, dst: str, **facts: object) -> object:
                return opened(book, src, impostor.node_id, **facts)  # type: ignore[arg-type]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(CircuitBook, "open", redirect)
                scene.relay._send = lambda node, message: scene.relay_network.send(impostor.node_id, message)
                introduce(scene)
                scene.a.send(scene.at_b.node_id, note("secret"), channel="data")
                await scene.at_a.until(lambda: ("lost", scene.at_b.node_id, "data") in scene.at_a.seen)
    assert (impostor.messages, scene.at_b.messages) == ([], [])


def test_ready_is_one_frame() -> None:
    (frame,) = FrameDecoder().feed(b"".join(codec.PEERING.frame(CircuitReady())))
    assert codec.PEERING.decode(frame.header) == CircuitReady()
