"""A member in a process of its own that serves a model folder, for tests that kill, stop or spoil it.

Reads one JSON line, prints its address, and serves until stdin closes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from daemon.models.manifests import local_manifest
from daemon.models.model_source import resolve_model
from daemon.models.tensor_files import FolderTensors, tensor_places
from daemon.models.weight_server import WeightServer
from daemon.peering.address import LOOPBACK, bound_address, listen_tcp
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.peering.tls import TlsFiles
from hexmesh.ids import NodeId


async def main() -> None:
    told = json.loads(sys.stdin.readline())
    folder = Path(told["folder"])
    model = resolve_model(told["model"])
    local = local_manifest(model, folder)
    server = WeightServer(
        model_id=local.id,
        manifest=local.manifest,
        encoded=local.encoded,
        folder=model.folder,
        tensors=FolderTensors(tensor_places(model), local.manifest),
        is_busy=lambda: False if not told["pause_s"] else bool(time.sleep(told["pause_s"])),
    )
    listener = listen_tcp(LOOPBACK, told["port"], flag="--peer-port")
    address = str(bound_address(listener))
    peer = LocalPeer(
        node_id=NodeId(told["node_id"]),
        boot=1,
        name="peer",
        address=address,
        tls=TlsFiles(folder / "key.pem", folder / "cert.pem", (folder / "root.der").read_bytes()),
    )
    events = PeerEvents(on_message=lambda *_: None, on_bulk=server.serve)
    async with PeerNetwork(peer, listener, events):
        print(address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
