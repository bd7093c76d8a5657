"""The DHT over real p2pd processes on loopback: who may take part, what it carries, and how it survives."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from daemon.discovery import dht
from daemon.discovery.dht import DhtOptions, MeshDht
from daemon.discovery.hivemind_import import import_dht_node
from daemon.discovery.libp2p import ensure_identity, multiaddr, peer_id_of
from daemon.discovery.p2pd import P2pdOptions, running_p2pd
from daemon.trust.attestor import Attestor
from hexmesh.errors import Lost, Refused
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.keys import NodeKey
from hexmesh.membership.records import (
    LIFETIME_S,
    Directory,
    NodeRecord,
    facts_key,
    key_hash,
    open_record,
    sign_record,
)
from tests.node_records import node_record

NOTICE_S = 2.0
PATIENCE_S = 10.0


def new_attestor(authority: MeshAuthority, identity_path: Path) -> Attestor:
    key = NodeKey.generate()
    peer_id = ensure_identity(identity_path)
    certificate = authority.issue(request_certificate(key), peer_id, datetime.now(UTC))
    return Attestor(key, (certificate,), authority.root_der)


def record_of(attestor: Attestor, sequence: int = 1) -> NodeRecord:
    return node_record(
        attestor.node_id,
        mesh_id=attestor.mesh_id,
        sequence=sequence,
        made_at_unix_s=time.time(),
        name="x",
        peer_address="127.0.0.1:7701",
    )


def signed_by(attestor: Attestor, record: NodeRecord, expires_at_unix_s: float | None = None) -> bytes:
    return sign_record(
        record,
        expires_at_unix_s=expires_at_unix_s or time.time() + LIFETIME_S,
        chain=attestor.chain,
        sign=attestor.sign,
    )


@dataclass
class Member:
    """A node's DHT with the directory that it fills."""

    attestor: Attestor
    options: DhtOptions
    directory: Directory = field(default_factory=Directory)
    sequences: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dht = MeshDht(self.options, self.attestor, on_record=self.take)

    def take(self, signed: bytes) -> None:
        known = open_record(
            signed, mesh_id=self.attestor.mesh_id, verify=self.attestor.verify, now_unix_s=time.time()
        )
        self.directory.merge(known)

    def publish(self, sequence: int = 1) -> None:
        self.dht.publish(signed_by(self.attestor, record_of(self.attestor, sequence)))

    def sequence_of(self, other: Member) -> int | None:
        record = self.directory.record(other.attestor.node_id)
        return record.sequence if record is not None else None


