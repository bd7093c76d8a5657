"""The composition root: one running node of a mesh, from its options to its last breath. Read this file first.

    options -> membership (found, join or rejoin) -> Node

A Node is one task group. In it run the peer network, the workers (one process a device), the coordination loop, the
epochs' drivers, link probes, the DHT and the HTTP surface. Parts do not know each other: they get callbacks here, and
messages reach them through `Dispatcher`. What they decide is in `hexmesh/`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import NoReturn

import msgspec

from daemon.announcing import up_line
from daemon.calibrator import Calibrator
from daemon.compute.devices import MeasurementCache
from daemon.compute.host_devices import HostDevices
from daemon.compute.workers import Workshop
from daemon.config import JoinOptions
from daemon.coordinator import CoordinationLoop
from daemon.courier import Channel, Payload
from daemon.discovery.dht import DhtOptions, MeshDht
from daemon.discovery.facts import FactsPublisher, RecordClock, RecordStamp
from daemon.discovery.roster import Roster
from daemon.dispatch import PEER_MESSAGES, Dispatcher
from daemon.epochs import Epochs
from daemon.gateway import Gateway
from daemon.leaving import drain
from daemon.mesh_state import HeardStats, MeshState
from daemon.mesh_views import MeshViews
from daemon.models.node_weights import NodeWeights
from daemon.models.weight_cache import cache_of
from daemon.models.weight_peers import weight_peers
from daemon.orders import NodeOrders
from daemon.peering.address import bound_address, parse_address
from daemon.peering.greeting import LocalPeer
from daemon.peering.links import LinkMonitor
from daemon.peering.peers import PeerEvents, PeerNetwork
from daemon.pipeline import StepTrace
from daemon.planning import MeshPlanner, PlannedModel
from daemon.reporting import Reporter
from daemon.runfile import Run, remove_run, write_run
from daemon.service_group import ServiceGroup
from daemon.stages import ModelFiles, StageHost
from daemon.trust.cached_peers import KEEP_MEMBERS_S, member_addresses
from daemon.trust.desk import TrustDesk
from daemon.trust.founding import Member, become_member
from daemon.trust.ports import Ports, port_to_bind
from daemon.upkeep import Upkeep
from daemon.views import UpLine
from daemon.web.access import HttpOptions, read_api_keys
from daemon.web.http import HttpSurface
from daemon.web.mesh_service import NodeService
from daemon.web.service import ServedModel
from daemon.web.telemetry import Telemetry
from hexmesh import __version__
from hexmesh.errors import Busy, Lost, NotReady, Refused
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, new_boot
from hexmesh.membership.coordination import Coordination
from hexmesh.membership.reach import RELAY_ROLE
from hexmesh.membership.records import DeviceFacts, NodeRecord
from hexmesh.membership.timers import Timers
from hexmesh.plan import DtypeName
from hexmesh.serving.batcher import BatchLimits
from hexmesh.serving.turns import Turns
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import Step, StepResult
from hexmesh.wire.facts import Facts
from hexmesh.wire.peering import PROTOCOL_VERSION, MemberAddress
from hexmesh.wire.trust import TrustMessage
from hexmesh.workload import Workload

log = logging.getLogger("hexmesh.node")
progress = logging.getLogger("hexmesh.progress")

STEPS_PAUSE_S = 0.5
"""Without a step of a request for so long, sending weights may take the whole link."""


async def run_node(options: JoinOptions, on_up: Callable[[UpLine], None]) -> int:
    """Run a node until it is told to leave; the process's exit code. Raises HexmeshError when it cannot start."""
    async with become_member(options) as member:
        return await Node(options, member).run(on_up)


