"""A bootstrap node in this process: how it comes up, what it tells, and that it comes back. With p2pd and sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bootstrap.node import run_bootstrap
from daemon.config import JoinOptions
from daemon.dispatch import PEER_MESSAGES
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp, parse_address
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.terminal.client import Client, read_admin_key
from daemon.trust.admission import Admission, found_mesh
from daemon.trust.attestor import Attestor
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.state import StateFolder
from daemon.views import UpLine
from hexmesh.errors import InvalidInput
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import parse_token
from hexmesh.ids import NodeId, new_boot
from hexmesh.membership.reach import RELAY_ROLE
from hexmesh.membership.records import LIFETIME_S, NodeRecord, open_record, sign_record
from hexmesh.wire.facts import Facts, Ping, Pong
from hexmesh.wire.notice import PlanBlocked
from hexmesh.wire.peering import MemberAddress, ModelReference
from tests.node_records import node_record

MODEL = ModelReference(name="glossary", model_id="ab" * 32, root="no-such-folder")
PEER_ID = "12D3KooWFounder"


class Founder:
    """A member that issues tokens; it serves nothing, and hears what a bootstrap node says."""

    def __init__(self, state: StateFolder) -> None:
        key = state.node_key()
        membership = found_mesh(state, key, PEER_ID, MODEL, "float32", datetime.now(UTC))
        self.attestor = Attestor(key, tuple(membership.certificates), membership.root_der)
        listener = listen_tcp(LOOPBACK, 0, flag="--peer-port")
        self.address = str(bound_address(listener))
        own = MemberAddress(node_id=key.node_id, name="founder", address=self.address)
        self.admission = Admission(state, membership, key.node_id, self.address, lambda: [own])
        self.records: list[NodeRecord] = []
        self.heard: asyncio.Queue[tuple[NodeId, msgspec.Struct]] = asyncio.Queue()
        local = LocalPeer(
            node_id=key.node_id,
            boot=new_boot(random.Random(1)),
            name="founder",
            address=self.address,
            tls=state.tls_files(membership),
        )
        events = PeerEvents(on_message=self._hear, admit=self.admission.admit)
        self.network = PeerNetwork(local, listener, events, decode=PEER_MESSAGES.decode)

    def _hear(self, peer: NodeId, message: msgspec.Struct, payload: memoryview) -> None:
        self.heard.put_nowait((peer, message))

    async def record_of(self, node: str, availability: str = "active") -> NodeRecord:
        """The node's next record that says so, once it came."""
        async with asyncio.timeout(10):
            while True:
                _, message = await self.heard.get()
                if isinstance(message, Facts):
                    known = open_record(
                        message.record,
                        mesh_id=self.attestor.mesh_id,
                        verify=self.attestor.verify,
                        now_unix_s=datetime.now(UTC).timestamp(),
                    )
                    record = known.record
                    if record.node == node and record.dht_maddrs and record.availability == availability:
                        return record


@contextlib.asynccontextmanager
async def a_founder(folder: Path) -> AsyncIterator[Founder]:
    with StateFolder(folder) as state:
        founder = Founder(state)
        async with founder.network:
            yield founder