@asynccontextmanager
async def running(member: Member) -> AsyncIterator[Member]:
    task = asyncio.create_task(member.dht.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await member.dht.wait_up()
        yield member
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(is_so: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> float:
    """Wait until it is so; how long that took, in seconds."""
    started_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - started_s < patience_s, f"not within {patience_s} s: {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def new_member(authority: MeshAuthority, folder: Path, name: str, *peers: str) -> Member:
    identity_path = folder / f"{name}.key"
    options = DhtOptions(
        identity_path=identity_path, listen_host="127.0.0.1", port=0, initial_peers=peers, fetch_busy_s=0.5
    )
    return Member(new_attestor(authority, identity_path), options)


def test_peer_id_is_what_the_libraries_say() -> None:
    # The key of the libp2p specification's Ed25519 test vector has this public half.
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    private = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
    assert peer_id_of(b"\x08\x01\x12\x40" + private + public) == (
        "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    )


def test_dht_key_hash_is_hivemind_s() -> None:
    import_dht_node()
    from hivemind.dht.routing import DHTID

    key = facts_key("ab" * 20)
    assert key_hash(key) == DHTID.generate(source=key).to_bytes()


def test_importing_leaves_level_names_alone_and_brings_no_torch() -> None:
    code = (
        "import logging, sys; from daemon.discovery.hivemind_import import import_dht_node; import_dht_node(); "
        "print(logging.getLevelName(logging.WARNING), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["WARNING", "False"]


async def test_three_members_see_each_other_s_records(authority: MeshAuthority, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(running(new_member(authority, tmp_path, "a")))
        others = [new_member(authority, tmp_path, name, *first.dht.maddrs) for name in "bc"]
        for other in others:
            await stack.enter_async_context(running(other))
        members = [first, *others]
        for member in members:
            member.publish()
        for member in members:
            for other in members:
                if other is not member:
                    await until(lambda m=member, o=other: m.sequence_of(o) == 1, "a record is known")  # type: ignore[misc]
        assert all(member.dht.fault is None for member in members)


async def test_a_newer_record_replaces_the_older(authority: MeshAuthority, tmp_path: Path) -> None:
    async with (
        running(new_member(authority, tmp_path, "a")) as first,
        running(new_member(authority, tmp_path, "b", *first.dht.maddrs)) as second,
    ):
        second.publish(1)
        await until(lambda: first.sequence_of(second) == 1, "the first record is known")
        second.publish(2)
        await until(lambda: first.sequence_of(second) == 2, "the second record is known")


async def test_a_node_that_nobody_can_dial_asks_and_is_never_asked(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dht, "ROLE_SETTLE_S", 0.1)
    one = new_member(authority, tmp_path, "one")
    async with running(one):
        two = new_member(authority, tmp_path, "two", *one.dht.maddrs)
        async with running(two):
            two.dht.serve(is_dialable=False)
            await until(lambda: two.dht.n_starts == 2, "it changed its role")
            one.publish()
            two.publish()
            await until(lambda: one.sequence_of(two) == 1, "the client's record")
            await until(lambda: two.sequence_of(one) == 1, "the server's record")
            assert two.dht.pid is not None
            three = new_member(authority, tmp_path, "three", *one.dht.maddrs)
            async with running(three):
                three.publish()
                await until(lambda: two.sequence_of(three) == 1, "another's record at the client")
                assert not knows(one, two)
                assert not knows(three, two)

                address = two.dht.maddrs
                two.dht.serve(is_dialable=True)
                await until(lambda: knows(one, two), "the node that can be dialled now is listed")
                two.publish(sequence=2)
                await until(lambda: three.sequence_of(two) == 2, "its next record")
                assert (two.dht.maddrs, two.dht.fault) == (address, None)


def knows(member: Member, other: Member) -> bool:
    """Whether `other` is in the routing table of `member`."""
    node = member.dht.node
    return node is not None and bool(other.dht.maddrs) and node.knows(other.dht.maddrs[0])


async def test_a_stranger_is_refused_at_once(authority: MeshAuthority, tmp_path: Path) -> None:
    module = await asyncio.to_thread(import_dht_node)
    other_mesh = MeshAuthority.found(datetime.now(UTC))
    stranger = new_attestor(other_mesh, tmp_path / "stranger.key")
    async with running(new_member(authority, tmp_path, "a")) as member:
        listen = P2pdOptions(identity_path=tmp_path / "stranger.key", listen=multiaddr("127.0.0.1", 0))
        async with running_p2pd(listen) as p2pd:
            node = await module.HivemindNode.open(p2pd.control_socket, stranger)
            started_s = time.monotonic()
            with pytest.raises(Refused, match="refuses us"):
                await node.meet(member.dht.maddrs[0])
            assert time.monotonic() - started_s < 1.0
            assert not node.knows(member.dht.maddrs[0])
            await node.close()


async def test_a_stranger_without_signatures_can_neither_join_nor_store(
    authority: MeshAuthority, tmp_path: Path
) -> None:
    """Plain hivemind, as anyone can run it."""
    await asyncio.to_thread(import_dht_node)
    from hivemind.dht.node import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2P, P2PHandlerError, PeerID
    from hivemind.proto import dht_pb2
    from hivemind.utils.multiaddr import Multiaddr

    ensure_identity(tmp_path / "stranger.key")
    async with running(new_member(authority, tmp_path, "a")) as member:
        listen = P2pdOptions(identity_path=tmp_path / "stranger.key", listen=multiaddr("127.0.0.1", 0))
        async with running_p2pd(listen) as p2pd:
            p2p = await P2P.replicate(Multiaddr(f"/unix{p2pd.control_socket}"))
            address, _, peer = member.dht.maddrs[0].rpartition("/p2p/")
            await p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(address)])
            with pytest.raises(RuntimeError, match="bootstrap failed"):
                await DHTNode.create(p2p=p2p, initial_peers=[member.dht.maddrs[0]])
            await p2p.shutdown()
        async with running_p2pd(listen) as p2pd:
            p2p = await P2P.replicate(Multiaddr(f"/unix{p2pd.control_socket}"))
            await p2p._client.connect(PeerID.from_base58(peer), [Multiaddr(address)])
            node = await DHTNode.create(p2p=p2p)
            key = DHTID.generate(source=facts_key(authority.mesh_id))
            answer = await node.protocol.call_store(
                PeerID.from_base58(peer), [key], [b"\xc4\x00"], time.time() + 60, subkeys=["x"]
            )
            assert answer is None
            stub = node.protocol.get_stub(PeerID.from_base58(peer))
            with pytest.raises(P2PHandlerError, match="only members of the mesh may call its DHT"):
                await stub.rpc_find(dht_pb2.FindRequest(keys=[key.to_bytes()]))
            await p2p.shutdown()


async def test_a_forged_record_is_refused(
    authority: MeshAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A member may write under its own id alone, and only what it signed."""
    module = await asyncio.to_thread(import_dht_node)
    caplog.set_level(logging.WARNING, "hexmesh.dht")
    async with running(new_member(authority, tmp_path, "a")) as honest:
        honest.publish(1)
        forger = new_attestor(authority, tmp_path / "forger.key")
        listen = P2pdOptions(identity_path=tmp_path / "forger.key", listen=multiaddr("127.0.0.1", 0))
        async with running_p2pd(listen) as p2pd:
            node = await module.HivemindNode.open(p2pd.control_socket, forger)
            await node.meet(honest.dht.maddrs[0])
            key, expires = facts_key(authority.mesh_id), time.time() + LIFETIME_S
            other = honest.attestor.node_id
            about_other = signed_by(forger, record_of(honest.attestor, 99), expires)
            own = signed_by(forger, record_of(forger), expires)
            assert [
                await accepts(node, honest, key, other, about_other, expires),
                await accepts(node, honest, key, forger.node_id, about_other, expires),
                await accepts(node, honest, key, other, own, expires),
                await accepts(node, honest, key, forger.node_id, own, expires + 30),
                await accepts(node, honest, b"another key", forger.node_id, own, expires),
                await accepts(node, honest, key, forger.node_id, b"nonsense", expires),
                await accepts(node, honest, key, None, own, expires),
                await accepts(node, honest, key, forger.node_id, own, expires),
            ] == [False] * 7 + [True]
            await until(lambda: honest.directory.record(forger.node_id) is not None, "the good one is known")
            assert honest.directory.record(other) is None
            await node.close()
        with pytest.raises(Refused, match="signed a record of"):
            honest.take(about_other)


async def accepts(
    node: object, member: Member, key: bytes, subkey: str | None, signed: bytes, expires: float
) -> bool:
    """Ask one peer to store, past the asker's own validator."""
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID

    answer = await node._node.protocol.call_store(  # type: ignore[attr-defined]
        PeerID.from_base58(member.attestor.dht_peer_id),
        [DHTID.generate(source=key)],
        [msgspec.msgpack.encode(signed)],
        expires,
        subkeys=[subkey],
    )
    assert answer is not None, "the call itself failed"
    return bool(answer[0])


async def test_a_wrong_clock_is_named(
    authority: MeshAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = await asyncio.to_thread(import_dht_node)
    async with running(new_member(authority, tmp_path, "a")) as member:
        monkeypatch.setattr("hivemind.dht.protocol.get_dht_time", lambda: time.time() + 7)
        late = new_attestor(authority, tmp_path / "late.key")
        listen = P2pdOptions(identity_path=tmp_path / "late.key", listen=multiaddr("127.0.0.1", 0))
        async with running_p2pd(listen) as p2pd:
            node = await module.HivemindNode.open(p2pd.control_socket, late)
            with pytest.raises(Refused, match=r"\+(7\.0|[56]\.\d) s off ours; the DHT allows 3 s") as caught:
                await node.meet(member.dht.maddrs[0])
            assert "NTP" in caught.value.next_step
            await node.close()


async def test_killing_p2pd_is_noticed_and_survived(
    authority: MeshAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hexmesh.dht")
    async with running(new_member(authority, tmp_path, "a")) as first:
        async with running(new_member(authority, tmp_path, "b", *first.dht.maddrs)) as second:
            second.publish(1)
            await until(lambda: first.sequence_of(second) == 1, "the record is known")
            first.publish(1)
            maddrs, pid = second.dht.maddrs, second.dht.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not second.dht.is_up, "the death is noticed", NOTICE_S)
            await until(lambda: second.dht.is_up, "it is up again")
            assert second.dht.maddrs == maddrs
            assert (second.dht.n_starts, first.dht.n_starts) == (2, 1)
            second.publish(2)
            await until(lambda: first.sequence_of(second) == 2, "records of the restarted node arrive")
            await until(lambda: second.sequence_of(first) == 1, "and it gets those of others")
        warnings = [entry.message for entry in caplog.records if entry.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert "p2pd was killed by signal 9" in warnings[0]
        assert not any(entry.exc_info for entry in caplog.records)


async def test_a_port_that_is_taken_is_one_line_and_not_the_end(
    authority: MeshAuthority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    options = DhtOptions(identity_path=tmp_path / "a.key", listen_host="127.0.0.1", port=port)
    member = Member(new_attestor(authority, tmp_path / "a.key"), options)
    task = asyncio.create_task(member.dht.run())
    await until(lambda: member.dht.n_starts == 0 and "address already in use" in (member.dht.fault or ""), "")
    server.close()
    await server.wait_closed()
    await until(lambda: member.dht.is_up, "it is up once the port is free")
    assert sum(entry.levelno >= logging.WARNING for entry in caplog.records) == 1
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_calls_on_a_dead_p2pd_end(authority: MeshAuthority, tmp_path: Path) -> None:
    module = await asyncio.to_thread(import_dht_node)
    attestor = new_attestor(authority, tmp_path / "a.key")
    listen = P2pdOptions(identity_path=tmp_path / "a.key", listen=multiaddr("127.0.0.1", 0))
    async with running_p2pd(listen) as p2pd:
        node = await module.HivemindNode.open(p2pd.control_socket, attestor)
        os.kill(p2pd.pid, signal.SIGKILL)
        await p2pd.wait()
        started_s = time.monotonic()
        with pytest.raises(Lost):
            await node.own_maddrs()
        await node.close()
        assert time.monotonic() - started_s < 1.0


OWNER = """
import asyncio, sys
from pathlib import Path
from daemon.discovery.libp2p import ensure_identity, multiaddr
from daemon.discovery.p2pd import P2pdOptions, running_p2pd

async def main():
    path = Path(sys.argv[1])
    ensure_identity(path)
    async with running_p2pd(P2pdOptions(identity_path=path, listen=multiaddr("127.0.0.1", 0))) as p2pd:
        print(p2pd.pid, flush=True)
        await asyncio.Event().wait()

if sys.argv[2] == "uvloop":
    import uvloop
    uvloop.run(main())
asyncio.run(main())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_p2pd_does_not_outlive_its_killed_owner(tmp_path: Path, loop: str) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(tmp_path / "a.key"), loop, stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        pid = int(await owner.stdout.readline())
    assert is_running(pid)
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    await until(lambda: not is_running(pid), "p2pd ends with its owner", NOTICE_S)


async def test_the_control_socket_lies_where_it_can(tmp_path: Path) -> None:
    short, long = tmp_path / "s", tmp_path / ("x" * 90)
    for folder in (short, long):
        ensure_identity(folder / "k")
        (folder / "k.sock").touch()
        listen = P2pdOptions(identity_path=folder / "k", listen=multiaddr("127.0.0.1", 0))
        async with running_p2pd(listen) as p2pd:
            assert p2pd.control_socket.is_socket()
            assert (p2pd.control_socket.parent == folder) == (folder == short)
        assert not p2pd.control_socket.exists()


async def test_closing_ends_p2pd(authority: MeshAuthority, tmp_path: Path) -> None:
    async with running(new_member(authority, tmp_path, "a")) as member:
        pid = member.dht.pid
        assert pid is not None
        assert is_running(pid)
    assert not is_running(pid)
