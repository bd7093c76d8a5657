"""Revocations: who may say them, what they amount to, and that the order of hearing does not matter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from hexmesh.errors import Refused
from hexmesh.identity import revocations
from hexmesh.identity.authority import Issuer, MeshAuthority, request_certificate
from hexmesh.identity.certificates import MemberIdentity, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocation, Revocations, open_revocation, sign_revocation
from hexmesh.ids import NodeId

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=9)
MESH = MeshAuthority.found(NOW)


@dataclass(frozen=True)
class Host:
    key: NodeKey
    issuer: Issuer

    @property
    def id(self) -> NodeId:
        return self.key.node_id

    def member(self, by: Issuer) -> MemberIdentity:
        chain = [by.issue(request_certificate(self.key), "12D3KooWX", LATER), *by.chain]
        return verify_member(chain, MESH.root_der, LATER)


def host(hours: int) -> Host:
    """A node that became an issuer so many hours after the founding."""
    key = NodeKey.generate()
    certificate = MESH.appoint(key.public_bytes, NOW + timedelta(hours=hours))
    return Host(key, Issuer(key.private, MESH.root_der, certificate))


OLD, MIDDLE, YOUNG, NODE = host(0), host(1), host(2), host(99)


def said(by: Issuer, node: NodeId, sequence: int = 1, upholds: Iterable[NodeId] = ()) -> bytes:
    return sign_revocation(by, node, now_unix_s=1.0, sequence=sequence, upholds=upholds)


def known(*signed: bytes) -> Revocations:
    return Revocations(MESH.root_der, signed)


@pytest.mark.parametrize("by", [MESH, OLD.issuer, YOUNG.issuer], ids=["root", "old", "young"])
def test_the_root_and_every_issuer_may_revoke(by: Issuer) -> None:
    heard = known(said(by, NODE.id))

    assert heard.revoked == {NODE.id}
    assert heard.grounds(NODE.member(MESH)) == said(by, NODE.id)
    assert heard.grounds(NODE.member(MIDDLE.issuer)) is not None
    assert heard.grounds(OLD.member(MESH)) is None


def test_news_is_told_once() -> None:
    heard = known()

    assert heard.learn(said(OLD.issuer, NODE.id)) is True
    assert heard.learn(said(OLD.issuer, NODE.id)) is False
    assert heard.learn(said(OLD.issuer, NODE.id, sequence=2)) is True
    assert heard.signed() == (said(OLD.issuer, NODE.id, sequence=2),)


def changed(data: bytes, **changes: object) -> bytes:
    return msgspec.msgpack.encode(
        msgspec.structs.replace(msgspec.msgpack.decode(data, type=Revocation), **changes)
    )


GOOD = said(OLD.issuer, NODE.id)
OTHER_MESH = MeshAuthority.found(NOW)


@pytest.mark.parametrize(
    "bad",
    [
        changed(GOOD, node=bytes.fromhex(MIDDLE.id)),
        changed(GOOD, sequence=9),
        changed(GOOD, upholds=(b"x" * 20,)),
        changed(GOOD, issuer=b""),
        changed(GOOD, issuer=MIDDLE.issuer.chain[0]),
        changed(GOOD, issuer=OTHER_MESH.appoint(OLD.key.public_bytes, NOW)),
        changed(GOOD, issuer=OLD.issuer.issue(request_certificate(OLD.key), "12D3KooWX", NOW)),
        changed(GOOD, mesh_id=OTHER_MESH.mesh_id),
        said(OLD.issuer, OLD.id),
        said(OTHER_MESH, NODE.id),
        b"",
        b"\xc1",
        b"x" * (revocations.MAX_REVOCATION_BYTES + 1),
    ],
    ids=[
        *("node", "sequence", "upholds", "as-root", "as-another", "foreign-issuer", "a-node's-certificate"),
        *("mesh", "itself", "foreign-root", "empty", "garbage", "large"),
    ],
)
def test_what_nobody_in_charge_signed_is_refused(bad: bytes) -> None:
    with pytest.raises(Refused):
        open_revocation(bad, MESH.root_der)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_damaged_revocation_is_refused_and_nothing_else_happens() -> None:
    accepted = []
    for at, bit in itertools.product(range(len(GOOD)), range(8)):
        damaged = GOOD[:at] + bytes([GOOD[at] ^ (1 << bit)]) + GOOD[at + 1 :]
        try:
            accepted.append(open_revocation(damaged, MESH.root_der).revocation)
        except Refused:
            continue

    assert accepted == []


def test_a_removed_issuer_s_certificates_are_void_but_for_known_members() -> None:
    ghost = host(99)
    heard = known(said(OLD.issuer, YOUNG.id, upholds=[NODE.id, OLD.id]))

    assert heard.grounds(YOUNG.member(YOUNG.issuer)) is not None
    assert heard.grounds(NODE.member(YOUNG.issuer)) is None
    assert heard.grounds(ghost.member(YOUNG.issuer)) is not None
    assert heard.grounds(ghost.member(OLD.issuer)) is None


def test_an_upheld_member_can_be_removed_too() -> None:
    heard = known(said(OLD.issuer, YOUNG.id, upholds=[NODE.id]), said(MIDDLE.issuer, NODE.id))

    assert heard.grounds(NODE.member(YOUNG.issuer)) is not None


def test_a_removed_issuer_is_not_heard() -> None:
    heard = known(said(OLD.issuer, YOUNG.id), said(YOUNG.issuer, NODE.id), said(YOUNG.issuer, MIDDLE.id))

    assert heard.revoked == {YOUNG.id}
    assert heard.revoked_by(OLD.id) == (YOUNG.id,)
    assert heard.revoked_by(YOUNG.id) == ()


def test_of_two_issuers_that_remove_each_other_the_older_stays() -> None:
    assert known(said(YOUNG.issuer, OLD.id), said(OLD.issuer, YOUNG.id)).revoked == {YOUNG.id}


def test_a_younger_issuer_may_remove_an_older_one_that_says_nothing() -> None:
    """The founder's host may be the one that is lost."""
    assert known(said(YOUNG.issuer, OLD.id)).revoked == {OLD.id}


def test_the_root_has_the_last_word() -> None:
    assert known(said(OLD.issuer, YOUNG.id), said(MESH, OLD.id)).revoked == {OLD.id}


def test_every_order_of_hearing_ends_alike() -> None:
    everything = [
        said(OLD.issuer, MIDDLE.id),
        said(MIDDLE.issuer, OLD.id, upholds=[NODE.id]),
        said(MIDDLE.issuer, YOUNG.id),
        said(YOUNG.issuer, NODE.id),
        said(YOUNG.issuer, NODE.id, sequence=2),
        said(MESH, host(5).id),
    ]
    rng = random.Random(1)
    verdicts = set()
    for _ in range(50):
        rng.shuffle(everything)
        verdicts.add(known(*everything).revoked)

    assert len(verdicts) == 1


def test_a_signer_cannot_fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "MAX_PER_SIGNER", 2)
    heard = known(said(YOUNG.issuer, host(9).id), said(YOUNG.issuer, host(9).id))

    with pytest.raises(Refused, match="more than 2"):
        heard.learn(said(YOUNG.issuer, NODE.id))
    assert heard.learn(said(OLD.issuer, NODE.id))


def test_sequences_grow_even_if_the_clock_goes_back() -> None:
    heard = known(said(OLD.issuer, NODE.id, sequence=5000))

    assert heard.next_sequence(1.0) == 5001
    assert heard.next_sequence(6.0) == 6000