@contextlib.asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[UpLine]:
    """A bootstrap node that is up; asked over HTTP to leave at the end."""
    told = JoinOptions(
        state_dir=folder, name="rendezvous", http_port=0, peer_port=0, dht_port=0, listen=LOOPBACK, **options
    )
    came_up: asyncio.Future[UpLine] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(run_bootstrap(told, came_up.set_result))
    async with asyncio.timeout(20):
        await asyncio.wait((task, came_up), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    up = came_up.result()
    yield up
    client = Client(url=up.http_url)
    await asyncio.to_thread(client.post, "/admin/leave", {}, key=read_admin_key(folder))
    async with asyncio.timeout(20):
        assert await task == 0


async def get(up: UpLine, path: str) -> Any:
    client = Client(url=up.http_url)
    return await asyncio.to_thread(client.get_json, path, also_ok=(503,))


async def test_it_joins_tells_its_role_and_comes_back_without_a_token(tmp_path: Path) -> None:
    async with a_founder(tmp_path / "a") as founder:
        token = founder.admission.create_token(ttl_s=60, uses=1).token
        async with running(tmp_path / "b", peer=founder.address, token=token) as up:
            record = await founder.record_of(up.node_id)
            assert (record.roles, record.devices, record.peer_address) == ((RELAY_ROLE,), (), up.peer_addr)
            assert (up.join_command, up.name) == (None, "rendezvous")
            blocker = (await get(up, "/ready"))["blocker"]
            assert blocker["code"] == "bootstrap_node"
            assert (await get(up, "/v1/models"))["data"] == []
            members = {member["name"]: member for member in await get(up, "/admin/members")}
            metrics = await asyncio.to_thread(Client(url=up.http_url).get, "/metrics")
            assert b"hexmesh_relay_circuits 0.0" in metrics
            assert b"hexmesh_relay_bytes_total 0.0" in metrics
            assert (members["rendezvous"]["state"], members["rendezvous"]["roles"]) == ("alive", ["relay"])
            assert members["rendezvous"]["certificate"] == "valid"
            for path in (
                "/admin/status",
                "/admin/topology",
                "/admin/links",
                "/admin/plan",
                "/admin/requests",
            ):
                await get(up, path)
        assert (await founder.record_of(up.node_id, "left")).boot == record.boot
        async with running(tmp_path / "b") as again:
            assert again.node_id == up.node_id
            address = parse_address(again.peer_addr)
            founder.network.learn_address(NodeId(again.node_id), address.host, address.port)
            assert (await founder.record_of(again.node_id)).boot != record.boot


async def test_it_answers_pings_and_ignores_what_is_about_plans(tmp_path: Path) -> None:
    async with a_founder(tmp_path / "a") as founder:
        token = founder.admission.create_token(ttl_s=60, uses=1).token
        async with running(tmp_path / "b", token=token) as up:
            node = NodeId(up.node_id)
            await founder.record_of(node)
            founder.network.send(
                node, PlanBlocked(code="x", message="", next_step="", needed_bytes=None, room_bytes=None)
            )
            founder.network.send(node, Ping(n=7), channel="probe")
            async with asyncio.timeout(10):
                while (await founder.heard.get()) != (node, Pong(n=7)):
                    pass
            assert founder.network.peer(node) is not None


async def test_without_a_token_and_a_membership_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        async with running(tmp_path / "b"):
            pass
    assert (caught.value.code, "token create" in caught.value.next_step) == ("no_token", True)


async def test_a_joiner_that_names_it_is_sent_to_the_issuer(tmp_path: Path) -> None:
    async with a_founder(tmp_path / "a") as founder:
        token = founder.admission.create_token(ttl_s=60, uses=2).token
        async with running(tmp_path / "b", token=token) as up:
            record = node_record(
                founder.attestor.node_id,
                mesh_id=founder.attestor.mesh_id,
                name="founder",
                peer_address=founder.address,
                model_id=MODEL.model_id,
            )
            await founder.record_of(up.node_id)
            founder.network.send(NodeId(up.node_id), _signed(founder, record))
            async with asyncio.timeout(10):
                while len(await get(up, "/admin/members")) < 2:
                    pass  # asking takes a while
            joiner = Joiner(
                key=NodeKey.generate(), dht_peer_id="12D3KooWJoiner", name="joiner", address="127.0.0.1:1"
            )
            membership = await join_mesh(joiner, parse_token(token), parse_address(up.peer_addr))
            assert membership.mesh_id == founder.attestor.mesh_id


def _signed(founder: Founder, record: NodeRecord) -> Facts:
    expires = datetime.now(UTC).timestamp() + LIFETIME_S
    signed = sign_record(
        record, expires_at_unix_s=expires, chain=founder.attestor.chain, sign=founder.attestor.sign
    )
    return Facts(record=signed)


async def test_a_founder_s_state_folder_makes_a_bootstrap_node_that_admits(tmp_path: Path) -> None:
    async with a_founder(tmp_path / "a") as founder:
        mesh_id = founder.attestor.mesh_id
    async with running(tmp_path / "a") as up:
        assert up.join_command is not None
        joiner = Joiner(
            key=NodeKey.generate(), dht_peer_id="12D3KooWJoiner", name="joiner", address="127.0.0.1:1"
        )
        token = parse_token(up.join_command.split()[-1])
        assert (await join_mesh(joiner, token)).mesh_id == mesh_id
