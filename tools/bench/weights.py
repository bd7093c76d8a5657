"""How fast weights come from peers over loopback, against a plain copy through one TLS socket.

    python tools/bench/weights.py                  # docs/benchmarks/weights.md and .json
    python tools/bench/weights.py --quick --print  # less data, nothing written

Peers are processes of their own with real peer networks. Everything is hashed, written and synced as in a daemon; the
files lie in --folder (default: the temp folder). The plain copy reads the same file, and drops it on arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from daemon.models.cached_model import About, CachedModel  # noqa: E402
from daemon.models.manifests import LocalManifest, local_manifest  # noqa: E402
from daemon.models.model_source import SHIPPED_MODEL, TOKENIZER_FILES, resolve_model  # noqa: E402
from daemon.models.tensor_files import FolderTensors, tensor_places  # noqa: E402
from daemon.models.weight_fetch import WeightFetch, WeightPeer  # noqa: E402
from daemon.models.weight_server import WeightServer  # noqa: E402
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp, parse_address  # noqa: E402
from daemon.peering.bulk import BulkSocket  # noqa: E402
from daemon.peering.bulk_dial import BulkDialler  # noqa: E402
from daemon.peering.greeting import LocalPeer  # noqa: E402
from daemon.peering.outgoing import NoVerdicts  # noqa: E402
from daemon.peering.peers import PeerEvents, PeerNetwork  # noqa: E402
from daemon.peering.tls import TlsFiles, client_context  # noqa: E402
from hexmesh.identity.authority import MeshAuthority, request_certificate  # noqa: E402
from hexmesh.identity.certificates import to_pem  # noqa: E402
from hexmesh.identity.keys import NodeKey  # noqa: E402
from hexmesh.ids import NodeId  # noqa: E402
from hexmesh.weights.safetensors_format import LENGTH_BYTES  # noqa: E402
from hexmesh.wire.frames import frame_parts  # noqa: E402
from hexmesh.wire.weights import ANSWER_LIMITS  # noqa: E402

MIB = 2**20
DISK_ALONE = "no network: write and sync"
NOTES = """The plain copy reads a file and sends it through one TLS socket, into memory that is dropped.
Weights are read from files, hashed on arrival, written, synced to the disk and renamed, in threads
of low priority. A peer's connection is one thread on each side: several peers add up until CPUs or
the disk are full (the first line is the disk alone). How late the event loop of the fetching
process ran is what heartbeats would notice.
"""
TENSOR_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True)
class Identity:
    """A member's key and certificate in a folder."""

    node_id: NodeId
    tls: TlsFiles

    def local_peer(self, name: str, address: str) -> LocalPeer:
        return LocalPeer(node_id=self.node_id, boot=1, name=name, address=address, tls=self.tls)


def make_identity(authority: MeshAuthority, folder: Path) -> Identity:
    folder.mkdir(parents=True)
    key = NodeKey.generate()
    certificate = authority.issue(request_certificate(key), "12D3KooWBench", datetime.now(UTC))
    (folder / "key.pem").write_bytes(key.to_pem())
    (folder / "cert.pem").write_bytes(to_pem([certificate]))
    (folder / "root.der").write_bytes(authority.root_der)
    (folder / "id").write_text(key.node_id)
    return read_identity(folder)


def read_identity(folder: Path) -> Identity:
    tls = TlsFiles(folder / "key.pem", folder / "cert.pem", (folder / "root.der").read_bytes())
    return Identity(NodeId((folder / "id").read_text()), tls)


