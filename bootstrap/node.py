"""A running bootstrap node: the peer network with a relay, records, the DHT, and what is seen of them over HTTP.

It serves no model, takes no lease and is in no plan, so it needs neither torch nor the model's files. Messages
about plans and requests are not for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final, NoReturn, cast

import msgspec

from bootstrap.membership import BootstrapMember, become_bootstrap_member
from bootstrap.relay import Relay
from bootstrap.relay_metrics import relay_registry
from bootstrap.service import BootstrapService
from daemon.announcing import up_line
from daemon.config import JoinOptions
from daemon.courier import Channel, Payload
from daemon.discovery.dht import DhtOptions, MeshDht
from daemon.discovery.facts import FactsPublisher, RecordClock, RecordStamp
from daemon.discovery.roster import Roster
from daemon.peering.address import parse_address
from daemon.peering.greeting import LocalPeer
from daemon.peering.links import LinkMonitor
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.runfile import Run, remove_run, write_run
from daemon.service_group import ServiceGroup
from daemon.trust.cached_peers import KEEP_MEMBERS_S, member_addresses
from daemon.trust.desk import TrustDesk
from daemon.views import UpLine
from daemon.web.access import HttpOptions, read_api_keys
from daemon.web.http import HttpSurface
from daemon.web.telemetry import Telemetry
from hexmesh import __version__
from hexmesh.errors import Busy, InvalidInput, Lost, Refused
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, new_boot
from hexmesh.membership.reach import RELAY_ROLE
from hexmesh.membership.records import NodeRecord
from hexmesh.wire.circuits import REACH_MESSAGE
from hexmesh.wire.codec import Codec
from hexmesh.wire.facts import FACTS_MESSAGE, Facts, ProbeMessage
from hexmesh.wire.frames import Buffer
from hexmesh.wire.peering import PROTOCOL_VERSION, MemberAddress
from hexmesh.wire.trust import (
    TRUST_MESSAGE,
    Appointed,
    Renew,
    Renewed,
    RenewRefused,
    Revoked,
    TrustMessage,
)

progress = logging.getLogger("hexmesh.progress")

_READ: Codec[msgspec.Struct] = Codec(FACTS_MESSAGE | REACH_MESSAGE | TRUST_MESSAGE, name="peer")


class _NotForUs(msgspec.Struct, frozen=True):
    """A message about plans or requests."""


_NOT_FOR_US: Final = _NotForUs()


async def run_bootstrap(options: JoinOptions, on_up: Callable[[UpLine], None]) -> int:
    """Run until told to leave; the process's exit code. Raises HexmeshError when it cannot start."""
    async with become_bootstrap_member(options) as member:
        return await BootstrapNode(options, member).run(on_up)


