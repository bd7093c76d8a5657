"""A mesh's authority and two of its members, for tests on real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hexmesh.identity.authority import MeshAuthority
from tests.e2e.members import Member, make_member


@pytest.fixture
def authority() -> MeshAuthority:
    return MeshAuthority.found(datetime.now(UTC))


@pytest.fixture
def pair(authority: MeshAuthority, tmp_path: Path) -> Iterator[tuple[Member, Member]]:
    a, b = make_member(authority, tmp_path, "a"), make_member(authority, tmp_path, "b")
    yield a, b
    a.listener.close()
    b.listener.close()
