"""A node's own record: stamps that grow whatever the clock does, and publishing on time and on change."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.discovery.facts import FactsPublisher, RecordClock, RecordStamp
from daemon.discovery.libp2p import ensure_identity
from daemon.trust.attestor import Attestor
from hexmesh.errors import Refused
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.keys import NodeKey
from hexmesh.membership.records import LIFETIME_S, MAX_LIFETIME_S, NodeRecord, open_record
from tests.node_records import node_record

NOW_S = 1.8e9


def test_stamps_follow_the_clock(tmp_path: Path) -> None:
    clock = RecordClock(tmp_path / "stamp.json")
    assert clock.next(NOW_S) == RecordStamp(sequence=int(NOW_S * 1000), expires_at_unix_s=NOW_S + LIFETIME_S)


@pytest.mark.parametrize("step_s", [20.0, 0.0, -0.5, -30.0])
def test_stamps_grow_over_restarts_even_when_the_clock_goes_back(tmp_path: Path, step_s: float) -> None:
    path = tmp_path / "state" / "stamp.json"
    stamps = [RecordClock(path).next(NOW_S + i * step_s) for i in range(2)]
    assert stamps[0].sequence < stamps[1].sequence
    assert stamps[0].expires_at_unix_s < stamps[1].expires_at_unix_s


def test_a_clock_that_was_far_ahead_does_not_make_records_that_all_refuse(tmp_path: Path) -> None:
    path = tmp_path / "stamp.json"
    ahead = RecordClock(path).next(NOW_S + 86400)
    back = RecordClock(path).next(NOW_S)
    assert back.sequence > ahead.sequence
    assert NOW_S < back.expires_at_unix_s < NOW_S + MAX_LIFETIME_S


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_spoilt_stamp_file_counts_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stamp.json"
    path.write_bytes(content)
    assert RecordClock(path).next(NOW_S).sequence == int(NOW_S * 1000)


def new_attestor(folder: Path, *removed: str) -> Attestor:
    now = datetime.fromtimestamp(NOW_S, UTC)
    authority, key = MeshAuthority.found(now), NodeKey.generate()
    certificate = authority.issue(request_certificate(key), ensure_identity(folder / "dht.key"), now)
    return Attestor(
        key,
        (certificate,),
        authority.root_der,
        now=lambda: now,
        is_refused=lambda member: member.node_id in removed or "all" in removed,
    )


def describe(attestor: Attestor, stamp: RecordStamp, now_unix_s: float) -> NodeRecord:
    return node_record(
        attestor.node_id,
        mesh_id=attestor.mesh_id,
        sequence=stamp.sequence,
        made_at_unix_s=now_unix_s,
        name="x",
        peer_address="127.0.0.1:7701",
    )


async def test_changes_are_published_together_and_at_once(tmp_path: Path) -> None:
    attestor = new_attestor(tmp_path)
    published: asyncio.Queue[bytes] = asyncio.Queue()
    publisher = FactsPublisher(
        describe=lambda stamp, now_s: describe(attestor, stamp, now_s),
        attestor=attestor,
        clock=RecordClock(tmp_path / "stamp.json"),
        publish=published.put_nowait,
        now_unix_s=lambda: NOW_S,
    )
    task = asyncio.create_task(publisher.run())
    async with asyncio.timeout(5):
        first = await published.get()
        for _ in range(10):
            publisher.touch()
        second = await published.get()
        await asyncio.sleep(0.4)
    task.cancel()
    await asyncio.wait([task])
    assert published.empty()
    assert publisher.latest == second
    known = [
        open_record(data, mesh_id=attestor.mesh_id, verify=attestor.verify, now_unix_s=NOW_S)
        for data in (first, second)
    ]
    assert [one.record.sequence - int(NOW_S * 1000) for one in known] == [0, 1]


def test_a_removed_member_s_signature_is_known_but_not_heeded(tmp_path: Path) -> None:
    attestor = new_attestor(tmp_path, "all")
    signature = attestor.sign(b"payload")
    assert attestor.verify_origin(attestor.chain, b"payload", signature) == attestor.node_id
    with pytest.raises(Refused) as caught:
        attestor.verify(attestor.chain, b"payload", signature)
    assert caught.value.code == "revoked"
    with pytest.raises(Refused, match="signature is not"):
        attestor.verify_origin(attestor.chain, b"another", signature)


def test_a_certificate_of_another_key_or_mesh_is_refused(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority, other = MeshAuthority.found(now), MeshAuthority.found(now)
    key = NodeKey.generate()
    certificate = authority.issue(request_certificate(key), ensure_identity(tmp_path / "dht.key"), now)
    with pytest.raises(Refused, match="another key"):
        Attestor(NodeKey.generate(), (certificate,), authority.root_der)
    with pytest.raises(Refused, match="root"):
        Attestor(key, (certificate,), other.root_der)
