"""Members of meshes, and clients that are none, for tests that use real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from daemon.peering.address import LOOPBACK, bound_address, listen_tcp
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.peering.tls import TlsFiles
from hexmesh.identity.authority import MeshAuthority, request_certificate
from hexmesh.identity.certificates import to_pem
from hexmesh.identity.keys import NodeKey
from hexmesh.ids import NodeId, new_boot
from hexmesh.wire import codec
from hexmesh.wire.data import GenerateCancel
from hexmesh.wire.frames import FrameDecoder

DHT_PEER_ID = "12D3KooWTestTestTest"


def write_tls_files(authority: MeshAuthority, key: NodeKey, folder: Path) -> TlsFiles:
    """A member's files as its state folder would hold them."""
    certificate = authority.issue(request_certificate(key), DHT_PEER_ID, datetime.now(UTC))
    return write_files(folder, key, certificate, authority.root_der)


def write_files(folder: Path, key: NodeKey, certificate: bytes, root_der: bytes) -> TlsFiles:
    """Whatever key and certificate a test wants, as a state folder would hold them."""
    folder.mkdir(parents=True, exist_ok=True)
    key_file, certificate_file = folder / "key.pem", folder / "cert.pem"
    key_file.touch(mode=0o600)
    key_file.write_bytes(key.to_pem())
    certificate_file.write_bytes(to_pem([certificate]))
    return TlsFiles(key_file, certificate_file, root_der)


@dataclass(slots=True)
class Member:
    """One member before its network runs, and everything that its network then reports."""

    local: LocalPeer
    listener: socket.socket
    seen: list[tuple[str, ...]] = field(default_factory=list)
    messages: list[tuple[NodeId, msgspec.Struct, memoryview]] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def node_id(self) -> NodeId:
        return self.local.node_id

    @property
    def port(self) -> int:
        return bound_address(self.listener).port

    @property
    def events(self) -> PeerEvents:
        return PeerEvents(
            on_message=self._on_message,
            on_peer_up=lambda node_id: self._saw("up", node_id),
            on_peer_down=lambda node_id, reason: self._saw("down", node_id, reason),
            on_refused=lambda node_id: self._saw("refused", node_id),
            on_path=lambda node_id, is_relayed: self._saw(
                "path", node_id, "relayed" if is_relayed else "direct"
            ),
            on_reach=lambda: self._saw("reach"),
            on_channel_lost=lambda node_id, channel, reason: self._saw("lost", node_id, channel),
        )

    async def until(self, claim: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until the claim holds; it is looked at whenever the network reports something."""
        async with asyncio.timeout(timeout_s):
            while not claim():
                self._changed.clear()
                await self._changed.wait()

    def _on_message(self, node_id: NodeId, message: msgspec.Struct, payload: memoryview) -> None:
        self.messages.append((node_id, message, payload))
        self._changed.set()

    def _saw(self, *event: str) -> None:
        self.seen.append(event)
        self._changed.set()


def make_member(
    authority: MeshAuthority, folder: Path, name: str = "n", *, key: NodeKey | None = None, port: int = 0
) -> Member:
    """A member with a listening socket, its files in a folder of its own."""
    key = key or NodeKey.generate()
    listener = listen_tcp(LOOPBACK, port, flag="--peer-port")
    local = LocalPeer(
        node_id=key.node_id,
        boot=new_boot(random.Random()),
        name=name,
        address=str(bound_address(listener)),
        tls=write_tls_files(authority, key, folder / name),
    )
    return Member(local, listener)


def note(text: str) -> GenerateCancel:
    return GenerateCancel(sequence=text, attempt=0)


def network_of(member: Member, **options: object) -> PeerNetwork:
    return PeerNetwork(member.local, member.listener, member.events, **options)  # type: ignore[arg-type]


def introduce(network: PeerNetwork, other: Member) -> None:
    network.learn_address(other.node_id, LOOPBACK, other.port)


class Raw:
    """A bare TLS client that says whatever a test wants."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder()

    def say(self, message: msgspec.Struct) -> None:
        self._writer.writelines(codec.PEERING.frame(message))  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    async def hear(self) -> list[msgspec.Struct]:
        """Everything until the other side closes; a reset counts as that."""
        heard: list[msgspec.Struct] = []
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            async with asyncio.timeout(10):
                while data := await self._reader.read(65536):
                    heard.extend(codec.PEERING.decode(f.header) for f in self._decoder.feed(data))
        return heard

    async def hear_one(self) -> msgspec.Struct:
        async with asyncio.timeout(10):
            while data := await self._reader.read(65536):
                for frame in self._decoder.feed(data):
                    return codec.PEERING.decode(frame.header)
        raise AssertionError("the other side closed")


@contextlib.asynccontextmanager
async def dialled(port: int, context: ssl.SSLContext) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname="")
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
