"""A member of a real mesh that lies: it joined with a good token, greets properly, and then says what it likes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from daemon.discovery.libp2p import ensure_identity
from daemon.dispatch import PEER_MESSAGES
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp, parse_address
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.trust.attestor import Attestor
from daemon.trust.joining import Joiner, join_mesh
from daemon.trust.state import StateFolder
from hexmesh.errors import HexmeshError
from hexmesh.identity.tokens import parse_token
from hexmesh.ids import NodeId, new_boot
from hexmesh.membership.records import sign_record
from hexmesh.wire.control import Ask, Ballot, Beat, Cert, CertMessage, Epoch, Header, Hello, Prepare
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    ReplicaStats,
    Row,
    SampledToken,
    SamplingParams,
    Step,
    StepRefused,
    StepResult,
)
from hexmesh.wire.facts import Facts, Ping, ProbeAnswer, ProbeAsk, ProbeChunk, ProbeEnd, ProbeReport
from hexmesh.wire.notice import PlanBlocked
from hexmesh.wire.peering import Channel
from tests.node_records import node_record

HIDDEN_BYTES = 4 * 64
"""More or less a token's hidden state; wrong on purpose for most models."""


@dataclass
class Spied:
    """What the liar knows of the mesh it attacks; the test tells it more than a member could find out."""

    nodes: list[str]
    replica: str
    stages: list[str]
    sequences: list[str] = field(default_factory=list)


Lie = tuple[msgspec.Struct, bytes, Channel]


