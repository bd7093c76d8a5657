"""Peers that serve weights, each a process of its own, and a member that fetches from them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from daemon.models.cached_model import About, CachedModel
from daemon.models.manifests import LocalManifest, local_manifest
from daemon.models.model_source import SHIPPED_MODEL, resolve_model
from daemon.models.weight_fetch import FetchProgress, WeightFetch, WeightPeer
from daemon.peering.address import Address, parse_address
from daemon.peering.bulk import BulkSocket
from daemon.peering.bulk_dial import BulkDialler
from daemon.peering.greeting import LocalPeer
from daemon.peering.outgoing import NoVerdicts
from daemon.peering.tls import client_context
from hexmesh.errors import Lost
from hexmesh.identity.authority import MeshAuthority
from hexmesh.identity.keys import NodeKey
from hexmesh.ids import NodeId
from tests.e2e.members import write_tls_files

MIB = 2**20


def write_random_model(folder: Path, *, n_tensors: int, tensor_bytes: int) -> LocalManifest:
    """A model folder whose tensors are random bytes: to move it is all that can be done with it."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(SHIPPED_MODEL / name, folder / name)
    header = json.dumps(
        {
            f"layers.{at:02d}.weight": {
                "dtype": "U8",
                "shape": [tensor_bytes],
                "data_offsets": [at * tensor_bytes, (at + 1) * tensor_bytes],
            }
            for at in range(n_tensors)
        }
    ).encode()
    data = np.random.default_rng(1).bytes(n_tensors * tensor_bytes)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return local_manifest(resolve_model(str(folder)), folder.parent)


def spoil(path: Path, at: int) -> None:
    """Flip a byte, and leave the time as it was: nobody who trusts times notices."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@dataclass(slots=True)
class ServingPeer:
    """A process that serves a folder."""

    name: str
    node_id: NodeId
    address: Address
    process: subprocess.Popen[str]


@dataclass(slots=True)
class WeightMesh:
    """Owner of the serving processes, and of the key that fetches from them."""

    folder: Path
    local: LocalManifest
    model_folder: Path
    authority: MeshAuthority = field(default_factory=lambda: MeshAuthority.found(datetime.now(UTC)))
    own: NodeKey = field(default_factory=NodeKey.generate)
    peers: dict[NodeId, ServingPeer] = field(default_factory=dict)

    def start_peer(
        self, name: str, *, model: Path | None = None, pause_s: float = 0.0, again: ServingPeer | None = None
    ) -> ServingPeer:
        """Serve a folder. `pause_s` after each 256 KiB makes it slow; `again` takes a dead peer's identity and port."""
        home = self.folder / name
        if again is None:
            key = NodeKey.generate()
            write_tls_files(self.authority, key, home)
            (home / "root.der").write_bytes(self.authority.root_der)
        else:
            again.process.communicate()  # it is dead: close its pipes
        told = {
            "folder": str(home),
            "model": str(model or self.model_folder),
            "node_id": again.node_id if again is not None else key.node_id,
            "port": again.address.port if again is not None else 0,
            "pause_s": pause_s,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.weight_peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(told) + "\n")
        process.stdin.flush()
        address = parse_address(process.stdout.readline().strip())
        peer = ServingPeer(name, NodeId(str(told["node_id"])), address, process)
        self.peers[peer.node_id] = peer
        return peer

    def cache(self, name: str = "cache") -> CachedModel:
        """An empty place to fetch to, or one from before."""
        model = CachedModel(self.folder / name, self.local.manifest)
        model.describe(self.local.encoded, About(name="random", folder=None), {})
        return model

    async def fetch(
        self,
        model: CachedModel,
        tensors: Iterable[int],
        on_progress: Callable[[FetchProgress], None] = lambda _: None,
    ) -> int:
        """Fetch what lacks of those tensors from all peers; how many bytes came."""
        chunks = model.missing_chunks(tensors)
        seen: list[int] = [0]

        def note(progress: FetchProgress) -> None:
            seen.append(progress.done_bytes)
            on_progress(progress)

        fetch = WeightFetch(
            model_id=self.local.id,
            model=model,
            chunks=chunks,
            peers=lambda: [WeightPeer(peer.node_id, peer.name) for peer in self.peers.values()],
            dial=self.dial,
            on_progress=note,
        )
        async with asyncio.timeout(60):
            await fetch.run()
        return seen[-1]

    async def dial(self, node_id: NodeId) -> BulkSocket:
        files = write_tls_files(self.authority, self.own, self.folder / "own")
        me = LocalPeer(node_id=self.own.node_id, boot=1, name="own", address="", tls=files)
        peer = self.peers.get(node_id)
        if peer is None:
            raise Lost("nobody of that name")
        return await BulkDialler(me, client_context(files), NoVerdicts()).dial(node_id, peer.address)

    def stop(self) -> None:
        for peer in self.peers.values():
            peer.process.kill()
            peer.process.communicate()


@contextmanager
def weight_mesh(folder: Path, *, n_tensors: int = 16, tensor_bytes: int = 5 * MIB) -> Iterator[WeightMesh]:
    """A random model of that many tensors, and no peers yet."""
    local = write_random_model(folder / "model", n_tensors=n_tensors, tensor_bytes=tensor_bytes)
    mesh = WeightMesh(folder, local, folder / "model")
    try:
        yield mesh
    finally:
        mesh.stop()
