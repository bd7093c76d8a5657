"""Members' connections over real sockets: who may talk, what arrives, and how a death is noticed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import socket
import ssl
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest

from daemon.peering import connection, incoming, outgoing, peers
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp
from daemon.peering.peers import CHANNELS, PeerEvents, PeerNetwork
from daemon.peering.tls import client_context, stranger_context
from hexmesh.errors import Busy, InvalidInput, Lost
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.certificates import read_member, to_pem
from hexmesh.identity.keys import NodeKey
from hexmesh.wire import codec
from hexmesh.wire.frames import FrameLimits
from hexmesh.wire.peering import PROTOCOL_VERSION, Channel, MeshRoot, PeerHello, PeerRefused, WantRoot
from tests.e2e.members import (
    DHT_PEER_ID,
    Member,
    dialled,
    introduce,
    make_member,
    network_of,
    note,
    write_tls_files,
)

SHORT_CHANNELS = CHANNELS | {
    "data": replace(CHANNELS["data"], limits=FrameLimits(1000, 1000), queue_bytes=4000),
}


async def test_messages_both_ways(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a) as to_b, network_of(b) as to_a:
        introduce(to_b, b)
        to_b.send(b.node_id, note("hello"), b"abc")
        await b.until(lambda: len(b.messages) == 1)
        to_a.send(a.node_id, note("back"), channel="data")  # its address came with the greeting
        await a.until(lambda: len(a.messages) == 1)
        info = to_a.peer(a.node_id)
        assert (a.seen, b.seen) == ([("up", b.node_id)], [("up", a.node_id)])

    assert b.messages == [(a.node_id, note("hello"), memoryview(b"abc"))]
    assert a.messages == [(b.node_id, note("back"), memoryview(b""))]
    assert info is not None
    assert (info.name, info.boot, str(info.address), info.is_up) == ("a", a.local.boot, a.local.address, True)
    assert info.clock_difference_s == pytest.approx(0, abs=1)


async def test_big_payload_arrives_whole_and_writable(pair: tuple[Member, Member]) -> None:
    a, b = pair
    payload = np.random.default_rng(1).integers(0, 255, 40_000_001, dtype=np.uint8)
    async with network_of(a) as to_b, network_of(b):
        introduce(to_b, b)
        to_b.send(b.node_id, note("big"), payload.data, channel="data")
        to_b.send(b.node_id, note("after"), channel="data")
        await b.until(lambda: len(b.messages) == 2)

    received = b.messages[0][2]
    assert np.array_equal(np.frombuffer(received, dtype=np.uint8), payload)
    assert not received.readonly
    assert b.messages[1][1] == note("after")


async def test_control_is_not_held_up_by_a_big_payload(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a) as to_b, network_of(b):
        introduce(to_b, b)
        to_b.send(b.node_id, note("warm"))
        to_b.send(b.node_id, note("warm"), channel="data")
        await b.until(lambda: len(b.messages) == 2)
        to_b.send(b.node_id, note("big"), bytearray(60_000_000), channel="data")
        to_b.send(b.node_id, note("beat"))
        await b.until(lambda: len(b.messages) == 4)

    assert [message for _, message, _ in b.messages[2:]] == [note("beat"), note("big")]


async def test_order_is_kept_within_a_channel(pair: tuple[Member, Member]) -> None:
    a, b = pair
    rng = random.Random(3)
    sent = [(note(str(i)), bytes(rng.choice((0, 5, 3000, 40_000)))) for i in range(500)]
    async with network_of(a) as to_b, network_of(b):
        introduce(to_b, b)
        for message, payload in sent:
            to_b.send(b.node_id, message, payload, channel="data")
        await b.until(lambda: len(b.messages) == len(sent))

    assert [(message, bytes(payload)) for _, message, payload in b.messages] == sent


async def test_a_message_to_oneself_is_delivered(pair: tuple[Member, Member]) -> None:
    a, _ = pair
    async with network_of(a) as network:
        network.send(a.node_id, note("me"), b"xy", channel="data")
        await a.until(lambda: len(a.messages) == 1)

    assert a.messages == [(a.node_id, note("me"), memoryview(b"xy"))]
    assert not a.messages[0][2].readonly


async def test_what_was_sent_before_leaving_arrives(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(b):
        async with network_of(a) as to_b:
            introduce(to_b, b)
            to_b.send(b.node_id, note("first"))
            await b.until(lambda: len(b.messages) == 1)
            to_b.send(b.node_id, note("last"), bytes(3_000_000))
            assert await to_b.flush(5.0)
        await b.until(lambda: len(b.messages) == 2)

    assert b.messages[1][1] == note("last")


async def test_a_member_of_another_mesh_is_refused(
    pair: tuple[Member, Member], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = pair
    other_mesh = MeshAuthority.found(datetime.now(UTC))
    files = write_tls_files(other_mesh, NodeKey.generate(), tmp_path / "stranger")
    context = client_context(replace(files, root_der=a.local.tls.root_der))
    async with network_of(a):
        with contextlib.suppress(ssl.SSLError, ConnectionError):  # the refusal may come within the handshake
            async with dialled(a.port, context) as raw:
                raw.say(a.local.hello("control"))
                assert await raw.hear() == []

    assert (a.seen, a.messages) == ([], [])
    assert "certificate" in caplog.text.lower()


async def test_a_reason_is_said_once(pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture) -> None:
    a, b = pair
    newer = replace(b.local, protocol_version=7)
    async with network_of(a), PeerNetwork(newer, b.listener, b.events) as network:
        introduce(network, a)
        for n in range(1, 4):
            network.send(a.node_id, note("again"), channel="data")
            await b.until(lambda n=n: len(b.seen) == n)  # type: ignore[misc]

    assert caplog.text.count("speaks protocol 7") == 1


async def test_a_peer_that_reaches_us_and_cannot_be_dialled_is_named_once_and_hears_us(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    unused = listen_tcp(LOOPBACK, 0, flag="")
    hidden = replace(b.local, address=str(bound_address(unused)))
    unused.close()
    async with network_of(a) as network, PeerNetwork(hidden, b.listener, b.events) as from_hidden:
        introduce(from_hidden, a)
        from_hidden.send(a.node_id, note("here I am"))
        await a.until(lambda: len(a.messages) == 1)
        for channel in ("control", "data", "probe"):
            network.send(b.node_id, note(channel), channel=channel)
        await b.until(lambda: len(b.messages) == 3)
        assert not from_hidden.reach.is_dialable
        assert not [event for event in a.seen if event[0] == "lost"]

    assert {message.sequence for _, message, _ in b.messages} == {"control", "data", "probe"}  # type: ignore[attr-defined]
    assert caplog.text.count("cannot be dialled") == 1
    assert hidden.address in caplog.text


async def test_a_mesh_of_another_root_is_not_talked_to(
    pair: tuple[Member, Member], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = pair
    foreign = make_member(MeshAuthority.found(datetime.now(UTC)), tmp_path, "foreign")
    async with network_of(a) as network, network_of(foreign):
        introduce(network, foreign)
        network.send(foreign.node_id, note("secret"), channel="data")
        await a.until(lambda: bool(a.seen))

    assert a.seen == [("lost", foreign.node_id, "data")]
    assert (foreign.seen, foreign.messages) == ([], [])
    assert "the peer's certificate does not hold" in caplog.text


async def test_another_node_at_the_address_is_refused(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    absent = NodeKey.generate().node_id
    async with network_of(a) as network, network_of(b):
        network.learn_address(absent, LOOPBACK, b.port)
        network.send(absent, note("for another"), channel="data")
        await a.until(lambda: bool(a.seen))

    assert a.seen == [("lost", absent, "data")]
    assert b.messages == []
    assert f"is node {b.node_id[:8]}, not node {absent[:8]}" in caplog.text


async def test_a_certificate_used_under_another_name_is_refused(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    async with network_of(a), dialled(a.port, client_context(b.local.tls)) as raw:
        raw.say(msgspec.structs.replace(b.local.hello("control"), node_id="f" * 40))
        (refusal,) = await raw.hear()

    assert isinstance(refusal, PeerRefused)
    assert refusal.code == "wrong_node"
    assert a.seen == []


@pytest.mark.parametrize("has_said", ["member message", "greeting", "garbage"])
async def test_a_stranger_may_only_join(pair: tuple[Member, Member], has_said: str) -> None:
    a, b = pair
    async with network_of(a), dialled(a.port, stranger_context(a.local.tls.root_der)) as raw:
        if has_said == "member message":
            raw.write(b"".join(codec.MEMBER.frame(note("let me in"))))  # type: ignore[arg-type]
        elif has_said == "greeting":
            raw.say(b.local.hello("control"))
        else:
            raw.write(random.Random(1).randbytes(100))
        heard = await raw.hear()

    codes = [message.code for message in heard if isinstance(message, PeerRefused)]
    assert codes == (["no_certificate"] if has_said == "greeting" else [])
    assert (a.seen, a.messages) == ([], [])


async def test_a_stranger_gets_small_frames_only(pair: tuple[Member, Member]) -> None:
    a, _ = pair
    async with network_of(a), dialled(a.port, stranger_context(a.local.tls.root_der)) as raw:
        raw.say(WantRoot())
        root = await raw.hear_one()
        raw.write((70_000).to_bytes(4, "big") + bytes(4))
        heard = await raw.hear()

    assert isinstance(root, MeshRoot)
    assert root.root == a.local.tls.root_der
    assert heard == []


async def test_a_silent_stranger_is_dropped(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "STRANGER_S", 0.1)
    a, _ = pair
    async with network_of(a), dialled(a.port, stranger_context(a.local.tls.root_der)) as raw:
        assert await raw.hear() == []


async def test_a_client_that_never_shakes_hands_is_dropped(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incoming, "GREET_S", 0.1)
    a, _ = pair
    async with network_of(a):
        reader, writer = await asyncio.open_connection(LOOPBACK, a.port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_strangers_are_capped_and_members_are_not(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_MAX_STRANGERS", 2)
    a, b = pair
    context = stranger_context(a.local.tls.root_der)
    async with network_of(a), contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            raw = await stack.enter_async_context(dialled(a.port, context))
            raw.say(WantRoot())
            assert isinstance(await raw.hear_one(), MeshRoot)
        third = await stack.enter_async_context(dialled(a.port, context))
        (refusal,) = await third.hear()
        member = await stack.enter_async_context(dialled(a.port, client_context(b.local.tls)))
        member.say(b.local.hello("control"))
        assert isinstance(await member.hear_one(), PeerHello)

    assert isinstance(refusal, PeerRefused)
    assert refusal.code == "too_many_strangers"


async def test_unlike_protocols_are_refused_by_name(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    newer = replace(b.local, protocol_version=7, hexmesh_version="9.9")
    async with network_of(a), PeerNetwork(newer, b.listener, b.events) as network:
        introduce(network, a)
        network.send(a.node_id, note("new words"), channel="data")
        await b.until(lambda: bool(b.seen))

    assert (b.seen, a.seen, a.messages) == ([("lost", a.node_id, "data")], [], [])
    assert (
        f"b speaks protocol 7 (hexmesh 9.9) and a speaks protocol {PROTOCOL_VERSION} (hexmesh 0.1.0)"
        in caplog.text
    )
    assert "run the same version of hexmesh on both" in caplog.text


async def test_unlike_clocks_are_reported(
    pair: tuple[Member, Member], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    late = replace(b.local, clock=lambda: time.time() - 60)
    async with network_of(a) as network, PeerNetwork(late, b.listener, b.events):
        introduce(network, b)
        network.connect(b.node_id)
        await a.until(lambda: a.seen == [("up", b.node_id)])
        info = network.peer(b.node_id)

    assert info is not None
    assert info.clock_difference_s == pytest.approx(-60, abs=1)
    assert "clocks differ" in caplog.text
    assert "NTP" in caplog.text


@pytest.mark.parametrize("is_dialler", [True, False], ids=["it-dialled", "it-was-dialled"])
async def test_a_member_that_is_refused_by_now_is_cut_off_and_stays_out(
    pair: tuple[Member, Member], is_dialler: bool
) -> None:
    a, b = pair
    refused: list[PeerRefused] = []
    proofs: list[bytes] = []
    events_a = replace(a.events, judge=lambda member: refused[0] if refused else None)
    events_b = replace(b.events, on_proof=lambda proof: (proofs.append(proof), b._saw("proof")))
    async with (
        PeerNetwork(a.local, a.listener, events_a) as at_a,
        PeerNetwork(b.local, b.listener, events_b) as at_b,
    ):
        introduce(at_b, a) if is_dialler else introduce(at_a, b)
        one, other = (at_b, a) if is_dialler else (at_a, b)
        one.send(other.node_id, note("one"), channel="data")
        await other.until(lambda: len(other.messages) == 1)
        refused.append(PeerRefused(code="removed", message="it was removed", proof=b"signed"))
        at_a.review()
        await b.until(lambda: any(event[:2] == ("down", a.node_id) for event in b.seen))
        await a.until(lambda: any(event[:2] == ("down", b.node_id) for event in a.seen))
        at_b.send(a.node_id, note("two"))
        await b.until(lambda: proofs != [])
        at_a.send(b.node_id, note("three"))

    assert set(proofs) == {b"signed"}
    assert len(a.messages) + len(b.messages) == 1


@pytest.mark.parametrize("is_dialler", [True, False], ids=["it-dials", "it-is-dialled"])
async def test_a_renewed_certificate_is_shown_at_once_and_costs_no_connection(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path, is_dialler: bool
) -> None:
    a, b = pair
    shown: list[bytes] = []
    watching = replace(b.events, judge=lambda member: shown.append(member.not_after))
    async with network_of(a) as at_a, PeerNetwork(b.local, b.listener, watching) as at_b:
        introduce(at_a, b) if is_dialler else introduce(at_b, a)
        one, other = (at_a, b) if is_dialler else (at_b, a)
        one.send(other.node_id, note("one"))
        await other.until(lambda: len(other.messages) == 1)
        key = NodeKey.from_pem(a.local.tls.key_file.read_bytes())
        later = datetime.now(UTC) + timedelta(minutes=2)
        certificate = authority.issue(request_certificate(key), DHT_PEER_ID, later)
        a.local.tls.certificate_file.write_bytes(to_pem([certificate]))
        at_a.reload_certificate()
        one.send(other.node_id, note("two"))
        one.send(other.node_id, note("three"), channel="data")
        await other.until(lambda: len(other.messages) == 3)
        seen = [*a.seen, *b.seen]

    assert shown == sorted(shown)
    assert len(set(shown)) == 2
    assert shown[-1] == read_member(certificate).not_after
    assert seen == [("up", b.node_id), ("up", a.node_id)]


async def test_an_oversized_frame_closes_only_its_connection(
    authority: MeshAuthority, pair: tuple[Member, Member], tmp_path: Path
) -> None:
    a, b = pair
    async with network_of(a, channels=SHORT_CHANNELS), network_of(b) as at_b:
        introduce(at_b, a)
        at_b.send(a.node_id, note("control"))
        at_b.send(a.node_id, note("data"), channel="data")
        await a.until(lambda: len(a.messages) == 2)
        at_b.send(a.node_id, note("too big"), bytes(2000), channel="data")
        await b.until(lambda: ("lost", a.node_id, "data") in b.seen)
        at_b.send(a.node_id, note("control again"))
        at_b.send(a.node_id, note("data again"), channel="data")
        await a.until(lambda: len(a.messages) == 4)
        assert a.seen == [("up", b.node_id)]
        assert b.seen == [("up", a.node_id), ("lost", a.node_id, "data")]

    assert {message.sequence for _, message, _ in a.messages[2:]} == {"control again", "data again"}  # type: ignore[attr-defined]


async def test_nonsense_from_a_member_closes_its_connection(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a), dialled(a.port, client_context(b.local.tls)) as raw:
        raw.say(b.local.hello("control"))
        assert isinstance(await raw.hear_one(), PeerHello)
        raw.write(b"\0\0\0\x04\0\0\0\0junk")
        assert await raw.hear() == []
        await a.until(lambda: len(a.seen) == 2)

    assert [event[0] for event in a.seen] == ["up", "down"]


async def test_a_full_data_queue_says_busy_and_control_forgets_the_oldest(
    pair: tuple[Member, Member],
) -> None:
    a, b = pair  # nobody answers at b: its kernel accepts and that is all
    rules = SHORT_CHANNELS | {"control": replace(CHANNELS["control"], queue_bytes=4000)}
    async with network_of(a, channels=rules) as network:
        introduce(network, b)
        for i in range(4):
            network.send(b.node_id, note(str(i)), bytes(900), channel="data")
        with pytest.raises(Busy, match="queue to node"):
            network.send(b.node_id, note("5"), bytes(900), channel="data")
        for i in range(100):
            network.send(b.node_id, note(str(i)), bytes(900))

        assert 0 < network.queued_bytes(b.node_id, "data") <= 4000
        assert 0 < network.queued_bytes(b.node_id, "control") <= 4000


async def test_too_large_is_the_senders_mistake(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a, channels=SHORT_CHANNELS) as network:
        introduce(network, b)
        with pytest.raises(InvalidInput, match="payload of 1001 bytes is over the limit of 1000"):
            network.send(b.node_id, note("x"), bytes(1001), channel="data")


async def test_an_unknown_peer(pair: tuple[Member, Member]) -> None:
    a, b = pair
    async with network_of(a) as network:
        network.send(b.node_id, note("dropped"))
        with pytest.raises(Lost, match="no way to node"):
            network.send(b.node_id, note("x"), channel="data")


async def test_a_peer_that_comes_back_is_redialled(pair: tuple[Member, Member]) -> None:
    a, b = pair
    port = b.port
    async with network_of(a) as network:
        introduce(network, b)
        async with network_of(b):
            network.send(b.node_id, note("one"))
            await b.until(lambda: len(b.messages) == 1)
        await a.until(lambda: ("refused", b.node_id) in a.seen)
        back = Member(replace(b.local, boot=b.local.boot + 2), listen_tcp(LOOPBACK, port, flag=""))
        async with network_of(back):
            network.send(b.node_id, note("two"))
            await back.until(lambda: len(back.messages) == 1)
            await a.until(lambda: a.seen.count(("up", b.node_id)) == 2)

    assert [event[0] for event in a.seen[:5]] == ["up", "lost", "down", "refused", "up"]
    assert back.messages[0][1] == note("two")


async def test_a_new_address_is_tried_at_once(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outgoing, "_FIRST_DELAY_S", 1000.0)
    a, b = pair
    unused = listen_tcp(LOOPBACK, 0, flag="")
    wrong_port = unused.getsockname()[1]
    unused.close()
    async with network_of(a) as network, network_of(b):
        network.learn_address(b.node_id, LOOPBACK, wrong_port)
        network.send(b.node_id, note("lost"), channel="data")
        await a.until(lambda: a.seen == [("lost", b.node_id, "data")])
        network.send(b.node_id, note("found"), channel="data")
        introduce(network, b)
        await b.until(lambda: len(b.messages) == 1)


async def test_what_is_decrypted_already_is_not_left_lying(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that ends one frame and holds another takes two turns; no selector tells of the second."""
    monkeypatch.setattr(connection, "_READ_TURN_BYTES", 1)
    a, b = pair
    stream = b"".join(bytes(part) for text in ("one", "two") for part in codec.MEMBER.frame(note(text)))
    async with network_of(a), dialled(a.port, client_context(b.local.tls)) as raw:
        raw.say(b.local.hello("control"))
        assert isinstance(await raw.hear_one(), PeerHello)
        raw.write(stream[:10])
        raw.write(stream[10:])
        await a.until(lambda: len(a.messages) == 2)


