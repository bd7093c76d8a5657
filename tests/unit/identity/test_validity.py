"""A certificate's day and its grace."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from hexmesh.identity.authority import Issuer, MeshAuthority, request_certificate
from hexmesh.identity.certificates import verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.validity import Standing, Validity

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MESH = MeshAuthority.found(NOW)
KEY = NodeKey.generate()
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def issuer(certified_at: datetime = NOW) -> Issuer:
    key = NodeKey.generate()
    return Issuer(key.private, MESH.root_der, MESH.appoint(key.public_bytes, certified_at))


def validity_of(by: Issuer, at: datetime) -> Validity:
    chain = [by.issue(request_certificate(KEY), "12D3KooWX", at), *by.chain]
    return verify_member(chain, MESH.root_der, at).validity


@pytest.mark.parametrize(
    ("age", "standing"),
    [
        (timedelta(0), "fresh"),
        (12 * HOUR - timedelta(seconds=1), "fresh"),
        (12 * HOUR, "due"),
        (24 * HOUR - timedelta(seconds=1), "due"),
        (24 * HOUR, "grace"),
        (8 * DAY, "grace"),
        (8 * DAY + timedelta(seconds=1), "expired"),
    ],
)
def test_a_day_then_a_week_of_grace(age: timedelta, standing: Standing) -> None:
    for by in (MESH, issuer()):
        assert validity_of(by, NOW).standing(NOW + age) == standing


def test_issuers_certify_for_as_long_as_the_root_is_good() -> None:
    """The founder may be gone for good: nothing has to be renewed by the root."""
    years_later = NOW + timedelta(days=3600)
    by = issuer()

    assert validity_of(by, years_later).standing(years_later) == "fresh"


def test_no_certificate_outlives_the_root() -> None:
    end = NOW + timedelta(days=3650)

    assert validity_of(issuer(), end - HOUR).refused_at == end


def test_a_certificate_shorter_than_its_grace_is_in_grace_at_once() -> None:
    """Nobody makes such; it must be judged all the same."""
    short = Validity.between(NOW, NOW + HOUR)

    assert (short.standing(NOW + HOUR / 2), short.standing(NOW + 2 * HOUR)) == ("grace", "expired")
