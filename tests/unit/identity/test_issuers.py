"""Who is made an issuer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hexmesh.identity.certificates import MemberIdentity
from hexmesh.identity.issuers import whom_to_appoint
from hexmesh.ids import MeshId, NodeId

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def member(name: str, *, issuer: str | None = None, hours: int = 0) -> MemberIdentity:
    return MemberIdentity(
        mesh_id=MeshId("m"),
        node_id=NodeId(name),
        dht_peer_id="12D3",
        public_bytes=b"",
        not_before=NOW + timedelta(hours=hours),
        not_after=NOW + timedelta(days=9),
        issuer_id=NodeId(issuer) if issuer is not None else None,
    )


A, B, C = (member(name, issuer=name) for name in "abc")
D, E = member("d", issuer="a", hours=1), member("e", issuer="a", hours=2)


def appointed(up: list[MemberIdentity], before: str, revoked: str = "") -> str:
    return "".join(
        one.node_id for one in whom_to_appoint(up, [NodeId(n) for n in before], {NodeId(n) for n in revoked})
    )


def test_the_first_three_by_age() -> None:
    assert appointed([A], "a") == ""
    assert appointed([A, E, D], "a") == "de"
    assert appointed([A, B, E, D], "ab") == "d"
    assert appointed([A, B, C, D], "abc") == ""


def test_issuers_that_another_holder_of_the_root_key_made_count_too() -> None:
    assert appointed([A, B, C, D], "a") == ""


def test_an_issuer_that_is_down_keeps_its_place() -> None:
    assert appointed([A, D], "abc") == ""


def test_one_that_its_certificate_did_not_reach_gets_it_again() -> None:
    assert appointed([A, D, E], "abd") == "d"


def test_a_removed_issuer_makes_room() -> None:
    assert appointed([A, B, D, E], "abc", revoked="c") == "d"
    assert appointed([A, B, C, D], "abc", revoked="cd") == ""
