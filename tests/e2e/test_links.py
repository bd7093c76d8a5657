"""Links measured over real connections between members on loopback."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from daemon.peering.links import LinkMonitor
from daemon.peering.peers import PeerEvents, PeerNetwork
from hexmesh.errors import Busy, Lost
from hexmesh.identity.authority import MeshAuthority
from hexmesh.ids import NodeId
from hexmesh.wire.codec import Codec
from hexmesh.wire.facts import FACTS_MESSAGE
from tests.e2e.members import Member, make_member

PATIENCE_S = 20.0


@dataclass
class NetworkCourier:
    """Sends through the network once there is one."""

    node_id: str
    network: PeerNetwork | None = None

    def send(
        self, to: str, message: msgspec.Struct, payload: memoryview | bytes = b"", *, channel: str = "data"
    ) -> bool:
        assert self.network is not None
        assert channel == "probe"
        try:
            self.network.send(NodeId(to), message, payload, "probe")
        except (Busy, Lost):
            return False
        return True

    def queued_bytes(self, to: str) -> int:
        assert self.network is not None
        return self.network.queued_bytes(NodeId(to), "probe")


async def start(stack: AsyncExitStack, member: Member, group: asyncio.TaskGroup) -> LinkMonitor:
    courier = NetworkCourier(member.node_id)
    monitor = LinkMonitor(
        courier,  # type: ignore[arg-type]
        rng=random.Random(member.local.name),
        queued_bytes=courier.queued_bytes,
    )
    events = PeerEvents(
        on_message=monitor.receive,  # type: ignore[arg-type]
        on_peer_up=monitor.connected,
        on_peer_down=lambda node_id, reason: monitor.disconnected(node_id),
    )
    codec: Codec[msgspec.Struct] = Codec(FACTS_MESSAGE, name="facts")
    network = PeerNetwork(member.local, member.listener, events, decode=codec.decode)
    courier.network = await stack.enter_async_context(network)
    group.create_task(monitor.run(), name=f"links-{member.local.name}")
    return monitor


async def test_three_members_measure_all_six_links(tmp_path: Path) -> None:
    authority = MeshAuthority.found(datetime.now(UTC))
    members = [make_member(authority, tmp_path, name) for name in "abc"]
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        monitors = [await start(stack, member, group) for member in members]
        async with asyncio.timeout(PATIENCE_S):
            for monitor, member in zip(monitors, members, strict=True):
                for other in members:
                    if other is not member:
                        network = monitor._courier.network  # type: ignore[attr-defined]
                        network.learn_address(other.node_id, "127.0.0.1", other.port)
                        network.connect(other.node_id)
            while not all(len(monitor.links()) == 2 for monitor in monitors):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        links = [facts.link for monitor in monitors for facts in monitor.links()]
        ids = [member.node_id for member in members]
        expected = {(a, b) for a in ids for b in ids if a != b}
        assert {(link.src, link.dst) for link in links} == expected
        assert all(0 < link.rtt_p50_s <= link.rtt_p95_s < 1.0 for link in links)
        assert all(1e6 < link.bytes_per_s < 1e11 for link in links)
        for task in [task for task in asyncio.all_tasks() if task.get_name().startswith("links-")]:
            task.cancel()