class BootstrapNode:
    """Owner of everything that runs for one membership in one process."""

    def __init__(self, options: JoinOptions, member: BootstrapMember) -> None:
        self._options = options
        self._member = member
        self._rng = random.SystemRandom()
        self._boot = new_boot(self._rng)
        self._loop = asyncio.get_running_loop()
        self._leave_asked = asyncio.Event()
        self._forgets = False
        self._relay = Relay(is_connected=self._is_up, send=self._tell, rng=self._rng)
        self._cast_out: Refused | None = None
        self._trust = TrustDesk(member, self)
        self._roster = Roster(member.attestor, on_address=self._on_address, on_change=self._on_record)
        self._links = LinkMonitor(
            self,
            rng=self._rng,
            queued_bytes=lambda node: self._network.queued_bytes(NodeId(node), "probe"),
            on_change=lambda: self._publisher.touch(),
            stopwatch=time.perf_counter,
        )
        self._dht = MeshDht(
            DhtOptions(
                identity_path=member.state.dht_identity_file,
                listen_host=member.listener.getsockname()[0],
                port=options.dht_port,
                advertise=(member.address.host, options.dht_port) if options.advertise else None,
                initial_peers=tuple(member.membership.dht_initial_peers),
            ),
            member.attestor,
            on_record=self._roster.learn,
        )
        self._publisher = FactsPublisher(
            describe=self._describe,
            attestor=member.attestor,
            clock=RecordClock(options.state_dir / "records.json"),
            publish=self._publish,
        )

    @property
    def node_id(self) -> str:
        return self._member.node_id

    async def run(self, on_up: Callable[[UpLine], None]) -> int:
        """Serve until asked to leave."""
        async with AsyncExitStack() as stack:
            self._network = await stack.enter_async_context(self._make_network())
            stack.callback(self._relay.close)
            group = await stack.enter_async_context(ServiceGroup())
            stack.callback(group.stop)
            http = await stack.enter_async_context(self._make_http())
            self._announce_up(http, on_up, stack)
            self._start_services(group)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._ask_to_leave, False)
                stack.callback(self._loop.remove_signal_handler, number)
            await self._leave_asked.wait()
            await self._trust.close()
            if self._cast_out is None:
                await self._publisher.publish_now()
            await self._network.flush(1.0)
        if self._cast_out is not None:
            raise self._cast_out
        if self._forgets:
            await asyncio.to_thread(self._member.state.forget)
        progress.info("left the mesh for good" if self._forgets else "stopped; the same command rejoins")
        return 0

    def send(
        self, to: str, message: msgspec.Struct, payload: Payload = b"", *, channel: Channel = "data"
    ) -> bool:
        """Queue a message for another node."""
        try:
            self._network.send(NodeId(to), message, payload, channel)
        except (Busy, Lost):
            return False
        return True

    # --- what trust needs of the mesh ---

    def send_trust(self, node: NodeId, message: TrustMessage) -> None:
        """Not on the control channel, which forgets what could not be sent within a second."""
        self.send(node, message, channel="data")

    def nodes_up(self) -> list[NodeId]:
        return [peer.node_id for peer in self._network.peers() if peer.is_up]

    def member_addresses(self) -> list[MemberAddress]:
        return member_addresses(self._roster.directory)

    def identity_of(self, node: str) -> MemberIdentity | None:
        return self._roster.identity(node)

    def on_certificate_renewed(self) -> None:
        self._network.reload_certificate()
        self._publisher.touch()

    def on_nodes_removed(self, nodes: frozenset[NodeId]) -> None:
        for node in nodes:
            identity = self._roster.identity(node)
            self._network.forget(node)
            self._links.forget(node)
            self._roster.forget(node)
            if identity is not None:
                self._dht.forget_peer(identity.dht_peer_id)
        self.review_connections()

    def review_connections(self) -> None:
        self._network.review()

    def cast_out(self, reason: Refused) -> None:
        self._cast_out = reason
        self._leave_asked.set()

    # --- composition ---

    def _make_network(self) -> PeerNetwork:
        member = self._member
        local = LocalPeer(
            node_id=member.node_id,
            boot=self._boot,
            name=self._options.name,
            address=str(member.address),
            tls=member.state.tls_files(member.membership),
        )
        events = PeerEvents(
            on_message=self._on_message,
            on_peer_up=self._on_peer_up,
            on_peer_down=lambda peer, reason: self._links.disconnected(peer),
            on_path=lambda peer, is_relayed: self._links.path_changed(peer, is_relayed=is_relayed),
            on_reach=self._on_reach,
            admit=self._trust.admit,
            judge=self._trust.judge,
            on_proof=self._trust.removals.learn,
            relay=self._relay,
        )
        return PeerNetwork(local, member.listener, events, decode=_read)

    def _make_http(self) -> HttpSurface:
        options, member = self._options, self._member
        service = BootstrapService(
            node_id=member.node_id,
            name=options.name,
            membership=member.membership,
            directory=self._roster.directory,
            links=self._links,
            reach=self._network.reach,
            is_up=self._is_up,
            trust=self._trust,
            registry=relay_registry(self._relay),
            ask_to_leave=self._ask_to_leave,
        )
        http_options = HttpOptions(
            host=options.http_listen,
            port=options.http_port,
            api_keys=read_api_keys(options.api_key_file) if options.api_key_file is not None else (),
            admin_key=member.state.admin_key(),
            is_open=options.no_auth,
        )
        return HttpSurface(service, http_options, Telemetry())

    def _announce_up(self, http: HttpSurface, on_up: Callable[[UpLine], None], stack: AsyncExitStack) -> None:
        options, member = self._options, self._member
        write_run(options.state_dir, Run(os.getpid(), http.url))
        stack.callback(remove_run, options.state_dir, os.getpid())
        progress.info("relaying at %s", member.address, extra={"event": "up"})
        if member.address.is_loopback:
            progress.info("only this machine reaches this node; use --listen")
        on_up(
            up_line(
                node_id=member.node_id,
                name=options.name,
                http_url=http.url,
                address=member.address,
                admission=self._trust.admission,
            )
        )

    def _start_services(self, group: ServiceGroup) -> None:
        for known in self._member.membership.members:
            if known.node_id != self.node_id:
                address = parse_address(known.address)
                self._on_address(known.node_id, address.host, address.port)
                self._dht.add_peers(known.dht_maddrs)
        group.create_task(self._relay.run(), name="relay")
        group.create_task(self._publisher.run(), name="publish-facts")
        group.create_task(self._links.run(), name="measure-links")
        group.create_task(self._dht.run(), name="dht")
        group.create_task(self._tell_dht_address(), name="tell-dht")
        group.create_task(self._trust.run(), name="trust")
        group.create_task(self._keep_members(), name="keep-members")

    async def _keep_members(self) -> NoReturn:
        """Keep on disk whom to dial after a restart."""
        while True:
            await asyncio.sleep(KEEP_MEMBERS_S)
            await self._trust.credentials.remember(self.member_addresses())

    async def _tell_dht_address(self) -> None:
        """Others look for the mesh here: they should know where as soon as p2pd is up."""
        await self._dht.wait_up()
        self._publisher.touch()

    # --- what happens ---

    def _on_message(self, peer: NodeId, message: msgspec.Struct, payload: memoryview) -> None:
        match message:
            case Facts():
                self._roster.learn(message.record)
            case Appointed() | Renew() | Renewed() | RenewRefused() | Revoked():
                self._trust.receive(peer, message)
            case _NotForUs():
                pass
            case _:
                self._links.receive(peer, cast(ProbeMessage, message), payload)

    def _on_address(self, node: str, host: str, port: int) -> None:
        if node in self._trust.removals.revoked:
            return
        self._network.learn_address(NodeId(node), host, port)
        self._network.connect(NodeId(node))

    def _on_record(self, record: NodeRecord) -> None:
        if record.node != self.node_id:
            self._dht.add_peers(record.dht_maddrs)
            self._network.learn_reach(
                NodeId(record.node), is_relay=RELAY_ROLE in record.roles, is_dialable=record.dialable
            )

    def _on_peer_up(self, node: str) -> None:
        for signed in self._roster.directory.signed():
            self.send(node, Facts(record=signed), channel="control")
        self._trust.peer_up(NodeId(node))
        self._links.connected(node)

    def _on_reach(self) -> None:
        if not self._network.reach.is_dialable:
            progress.warning("members cannot dial this bootstrap node: it serves nobody until they can")
        self._publisher.touch()

    def _is_up(self, node: str) -> bool:
        return self._network.is_up(NodeId(node))

    def _tell(self, node: NodeId, message: msgspec.Struct) -> None:
        self._network.send(node, message)

    # --- what this node tells of itself ---

    def _describe(self, stamp: RecordStamp, now_unix_s: float) -> NodeRecord:
        options, member = self._options, self._member
        return NodeRecord(
            mesh_id=member.membership.mesh_id,
            node=member.node_id,
            boot=self._boot,
            sequence=stamp.sequence,
            made_at_unix_s=now_unix_s,
            name=options.name,
            site=options.site,
            peer_address=str(member.address),
            dht_maddrs=self._dht.maddrs,
            hexmesh_version=__version__,
            protocol_version=PROTOCOL_VERSION,
            model_id=member.membership.model.model_id,
            roles=(RELAY_ROLE,),
            links=self._links.links(),
            dialable=self._network.reach.is_dialable,
            availability="left" if self._leave_asked.is_set() else "active",
        )

    def _publish(self, signed: bytes) -> None:
        self._roster.learn(signed)
        self._dht.publish(signed)
        for peer in self._network.peers():
            if peer.is_up:
                self.send(peer.node_id, Facts(record=signed), channel="control")

    def _ask_to_leave(self, forget: bool) -> None:
        self._forgets = self._forgets or forget
        self._leave_asked.set()


def _read(header: Buffer) -> msgspec.Struct:
    """The message, if it is of those that a bootstrap node reads; members say much that is not for it."""
    try:
        return _READ.decode(header)
    except InvalidInput:
        return _NOT_FOR_US