class Evil:
    """Owner of the liar's network while `attack` runs."""

    def __init__(self, folder: Path, token: str, spied: Spied) -> None:
        self._folder = folder
        self._token = parse_token(token)
        self._spied = spied
        self._rng = random.Random(7)
        self.epoch: Epoch | None = None
        self.records: list[bytes] = []
        self.n_sent = 0
        self.n_rounds = 0

    async def attack(self, is_over: Any) -> None:
        """Join, find out the epoch, and lie until told to stop."""
        with StateFolder(self._folder) as state:
            key = state.node_key()
            peer_id = ensure_identity(state.dht_identity_file)
            with listen_tcp(LOOPBACK, 0, flag="--peer-port") as listener:
                address = str(bound_address(listener))
                joiner = Joiner(key=key, dht_peer_id=peer_id, name="evil", address=address)
                membership = await join_mesh(joiner, self._token)
                state.save_membership(membership)
                self._attestor = Attestor(key, tuple(membership.certificates), membership.root_der)
                self._local = LocalPeer(
                    node_id=key.node_id,
                    boot=new_boot(self._rng),
                    name="evil",
                    address=address,
                    tls=state.tls_files(membership),
                )
                events = PeerEvents(on_message=self._on_message)
                async with PeerNetwork(self._local, listener, events, decode=PEER_MESSAGES.decode) as network:
                    for member in membership.members:
                        where = parse_address(member.address)
                        network.learn_address(NodeId(member.node_id), where.host, where.port)
                    await self._lie(network, is_over)

    async def _lie(self, network: PeerNetwork, is_over: Any) -> None:
        async with asyncio.timeout(60):
            while self.epoch is None:
                self._tell(network, [(Facts(record=self._own_record()), b"", "control")])
                await asyncio.sleep(0.1)
        while not is_over():
            self._tell(network, list(self._lies(self.epoch)))
            self.n_rounds += 1
            await asyncio.sleep(0.02)

    def _tell(self, network: PeerNetwork, lies: list[Lie]) -> None:
        for node in self._spied.nodes:
            for message, payload, channel in lies:
                try:
                    network.send(NodeId(node), message, payload, channel)
                except HexmeshError:  # its queue is full: enough for now
                    continue
                self.n_sent += 1

    def _on_message(self, node: str, message: msgspec.Struct, payload: memoryview) -> None:
        match message:
            case Hello(cert=Cert(epoch=epoch)):
                self.epoch = epoch
            case Facts(record=record):
                self.records = [*self.records[-20:], record]

    def _lies(self, epoch: Epoch) -> Iterator[Lie]:
        for message, payload in (*self._steps(epoch), *self._answers(epoch), *self._requests(epoch)):
            yield message, payload, "data"
        for order in self._orders(epoch):
            yield order, b"", "control"
        for record in self._records():
            yield Facts(record=record), b"", "control"
        for n in range(3):
            yield Ping(n=n), b"", "probe"
            yield ProbeAsk(probe=n), b"", "probe"
            yield ProbeChunk(probe=n, is_last=True), bytes(300_000), "probe"
            yield ProbeAnswer(probe=n, is_granted=True, retry_after_s=float("nan")), b"", "probe"
            yield ProbeReport(probe=n, n_bytes=2**60, elapsed_s=float("nan"), is_last=True), b"", "probe"
            yield ProbeEnd(probe=n), b"", "probe"

    def _steps(self, epoch: Epoch) -> Iterator[tuple[msgspec.Struct, bytes]]:
        """Steps that would write over the KV of running sequences, and steps that make no sense."""
        over = Row(start=0, n_tokens=8, blocks=[0, 1, 2, 3], sample=SamplingParams())
        absurd = [
            Row(start=-5, n_tokens=3, blocks=[0]),
            Row(start=0, n_tokens=2**40, blocks=[0]),
            Row(start=2**62, n_tokens=1, blocks=[2**62]),
            Row(start=0, n_tokens=1, blocks=[]),
            Row(start=0, n_tokens=1, blocks=[-1]),
        ]
        for stage in (*range(len(self._spied.stages)), -1, 99):
            for row in (over, *absurd):
                yield (
                    Step(
                        epoch=epoch,
                        cert=None,
                        replica=self._spied.replica,
                        stage=stage,
                        step=self._rng.randrange(1000),
                        driver=self._spied.stages[0],
                        rows=[row],
                    ),
                    self._rng.randbytes(8 * HIDDEN_BYTES if stage else 64),
                )

    def _answers(self, epoch: Epoch) -> Iterator[tuple[msgspec.Struct, bytes]]:
        """Results, refusals, figures and tokens of other nodes."""
        replica, wrong = self._spied.replica, [SampledToken(token_id=5)]
        times = [0.1] * len(self._spied.stages)
        first = self._rng.randrange(2000)
        for n in range(first, first + 20):
            yield StepResult(epoch=epoch, replica=replica, step=n, sampled=[wrong], stage_seconds=times), b""
            for stage in (0, 1, -1, 99):
                yield (
                    StepRefused(epoch=epoch, replica=replica, stage=stage, step=n, reason="I say so"),
                    b"",
                )
        for busy in (0, 10**9):
            stats = ReplicaStats(
                replica=replica,
                epoch=epoch,
                requests_running=busy,
                requests_waiting=busy,
                kv_blocks_total=1,
                kv_blocks_free=0,
                tokens_per_s=1e30,
                stage_busy=[],
            )
            yield stats, b""
            yield msgspec.structs.replace(stats, replica=f"r{self._rng.random()}"), b""
        for sequence in self._spied.sequences:
            for attempt in (1, 2):
                yield Generated(sequence=sequence, attempt=attempt, first=0, tokens=wrong * 500), b""
                yield (
                    Generated(sequence=sequence, attempt=attempt, first=0, tokens=[], finish_reason="stop"),
                    b"",
                )
                yield (
                    GenerateFailed(sequence=sequence, attempt=attempt, reason="I say so", retry=False),
                    b"",
                )
                yield GenerateCancel(sequence=sequence, attempt=attempt), b""

    def _requests(self, epoch: Epoch) -> Iterator[tuple[msgspec.Struct, bytes]]:
        """Requests in others' names, and impossible ones in its own."""
        good = Generate(
            sequence=f"{self._local.node_id}/x",
            attempt=1,
            epoch=epoch,
            replica=self._spied.replica,
            prompt=[1, 2, 3],
            emitted=[],
            max_tokens=4,
            stop_token_ids=[],
            sampling=SamplingParams(),
        )
        for changes in (
            {"max_tokens": 2**62},
            {"max_tokens": -1},
            {"prompt": []},
            {"prompt": [2**63]},
            {"prompt": [1] * 200_000},
            {"emitted": [1] * 100},
            {"replica": "no such"},
            *({"sequence": sequence} for sequence in self._spied.sequences),
        ):
            yield msgspec.structs.replace(good, **changes), b""

    def _orders(self, epoch: Epoch) -> Iterator[msgspec.Struct]:
        """Orders of a coordinator that nobody holds a lease of, and orders in others' names."""
        own = Header(src=self._local.node_id, boot=self._local.boot, to_boot=None, hears=True)
        ballot = Ballot(term=2**63, rank=2**62, node=own.src, boot=own.boot)
        mine = Epoch(ballot=ballot, n=1)
        cert = Cert(epoch=mine, digest="0", signature=self._rng.randbytes(64))
        seq = 2**60
        for header in (own, *(msgspec.structs.replace(own, src=node) for node in self._spied.nodes)):
            claimed = msgspec.structs.replace(ballot, node=header.src, term=epoch.ballot.term + 1)
            yield Ask(header=header, ballot=claimed, release=None)
            yield Ask(header=header, ballot=ballot, release=None)
            yield Beat(header=header, ballot=claimed, seq=seq, cur=cert, prep=None, heirs=("x",))
            yield Prepare(
                header=header,
                ballot=claimed,
                seq=seq,
                epoch=mine,
                digest="0",
                hosts=dict.fromkeys(self._spied.nodes, 1),
                plan=b"\x80",
            )
            yield CertMessage(header=header, cert=cert)
        yield PlanBlocked(code="evil", message="give up", next_step="now", needed_bytes=1, room_bytes=1)

    def _records(self) -> Iterator[bytes]:
        """Garbage, somebody else's record with a bit changed, an older one again, and one in another's name."""
        yield self._rng.randbytes(300)
        for record in self.records[:3]:
            yield record
            damaged = bytearray(record)
            damaged[self._rng.randrange(len(damaged))] ^= 1
            yield bytes(damaged)
        yield self._signed_about(self._spied.nodes[0])

    def _own_record(self) -> bytes:
        return self._signed_about(self._local.node_id)

    def _signed_about(self, node: str, name: str = "[/evil]") -> bytes:
        now_unix_s = time.time()
        record = node_record(
            node,
            mesh_id=self._attestor.mesh_id,
            boot=self._local.boot,
            sequence=int(now_unix_s * 1000) + 10**6,
            made_at_unix_s=now_unix_s,
            name=name,
            peer_address=self._local.address,
        )
        return sign_record(
            record,
            expires_at_unix_s=now_unix_s + 60,
            chain=self._attestor.chain,
            sign=self._attestor.sign,
        )