def write_model(folder: Path, n_bytes: int) -> None:
    """A model folder with random tensors: only bytes matter here."""
    folder.mkdir(parents=True)
    for name in ("config.json", *TOKENIZER_FILES):
        if (SHIPPED_MODEL / name).is_file():
            shutil.copy(SHIPPED_MODEL / name, folder / name)
    n_tensors = n_bytes // TENSOR_BYTES
    header = json.dumps(
        {
            f"layers.{index}.weight": {
                "dtype": "F32",
                "shape": [TENSOR_BYTES // 4],
                "data_offsets": [index * TENSOR_BYTES, (index + 1) * TENSOR_BYTES],
            }
            for index in range(n_tensors)
        }
    ).encode()
    rng = np.random.default_rng(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for _ in range(n_tensors):
            file.write(rng.bytes(TENSOR_BYTES))


# --- the peer's process ---


async def serve(identity_folder: Path, model_folder: Path, is_plain: bool) -> None:
    """Serve weights, or a plain copy, until stdin closes; tells its address on stdout and its CPU time at the end."""
    model = resolve_model(str(model_folder))
    local = local_manifest(model, identity_folder)
    server = WeightServer(
        model_id=local.id,
        manifest=local.manifest,
        encoded=local.encoded,
        folder=model.folder,
        tensors=FolderTensors(tensor_places(model), local.manifest),
        is_busy=lambda: False,
    )

    def on_bulk(sock: BulkSocket) -> None:
        if is_plain:
            threading.Thread(target=send_plain, args=(sock, model_folder / "model.safetensors")).start()
        else:
            server.serve(sock)

    listener = listen_tcp(LOOPBACK, 0, flag="--peer-port")
    address = str(bound_address(listener))
    peer = read_identity(identity_folder).local_peer("peer", address)
    events = PeerEvents(on_message=lambda *_: None, on_bulk=on_bulk)
    async with PeerNetwork(peer, listener, events):
        print(json.dumps({"address": address}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    print(json.dumps({"cpu_s": cpu_s()}), flush=True)


def send_plain(sock: BulkSocket, path: Path) -> None:
    """What one TLS socket can do: a file, read in large pieces, nothing looked at."""
    buffer = memoryview(bytearray(4 * MIB))
    with sock, path.open("rb") as file:
        sock.prepare(limits=ANSWER_LIMITS, timeout_s=30.0)
        sock.receive()  # the dialling side asks first
        while n_bytes := file.readinto(buffer):
            sock.send([buffer[:n_bytes]])


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- the runs ---


@dataclass(slots=True)
class Peer:
    """A serving process."""

    identity: Identity
    process: subprocess.Popen[str]
    address: str

    def stop(self) -> float:
        """End it; its CPU seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        told = json.loads(self.process.stdout.readline())
        self.process.wait(10)
        return float(told["cpu_s"])


def start_peer(authority: MeshAuthority, folder: Path, model: Path, *, is_plain: bool = False) -> Peer:
    identity = make_identity(authority, folder)
    command = [sys.executable, __file__, "--serve", str(folder), "--model", str(model)]
    process = subprocess.Popen(
        [*command, *(["--plain"] if is_plain else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return Peer(identity, process, json.loads(process.stdout.readline())["address"])


async def fetch(
    own: Identity, peers: Sequence[Peer], local: LocalManifest, folder: Path
) -> tuple[float, float]:
    """(seconds, worst lateness of the event loop) of fetching everything."""
    model = CachedModel(folder, local.manifest)
    model.describe(local.encoded, About(name="bench", folder=None), {})
    addresses = {peer.identity.node_id: parse_address(peer.address) for peer in peers}
    dialler = BulkDialler(own.local_peer("bench", ""), client_context(own.tls), NoVerdicts())

    async def dial(node_id: NodeId) -> BulkSocket:
        return await dialler.dial(node_id, addresses[node_id])

    job = WeightFetch(
        model_id=local.id,
        model=model,
        chunks=model.missing_chunks(range(len(local.manifest.tensors))),
        peers=lambda: [WeightPeer(node_id, "peer") for node_id in addresses],
        dial=dial,
        on_progress=lambda _: None,
    )
    late: list[float] = []
    watching = asyncio.create_task(watch_lateness(late))
    began_s = time.monotonic()
    await job.run()
    seconds = time.monotonic() - began_s
    watching.cancel()
    return seconds, max(late, default=0.0)


async def watch_lateness(late: list[float]) -> None:
    while True:
        due_s = time.monotonic() + 0.005
        await asyncio.sleep(0.005)
        late.append(time.monotonic() - due_s)


async def copy_plain(own: Identity, peer: Peer, n_bytes: int) -> float:
    """Seconds to receive a file through one TLS socket."""
    dialler = BulkDialler(own.local_peer("bench", ""), client_context(own.tls), NoVerdicts())
    sock = await dialler.dial(peer.identity.node_id, parse_address(peer.address))

    def receive() -> float:
        buffer = bytearray(4 * MIB)
        began_s = time.monotonic()
        n_left = n_bytes
        with sock:
            sock.prepare(ANSWER_LIMITS, 30.0)
            sock.send(frame_parts(b"go"))
            while n_left > 0:
                n_left -= sock._socket.recv_into(buffer)  # below frames: this is what those are compared with
        return time.monotonic() - began_s

    return await asyncio.to_thread(receive)


async def run_all(folder: Path, n_bytes: int, n_repeats: int) -> list[dict[str, Any]]:
    """Every way in turn, `n_repeats` times, so that a busy moment of the machine meets them all."""
    authority = MeshAuthority.found(datetime.now(UTC))
    own = make_identity(authority, folder / "own")
    write_model(folder / "model", n_bytes)
    local = local_manifest(resolve_model(str(folder / "model")), folder)
    runs: list[dict[str, Any]] = []
    for repeat in range(n_repeats):
        runs.append(write_synced(folder / "synced", n_bytes))
        for way, n_peers in (
            ("plain copy, 1 TLS socket", 1),
            ("weights, 1 peer", 1),
            ("weights, 2 peers", 2),
        ):
            is_plain = way.startswith("plain")
            names = [f"{way.split()[0]}{n_peers}-{repeat}-{index}" for index in range(n_peers)]
            peers = [
                start_peer(authority, folder / name, folder / "model", is_plain=is_plain) for name in names
            ]
            own_cpu_s, late_s = cpu_s(), None
            if is_plain:
                seconds = await copy_plain(
                    own, peers[0], (folder / "model" / "model.safetensors").stat().st_size
                )
            else:
                target = folder / "cache"
                seconds, late_s = await fetch(own, peers, local, target)
                shutil.rmtree(target)
            own_cpu_s = cpu_s() - own_cpu_s
            run: dict[str, Any] = {
                "way": way,
                "seconds": seconds,
                "bytes_per_s": n_bytes / seconds,
                "cpu_share_here": own_cpu_s / seconds,
                "loop_late_s": late_s,
            }
            for peer in peers:
                peer.stop()
            print(
                f"{way}: {run['bytes_per_s'] / 1e6:.0f} MB/s, CPU {run['cpu_share_here']:.2f}",
                file=sys.stderr,
            )
            runs.append(run)
    return runs


def write_synced(path: Path, n_bytes: int) -> dict[str, Any]:
    """What the disk takes by itself: no fetch that ends on it can be faster."""
    data = np.random.default_rng(2).bytes(4 * MIB)
    began_s, began_cpu_s = time.monotonic(), cpu_s()
    with path.open("wb") as file:
        for _ in range(n_bytes // len(data)):
            file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
    seconds = time.monotonic() - began_s
    path.unlink()
    return {
        "way": DISK_ALONE,
        "seconds": seconds,
        "bytes_per_s": n_bytes / seconds,
        "cpu_share_here": (cpu_s() - began_cpu_s) / seconds,
        "loop_late_s": None,
    }


def summarise(runs: list[dict[str, Any]]) -> str:
    def median(way: str, key: str) -> float:
        return float(statistics.median(run[key] for run in runs if run["way"] == way))

    ways = list(dict.fromkeys(run["way"] for run in runs))
    base = median("plain copy, 1 TLS socket", "bytes_per_s")
    lines = [
        "| way | MB/s | of the plain copy | CPUs of the fetching process | event loop late by at most |",
        "|---|---|---|---|---|",
    ]
    for way in ways:
        rate = median(way, "bytes_per_s")
        late = max(
            (run["loop_late_s"] for run in runs if run["way"] == way and run["loop_late_s"] is not None),
            default=None,
        )
        shown = f"{late * 1e3:.0f} ms" if late is not None else "-"
        lines.append(
            f"| {way} | {rate / 1e6:.0f} | {rate / base:.2f} | {median(way, 'cpu_share_here'):.2f} | {shown} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--folder", type=Path, default=None, help="where the files lie while it runs")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        asyncio.run(serve(args.serve, args.model, args.plain))
        return
    n_bytes, n_repeats = (256 * MIB, 2) if args.quick else (512 * MIB, 3)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="hexmesh-bench-") as folder:
        runs = asyncio.run(run_all(Path(folder), n_bytes, n_repeats))
    table = summarise(runs)
    print(table)
    if not args.print:
        save(table, runs, n_bytes)


def save(table: str, runs: list[dict[str, Any]], n_bytes: int) -> None:
    folder = ROOT / "docs" / "benchmarks"
    told = {"bytes": n_bytes, "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "runs": runs}
    (folder / "weights.json").write_text(json.dumps(told, indent=1) + "\n")
    (folder / "weights.md").write_text(
        f"# Weights from peers\n\n`python tools/bench/weights.py`, {n_bytes // MIB} MiB over loopback, medians of "
        f"{len(runs) // 4} runs in turn; {os.cpu_count()} CPUs for all processes, load average "
        f"{told['load_average']:.1f} at the end.\n\n{table}\n\n{NOTES}"
    )


if __name__ == "__main__":
    main()