async def test_a_restart_is_noticed_by_the_boot(pair: tuple[Member, Member], tmp_path: Path) -> None:
    a, b = pair
    reborn = replace(b.local, boot=b.local.boot + 2)
    async with network_of(a), contextlib.AsyncExitStack() as stack:
        context = client_context(b.local.tls)
        first = await stack.enter_async_context(dialled(a.port, context))
        first.say(b.local.hello("control"))
        assert isinstance(await first.hear_one(), PeerHello)
        second = await stack.enter_async_context(dialled(a.port, context))
        second.say(reborn.hello("data"))
        assert isinstance(await second.hear_one(), PeerHello)
        assert await first.hear() == []
        assert a.seen == [("up", b.node_id), ("down", b.node_id, "it restarted"), ("up", b.node_id)]


@pytest.mark.parametrize("channels", [["control"], ["control", "data"], ["data"]])
@pytest.mark.parametrize("has_outgoing", [True, False], ids=["two-way", "incoming-only"])
async def test_a_killed_process_is_noticed_at_once(
    authority: MeshAuthority, tmp_path: Path, channels: list[Channel], has_outgoing: bool
) -> None:
    a = make_member(authority, tmp_path, "a")
    key = NodeKey.generate()
    write_tls_files(authority, key, tmp_path / "process")
    (tmp_path / "process" / "root.der").write_bytes(authority.root_der)
    told = {
        "folder": str(tmp_path / "process"),
        "node_id": key.node_id,
        "peer": a.node_id,
        "address": a.local.address,
        "channels": channels,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.e2e.member_process", stdin=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        async with network_of(a) as network:
            assert process.stdin is not None
            process.stdin.write(json.dumps(told).encode() + b"\n")
            await a.until(lambda: len(a.messages) == len(channels), timeout_s=60)
            if has_outgoing:
                network.send(key.node_id, note("are you there"))
                await a.until(lambda: len(a.messages) == len(channels) + 1)
            started_s = time.monotonic()
            process.kill()
            await a.until(lambda: ("refused", key.node_id) in a.seen)
            took_s = time.monotonic() - started_s
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        process.stdin.close()

    assert took_s < 0.3
    kinds = [event[0] for event in a.seen if event[0] != "lost"]
    assert kinds == ["up", "down", "refused"]


async def test_a_peer_never_reached_is_not_called_gone(pair: tuple[Member, Member]) -> None:
    a, b = pair
    port = b.port
    b.listener.close()
    async with network_of(a) as network:
        network.learn_address(b.node_id, LOOPBACK, port)
        network.send(b.node_id, note("x"), channel="data")
        await a.until(lambda: bool(a.seen))

    assert a.seen == [("lost", b.node_id, "data")]


async def test_failures_keep_their_kind(pair: tuple[Member, Member]) -> None:
    a, _ = pair
    with pytest.raises(InvalidInput, match="mine"):
        async with network_of(a):
            raise InvalidInput("mine")


async def test_a_bug_in_a_callback_reaches_the_loops_handler(pair: tuple[Member, Member]) -> None:
    a, b = pair
    caught: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def burst(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: caught.set_result(context["exception"])
    )
    async with PeerNetwork(a.local, a.listener, PeerEvents(on_message=burst)), network_of(b) as network:
        introduce(network, a)
        network.send(a.node_id, note("x"))
        async with asyncio.timeout(10):
            error = await caught

    assert isinstance(error, ZeroDivisionError)


async def test_an_outage_of_file_descriptors_is_survived(
    pair: tuple[Member, Member], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = pair
    faults = [OSError(24, "Too many open files")]

    class Faulty(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if faults:
                raise faults.pop()
            return super().accept()

    faulty = Faulty(fileno=a.listener.detach())
    async with PeerNetwork(a.local, faulty, a.events), network_of(b) as network:
        network.learn_address(a.node_id, *faulty.getsockname())
        network.send(a.node_id, note("x"))
        await a.until(lambda: len(a.messages) == 1)

    assert "cannot accept" in caplog.text


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hexmesh")