class Node:
    """Owner of everything that runs for one membership in one process."""

    def __init__(self, options: JoinOptions, member: Member) -> None:
        self._options = options
        self._member = member
        self._rng = random.SystemRandom()
        self._boot = new_boot(self._rng)
        self._loop = asyncio.get_running_loop()
        self._leave_asked = asyncio.Event()
        self._forgets = False
        self._cast_out: Refused | None = None
        self._facts: tuple[DeviceFacts, ...] = ()
        self._a_peer_is_up = asyncio.Event()
        self._ports = member.state.ports()

    async def run(self, on_up: Callable[[UpLine], None]) -> int:
        """Serve until asked to leave, then leave."""
        async with AsyncExitStack() as stack:
            workshop = await stack.enter_async_context(Workshop())
            self._network = await stack.enter_async_context(self._make_network())
            group = await stack.enter_async_context(ServiceGroup())
            stack.callback(group.stop)
            self._compose_knowledge(group)
            self._compose_weights()
            self._compose_serving(group, workshop)
            stack.callback(self._devices.close)
            http = await stack.enter_async_context(self._make_http())
            self._announce_up(http, on_up, stack)
            self._start_services(group)
            with self._signals_ask_to_leave():
                await self._leave_asked.wait()
                if self._cast_out is None:
                    await drain(self._state, self._upkeep)
            self._gateway.end_all(
                NotReady(
                    "this node left before the answer was complete",
                    code="left",
                    next_step="send the request again to another peer",
                )
            )
            await self._trust.close()
            self._epochs.close("this node is leaving")
            await self._network.flush(1.0)
        if self._cast_out is not None:
            raise self._cast_out
        if self._forgets:
            await asyncio.to_thread(self._member.state.forget)
        progress.info("left the mesh for good" if self._forgets else "stopped; the same command rejoins")
        return 0

    # --- what a courier does ---

    @property
    def node_id(self) -> str:
        return self._member.node_id

    def send(
        self, to: str, message: msgspec.Struct, payload: Payload = b"", *, channel: Channel = "data"
    ) -> bool:
        """Queue a message for any node, this one included."""
        if channel == "data":
            self._links.data_flowed()
        if to == self.node_id:
            if isinstance(message, Step | StepResult):  # a turn of the loop would only cost time
                self._dispatcher.on_message(to, message, payload)
            else:
                self._loop.call_soon(self._dispatcher.on_message, to, message, payload)
            return True
        try:
            self._network.send(NodeId(to), message, payload, channel)
        except (Busy, Lost) as error:
            log.debug("not sent to=%s reason=%s", to, error.message)
            return False
        return True

    # --- what trust needs to know of the mesh, and what follows from its verdicts ---

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
            self._coordination.peer_forgotten(node)
            self._on_channel_lost(node, "data", "it was removed from the mesh")
            self._reporter.node_lost(node, "it was removed from the mesh")
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
        self._trust = TrustDesk(member, self)
        events = PeerEvents(
            on_message=lambda peer, message, payload: self._dispatcher.on_message(peer, message, payload),
            on_peer_up=self._on_peer_up,
            on_peer_down=self._on_peer_down,
            on_refused=self._on_peer_gone,
            on_channel_lost=self._on_channel_lost,
            on_path=lambda peer, is_relayed: self._links.path_changed(peer, is_relayed=is_relayed),
            on_reach=self._on_reach,
            on_bulk=lambda sock: self._weights.server.serve(sock),
            admit=self._trust.admit,
            judge=self._trust.judge,
            on_proof=self._trust.removals.learn,
        )
        return PeerNetwork(local, member.listener, events, decode=PEER_MESSAGES.decode)

    def _compose_knowledge(self, group: ServiceGroup) -> None:
        """Who is there and what they have: records, links, DHT, and the plan made of them."""
        member, options = self._member, self._options
        self._roster = Roster(member.attestor, on_address=self._on_address, on_change=self._on_record)
        self._links = LinkMonitor(
            self,
            rng=self._rng,
            queued_bytes=lambda node: self._network.queued_bytes(NodeId(node), "probe"),
            on_change=lambda: self._publisher.touch(),
            stopwatch=time.perf_counter,  # uvloop's own clock ticks in whole milliseconds
        )
        self._dht = MeshDht(
            DhtOptions(
                identity_path=member.state.dht_identity_file,
                listen_host=member.listen_host,
                port=port_to_bind(member.listen_host, options.dht_port, self._ports.dht, flag="--dht-port"),
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
        model = member.model
        self._planned = PlannedModel(
            model_id=model.id,
            name=model.name,
            spec=model.spec,
            dtype=self._dtype(),
            max_model_tokens=model.spec.max_position_tokens,
            workload=Workload(),
        )
        self._planner = MeshPlanner(self._planned, self._roster.directory)
        self._telemetry = Telemetry(model_name=model.name, alias_vllm=options.metrics_alias == "vllm")
        self._coordination = CoordinationLoop(
            machine=Coordination(
                member.node_id,
                self._boot,
                rank=0,
                timers=Timers(),
                sign=member.attestor.sign,
                verify=self._roster.has_signed,
                highest_term_seen=member.state.highest_term(),
                rng=self._rng,
                now_s=self._loop.time(),
                min_nodes=options.min_nodes,
                takes_part=False,
            ),
            courier=self,
            group=group,
            planner=self._planner,
            save_term=member.state.save_highest_term,
            on_change=self._on_coordination_change,
            on_replan=self._on_committed,
        )

    def _compose_weights(self) -> None:
        """What has the model's files: reads them, fetches them from peers, and gives them to peers."""
        self._weights = NodeWeights(
            self._member.model.held,
            cache_of(self._options.state_dir, self._options.weights_cache_bytes),
            peers=lambda: weight_peers(self._roster.directory.records(), self.node_id),
            dial=self._network.open_bulk,
            is_busy=lambda: time.monotonic() - self._stages.last_step_s < STEPS_PAUSE_S,
            on_progress=lambda n_bytes: self._coordination.fetched(n_bytes),
        )

    def _compose_serving(self, group: ServiceGroup, workshop: Workshop) -> None:
        """What runs requests: workers, stages, drivers and the gateway."""
        member = self._member
        self._devices = HostDevices(
            member.devices,
            workshop=workshop,
            group=group,
            cpu_affinity=self._options.cpu_affinity,
            on_worker_died=lambda worker, reason: self._stages.worker_died(worker, reason),
            on_stage_failed=lambda stage, reason: self._stages.stage_failed(stage, reason),
        )
        self._calibrator = Calibrator(
            member.model.spec,
            self._dtype(),
            group=group,
            links=self._roster.directory.measured_links,
            on_news=lambda: self._publisher.touch(),
        )
        self._stages = StageHost(
            courier=self,
            group=group,
            files=ModelFiles(folder=str(member.model.files.folder), model_id=member.model.id),
            weights=self._weights,
            budgets=self._devices.budgets(),
            worker_of=self._devices.worker,
            admit=self._coordination.admit,
            on_broken=self._coordination.broken,
            is_heard=self._coordination.hears,
            on_timed=self._calibrator.timed,
        )
        self._epochs = Epochs(
            courier=self,
            group=group,
            stages=self._stages,
            limits=BatchLimits(),
            vocab_size=member.model.spec.vocab_size,
            on_loaded=self._coordination.loaded,
            on_load_failed=self._on_load_failed,
            on_drained=self._coordination.drained,
            on_broken=self._coordination.broken,
            on_step=self._on_step,
            is_heard=self._coordination.hears,
        )
        self._coordination.attach(self._epochs)
        self._gateway = Gateway(
            courier=self,
            router=lambda: self._state,
            on_recovered=lambda: self._telemetry.count_recovery("replay"),
            is_heard=self._coordination.hears,
        )
        stats: dict[str, HeardStats] = {}
        self._state = MeshState(
            node_id=member.node_id,
            name=self._options.name,
            directory=self._roster.directory,
            coordination=self._coordination,
            epochs=self._epochs,
            gateway=self._gateway,
            weights=self._weights,
            stats=stats,
            loop_time=self._loop.time,
            rng=self._rng,
            turns=Turns(self._rng),
            peer_of=lambda node: self._network.peer(NodeId(node)),
            starting="this node starts its workers and measures its devices",
        )
        self._views = MeshViews(
            state=self._state,
            mesh_id=member.membership.mesh_id,
            model_name=member.model.name,
            dtype=member.membership.dtype,
            planned=self._planned,
            links=self._links,
            trust=self._trust,
            reach=self._network.reach,
        )
        self._upkeep = Upkeep(
            kept=member.state.availability(),
            keep=member.state.save_availability,
            publish=self._publisher.publish_now,
            state=self._state,
            planner=self._planner,
        )
        self._orders = NodeOrders(
            courier=self, group=group, directory=self._roster.directory, upkeep=self._upkeep
        )
        self._dispatcher = Dispatcher(
            courier=self,
            coordination=self._coordination,
            epochs=self._epochs,
            stages=self._stages,
            gateway=self._gateway,
            links=self._links,
            roster=self._roster,
            orders=self._orders,
            trust=self._trust,
            stats=stats,
        )
        self._reporter = Reporter(
            courier=self,
            state=self._state,
            views=self._views,
            telemetry=self._telemetry,
            dispatcher=self._dispatcher,
        )

    def _make_http(self) -> HttpSurface:
        options, model = self._options, self._member.model
        service = NodeService(
            model=ServedModel(
                name=model.name,
                root=model.files.root,
                folder=str(model.files.folder),
                created_s=int(time.time()),
                max_model_tokens=model.spec.max_position_tokens,
                vocab_size=model.spec.vocab_size,
                eos_token_ids=model.spec.eos_token_ids,
            ),
            state=self._state,
            views=self._views,
            weights=self._weights,
            gateway=self._gateway,
            trust=self._trust,
            orders=self._orders,
            registry=self._telemetry.registry,
            ask_to_leave=self._ask_to_leave,
        )
        http_options = HttpOptions(
            host=options.http_listen,
            port=port_to_bind(options.http_listen, options.http_port, self._ports.http, flag="--http-port"),
            api_keys=read_api_keys(options.api_key_file) if options.api_key_file is not None else (),
            admin_key=self._member.state.admin_key(),
            is_open=options.no_auth,
        )
        return HttpSurface(service, http_options, self._telemetry)

    # --- starting ---

    def _announce_up(self, http: HttpSurface, on_up: Callable[[UpLine], None], stack: AsyncExitStack) -> None:
        options, member = self._options, self._member
        write_run(options.state_dir, Run(os.getpid(), http.url))
        stack.callback(remove_run, options.state_dir, os.getpid())
        self._remember_ports(http.port)
        progress.info("serving HTTP at %s", http.url, extra={"event": "up"})
        if member.address.is_loopback:
            progress.info("only this machine can join; use --listen")
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
        group.create_task(self._publisher.run(), name="publish-facts")
        group.create_task(self._links.run(), name="measure-links")
        group.create_task(self._dht.run(), name="dht")
        group.create_task(self._trust.run(), name="trust")
        group.create_task(self._reporter.run(), name="report")
        group.create_task(self._stages.watch.run(), name="watch-steps")
        group.create_task(self._keep_members(), name="keep-members")
        group.create_task(self._weights.run(), name="look-up-room")
        group.create_task(self._coordination.run(), name="coordinate")
        group.create_task(self._take_part(), name="take-part")

    def _remember_ports(self, http_port: int) -> None:
        ports = Ports(
            peer=bound_address(self._member.listener).port,
            http=http_port,
            dht=self._dht.port or self._ports.dht,
        )
        if ports != self._ports:
            self._ports = ports
            self._member.state.save_ports(ports)

    async def _keep_members(self) -> NoReturn:
        """Keep on disk whom to dial after a restart, and where this node can be dialled."""
        while True:
            await asyncio.sleep(KEEP_MEMBERS_S)
            await asyncio.to_thread(self._remember_ports, self._ports.http)
            await self._trust.credentials.remember(self.member_addresses())

    async def _take_part(self) -> None:
        """Measure, tell, then take part: a node that plans cannot use takes no leases."""
        started_s = time.monotonic()
        await self._devices.start()
        progress.info("workers are up after %.1f s; measuring devices", time.monotonic() - started_s)
        cache = MeasurementCache(self._options.state_dir / "devices.json")
        self._facts = await self._devices.measure(self._dtype(), cache)
        self._calibrator.measured(self._facts)
        self._links.measure_anew()
        await self._publisher.publish_now()
        await self._reach_a_known_peer()
        self._state.starting = None
        gc.freeze()  # collecting what is here for good, modules mostly, would stop every stream for 50 ms now and then
        progress.info("devices measured after %.1f s; taking part", time.monotonic() - started_s)
        self._coordination.take_part()

    async def _reach_a_known_peer(self) -> None:
        """A node that comes back to others waits for one of them, however long: it never founds a mesh of its own."""
        known = [peer.name for peer in self._member.membership.members if peer.node_id != self.node_id]
        if not known or not self._member.is_rejoined:
            return
        self._state.starting = (
            f"none of the mesh's other nodes answers yet ({', '.join(sorted(known))}); start one of them, or give "
            "the membership up with hexmesh leave --forget"
        )
        if not self._a_peer_is_up.is_set():
            progress.warning("waiting: %s", self._state.starting)
        await self._a_peer_is_up.wait()

    # --- what happens to peers ---

    def _on_address(self, node: str, host: str, port: int) -> None:
        if node in self._trust.removals.revoked:
            return
        self._network.learn_address(NodeId(node), host, port)
        self._network.connect(NodeId(node))
        self._coordination.peer_reachable(node)

    def _on_record(self, record: NodeRecord) -> None:
        if record.node != self.node_id:
            self._dht.add_peers(record.dht_maddrs)
            self._network.learn_reach(
                NodeId(record.node), is_relay=RELAY_ROLE in record.roles, is_dialable=record.dialable
            )
        self._planner.facts_changed()
        self._coordination.facts_changed()

    def _on_peer_up(self, node: str) -> None:
        for signed in self._roster.directory.signed():
            self.send(node, Facts(record=signed), channel="control")
        self._trust.peer_up(NodeId(node))
        self._links.connected(node)
        self._a_peer_is_up.set()

    def _on_peer_down(self, node: str, reason: str) -> None:
        self._links.disconnected(node)

    def _on_peer_gone(self, node: str) -> None:
        self._coordination.connection_refused(node)
        self._reporter.node_lost(node, "its process is gone")

    def _on_reach(self) -> None:
        self._dht.serve(is_dialable=self._network.reach.is_dialable)
        self._publisher.touch()

    def _on_channel_lost(self, node: str, channel: Channel, reason: str) -> None:
        if channel == "data":
            for driver in list(self._epochs.drivers()):
                driver.link_reset(node)
            self._stages.link_lost(node)
            self._gateway.link_lost(node, f"the connection to its driver was cut: {reason}")

    # --- what happens to plans ---

    def _on_coordination_change(self) -> None:
        self._gateway.routes_changed()

    def _on_load_failed(self, epoch: Epoch, reason: str) -> None:
        self._coordination.load_failed(epoch, reason)
        self._publisher.touch()  # what this node can hold may be less than it said

    def _on_committed(self, reason: str) -> None:
        self._reporter.plan_committed(reason)

    def _on_step(self, trace: StepTrace) -> None:
        self._telemetry.observe_step(
            trace.replica.id, trace.round_trip_s, trace.stage_seconds, trace.transit_s
        )
        self._calibrator.travelled(trace)

    # --- what this node tells of itself ---

    def _dtype(self) -> DtypeName:
        dtype: DtypeName = msgspec.convert(self._member.membership.dtype, DtypeName)
        return dtype

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
            dht_maddrs=self._dht.maddrs if self._network.reach.is_dialable else (),
            hexmesh_version=__version__,
            protocol_version=PROTOCOL_VERSION,
            model_id=member.model.id,
            capabilities=("pipeline",),
            devices=self._calibrator.corrected(self._weights.bound_devices(self._facts)),
            has_all_weights=self._weights.is_whole,
            links=self._links.links(),
            way_s=self._calibrator.way_s,
            availability=self._upkeep.availability,
            dialable=self._network.reach.is_dialable,
        )

    def _publish(self, signed: bytes) -> None:
        self._roster.learn(signed)
        self._dht.publish(signed)
        for peer in self._network.peers():
            if peer.is_up:
                self.send(peer.node_id, Facts(record=signed), channel="control")

    # --- leaving ---

    def _ask_to_leave(self, forget: bool) -> None:
        self._forgets = self._forgets or forget
        self._leave_asked.set()

    @contextmanager
    def _signals_ask_to_leave(self) -> Iterator[None]:
        """SIGTERM and SIGINT leave cleanly; a second one ends the process at once, workers and all."""

        def on_signal(number: int) -> None:
            if self._leave_asked.is_set():
                os._exit(128 + number)
            self._ask_to_leave(False)

        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, on_signal, number)
        try:
            yield
        finally:
            self._loop.remove_signal_handler(signal.SIGTERM)
            self._loop.remove_signal_handler(signal.SIGINT)
