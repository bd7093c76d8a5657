"""Coming back to a mesh in one process with real sockets: with a certificate that is good, and with one that is not."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from daemon.config import JoinOptions
from daemon.discovery.libp2p import ensure_identity
from daemon.models.manifests import local_manifest
from daemon.models.model_source import SHIPPED_NAME, resolve_model
from daemon.peering.address import LOOPBACK
from daemon.trust.admission import found_mesh
from daemon.trust.founding import become_member
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import Refused
from hexmesh.identity.authority import request_certificate
from hexmesh.identity.revocations import sign_revocation
from hexmesh.ids import NodeId
from hexmesh.wire.peering import ModelReference
from tests.e2e.test_admission import Running, running


@contextlib.asynccontextmanager
async def founder(folder: Path) -> AsyncIterator[Running]:
    """A mesh that serves the shipped model."""
    digest = local_manifest(resolve_model(), folder.parent).id
    model = ModelReference(name=SHIPPED_NAME, model_id=digest, root=SHIPPED_NAME)
    with StateFolder(folder) as state:
        membership = found_mesh(state, state.node_key(), "12D3a", model, "float32", datetime.now(UTC))
        async with running(state, membership, "a") as node:
            yield node


def was_member(mesh: Running, folder: Path, age: timedelta) -> NodeId:
    """A state folder with a certificate so old, from the founder."""
    issuer = mesh.state.issuer()
    assert issuer is not None
    with StateFolder(folder) as state:
        key = state.node_key()
        dht_peer_id = ensure_identity(state.dht_identity_file)
        certificate = issuer.issue(request_certificate(key), dht_peer_id, datetime.now(UTC) - age)
        state.save_membership(
            msgspec.structs.replace(
                mesh.membership,
                certificates=[certificate, *issuer.chain],
                issuer_der=b"",
                members=mesh.members,
            )
        )
    return key.node_id


def options(folder: Path, token: str | None = None) -> JoinOptions:
    return JoinOptions(
        state_dir=folder,
        name="b",
        token=token,
        device=("cpu",),
        peer_port=0,
        http_port=0,
        dht_port=0,
        listen=LOOPBACK,
    )


async def rejoin(folder: Path, token: str | None = None) -> tuple[NodeId, Membership]:
    async with become_member(options(folder, token)) as member:
        return member.node_id, member.membership


async def test_in_its_grace_a_node_comes_back_without_a_token(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        node_id = was_member(a, tmp_path / "b", timedelta(days=7))
        found, _ = await rejoin(tmp_path / "b")
    assert found == node_id


async def test_after_its_grace_a_token_brings_it_back_under_its_id(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        node_id = was_member(a, tmp_path / "b", timedelta(days=9))
        with pytest.raises(Refused, match="expired") as refusal:
            await rejoin(tmp_path / "b")
        token = a.admission.create_token(ttl_s=60, uses=1).token
        found, membership = await rejoin(tmp_path / "b", token)
        again, stored = await rejoin(tmp_path / "b")

    assert (refusal.value.code, "new token" in refusal.value.next_step) == ("certificate_expired", True)
    assert found == again == node_id
    assert stored.certificates == membership.certificates


async def test_a_removed_node_does_not_come_back_with_a_token_either(tmp_path: Path) -> None:
    async with founder(tmp_path / "a") as a:
        node_id = was_member(a, tmp_path / "b", timedelta(hours=1))
        root = a.state.authority()
        assert root is not None
        with StateFolder(tmp_path / "b") as state:
            state.save_revocations([sign_revocation(root, node_id, now_unix_s=1.0, sequence=1)])
        with pytest.raises(Refused, match="was removed"):
            await rejoin(tmp_path / "b", a.admission.create_token(ttl_s=60, uses=1).token)
        assert a.requests == []
