"""A member in a process of its own, for tests that kill it: reads one JSON line, dials, sends, stays."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from daemon.peering.address import LOOPBACK, bound_address, listen_tcp, parse_address
from daemon.peering.greeting import LocalPeer
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.peering.tls import TlsFiles
from hexmesh.ids import NodeId
from hexmesh.wire.data import GenerateCancel


async def main() -> None:
    told = json.loads(sys.stdin.readline())
    folder = Path(told["folder"])
    listener = listen_tcp(LOOPBACK, 0, flag="--peer-port")
    local = LocalPeer(
        node_id=NodeId(told["node_id"]),
        boot=1,
        name="process",
        address=str(bound_address(listener)),
        tls=TlsFiles(folder / "key.pem", folder / "cert.pem", (folder / "root.der").read_bytes()),
    )
    peer = NodeId(told["peer"])

    def answer(node_id: NodeId, *_: object) -> None:
        network.send(node_id, GenerateCancel(sequence="answer", attempt=0))

    address = parse_address(told["address"])
    async with PeerNetwork(local, listener, PeerEvents(on_message=answer)) as network:
        network.learn_address(peer, address.host, address.port)
        for channel in told["channels"]:
            network.send(peer, GenerateCancel(sequence=channel, attempt=0), channel=channel)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
