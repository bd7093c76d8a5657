"""Records from members: forged, replayed and older ones change nothing that is known."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

import pytest

from daemon.discovery.roster import Roster
from daemon.trust.attestor import Attestor
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.keys import NodeKey
from hexmesh.membership.records import sign_record
from tests.node_records import node_record

MESH = MeshAuthority.found(datetime.now(UTC))


def member(mesh: MeshAuthority = MESH) -> Attestor:
    key = NodeKey.generate()
    certificate = mesh.issue(request_certificate(key), "12D3KooWTest", datetime.now(UTC))
    return Attestor(key, (certificate,), mesh.root_der)


def record(
    signer: Attestor,
    *,
    about: Attestor | None = None,
    sequence: int = 1,
    name: str = "n",
    lives_s: float = 60.0,
) -> bytes:
    now_unix_s = time.time()
    subject = about or signer
    facts = node_record(
        subject.node_id, mesh_id=subject.mesh_id, sequence=sequence, made_at_unix_s=now_unix_s, name=name
    )
    return sign_record(facts, expires_at_unix_s=now_unix_s + lives_s, chain=signer.chain, sign=signer.sign)


def roster() -> Roster:
    return Roster(member(), on_address=lambda *_: None, on_change=lambda _: None)


def name_of(known: Roster, node: Attestor) -> str | None:
    found = known.directory.record(node.node_id)
    return found.name if found is not None else None


def test_a_newer_record_replaces_an_older_and_never_the_other_way_round() -> None:
    known, a = roster(), member()
    old, new = record(a, sequence=1, name="old"), record(a, sequence=2, name="new")

    assert [known.learn(old), known.learn(new), known.learn(old)] == [True, True, True]
    assert name_of(known, a) == "new"


def test_nobody_speaks_for_another() -> None:
    known, a, liar = roster(), member(), member()
    known.learn(record(a, sequence=1, name="true"))

    assert not known.learn(record(liar, about=a, sequence=9, name="false"))
    assert name_of(known, a) == "true"


def test_another_mesh_is_not_listened_to() -> None:
    known, foreign = roster(), member(MeshAuthority.found(datetime.now(UTC)))

    assert not known.learn(record(foreign))
    assert name_of(known, foreign) is None


def test_a_record_that_expired_is_not_brought_back() -> None:
    known, a = roster(), member()

    assert known.learn(record(a, lives_s=-1.0))
    assert not known.learn(record(a, lives_s=10_000.0))
    assert name_of(known, a) is None


def test_a_changed_bit_anywhere_is_noticed() -> None:
    known, a = roster(), member()
    good = record(a, sequence=5, name="good")
    known.learn(record(a, sequence=4, name="before"))
    for at in range(0, len(good), 7):
        changed = bytearray(good)
        changed[at] ^= 4
        known.learn(bytes(changed))

    assert name_of(known, a) == "before"
    assert known.learn(good)
    assert name_of(known, a) == "good"


def test_a_flood_of_bad_records_is_a_few_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    known, liar = roster(), member()
    caplog.set_level(logging.WARNING)
    for n in range(100):
        known.learn(record(liar, about=member(), name=f"n{n}"))

    assert 1 <= len(caplog.records) <= 8
