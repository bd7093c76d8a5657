"""What this node knows, as the read verbs show it."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass

import msgspec

from daemon.coordinator import CoordinationLoop
from daemon.epochs import Epochs, HeldEpoch
from daemon.gateway import Flight, Gateway, Route
from daemon.link_views import link_views
from daemon.models.node_weights import NodeWeights
from daemon.models.weight_fetch import FetchProgress
from daemon.peering.links import LinkMonitor
from daemon.peering.peer_events import PeerInfo
from daemon.reachability import find_apart, is_relay, undialable_by
from daemon.trust.desk import TrustDesk
from daemon.views import (
    AvailabilityView,
    Blocker,
    BottleneckView,
    DeviceView,
    FlowView,
    KvBlocksView,
    LinkView,
    MemberState,
    MemberView,
    NodeView,
    PlanDeviceView,
    PlanView,
    Readiness,
    ReplicaView,
    RequestState,
    RequestView,
    StageView,
    StatusView,
    TopologyView,
    UnusedView,
    WeightsView,
)
from hexmesh.membership.members import MemberView as CoordinationMember
from hexmesh.membership.reach import OwnReach
from hexmesh.membership.records import Directory, NodeRecord
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.schedule.availability import WHY_BARRED
from hexmesh.serving.router import broken_stages, choose_replica, whole_replicas
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import ReplicaStats
from hexmesh.wire.notice import PlanBlocked

SUSPECT_S = 6.0
"""A node silent for longer counts as failed."""


@dataclass(slots=True, kw_only=True)
class MeshState:
    """Everything that views are made of; each part has its own owner, this only reads them."""

    node_id: str
    name: str
    mesh_id: str
    model_name: str
    dtype: str | None
    directory: Directory
    coordination: CoordinationLoop
    epochs: Epochs
    gateway: Gateway
    links: LinkMonitor
    weights: NodeWeights
    trust: TrustDesk
    stats: dict[str, ReplicaStats]
    loop_time: Callable[[], float]
    rng: random.Random
    peer_of: Callable[[str], PeerInfo | None]
    """What connections tell of a node."""
    reach: OwnReach
    starting: str | None
    """What this node still does before it can take part; None once it does."""
    is_leaving: bool = False

    # --- routes and readiness ---

    def lost_nodes(self) -> frozenset[str]:
        """Hosts of the committed plan that do not answer us now."""
        plan = self.plan_now()
        members = self.coordination.machine.members(self.loop_time())
        if plan is None:
            return frozenset()
        return frozenset(node for node in plan.hosts if not _answers(members.get(node)))

    def route(self, avoid: Set[tuple[Epoch, str]] = frozenset()) -> Route | None:
        """Where a new request goes now, rather not to a replica to `avoid`; None when no replica is whole."""
        held = self.epochs.committed
        if held is None:
            return None
        replica = choose_replica(
            held.plan,
            n_requests=self._requests_by_replica(held),
            lost_nodes=self.lost_nodes(),
            avoid=self._broken(held) | {replica for epoch, replica in avoid if epoch == held.epoch},
            here=self.node_id,
            rng=self.rng,
        )
        if replica is None:
            return None
        nodes = frozenset(stage.node for stage in replica.stages)
        return Route(held.epoch, replica.id, replica.driver, nodes)

    def readiness(self) -> Readiness:
        """Whether a request entering here can be routed end to end now, else why not."""
        if self.is_leaving:
            return _not_ready("leaving", "this node is leaving the mesh", "use another peer")
        if self._whole_replicas():
            return Readiness(ready=True, blocker=None)
        blocked = self.coordination.blocked
        apart = self._apart() if self.starting is None else None
        if blocked is not None:
            return Readiness(ready=False, blocker=_joined(_blocker(blocked), apart))
        if apart is not None:
            return Readiness(ready=False, blocker=apart)
        if self.starting is not None:
            return _not_ready("starting", self.starting, "wait: hexmesh wait --ready")
        if self.weights.progress is not None:
            return self._fetching(self.weights.progress)
        return self._unplanned()

    def _whole_replicas(self) -> set[str]:
        """Replicas whose nodes all answer, and which their drivers run."""
        held = self.epochs.committed
        if held is None:
            return set()
        whole = {replica.id for replica in whole_replicas(held.plan, self.lost_nodes())}
        return whole - self._broken(held)

    def _broken(self, held: HeldEpoch) -> set[str]:
        """Replicas that run nothing any more, as their drivers say."""
        stats = (self._stats_of(replica.id) for replica in held.plan.replicas)
        return {one.replica for one in stats if one is not None and one.is_broken}

    def _requests_by_replica(self, held: HeldEpoch) -> dict[str, int]:
        """As the drivers say, or as entered here and is not counted there yet."""
        routes = (flight.route for flight in self.gateway.flights())
        counts = Counter(route.replica for route in routes if route is not None and route.epoch == held.epoch)
        for replica in held.plan.replicas:
            stats = self._stats_of(replica.id)
            if stats is not None:
                n_known = stats.requests_running + stats.requests_waiting
                counts[replica.id] = max(counts[replica.id], n_known)
        return counts

    def _fetching(self, progress: FetchProgress) -> Readiness:
        blocker = Blocker(
            code="fetching_weights",
            message=f"this node fetches its stage's weights: {progress.one_line()}",
            next_step="wait: hexmesh wait --ready",
            needed_bytes=progress.total_bytes,
            room_bytes=self.weights.room_bytes,
        )
        return Readiness(ready=False, blocker=blocker)

    def _apart(self) -> Blocker | None:
        """Members that run and are not connected, where this node knows of some."""
        members = self.coordination.machine.members(self.loop_time())
        alive = {node for node, member in members.items() if _answers(member)}
        return find_apart(self.directory, self.peer_of, own=self.node_id, alive=alive, now_unix_s=time.time())

    def _unplanned(self) -> Readiness:
        plan = self.plan_now()
        if plan is None:
            holder = self.coordination.machine.coordinator
            who = (
                f"{self.directory.name_of(holder)} coordinates"
                if holder is not None
                else "no coordinator yet"
            )
            return _not_ready(
                "no_plan", f"no plan is committed here yet; {who}", "wait: hexmesh wait --ready"
            )
        lost = {node for replica in plan.replicas for node in broken_stages(replica, self.lost_nodes())}
        names = ", ".join(sorted(self.directory.name_of(node) for node in lost)) or "a stage"
        return _not_ready(
            "stage_lost", f"{names} cannot be reached; the mesh plans again", "retry in a few seconds"
        )

    # --- names and records ---

    def plan_now(self) -> Plan | None:
        return self.epochs.committed.plan if self.epochs.committed is not None else None

    # --- the read verbs ---

    def status(self) -> StatusView:
        readiness = self.readiness()
        running, waiting, total, free = self._load()
        members = self.members()
        return StatusView(
            node=self.node_id,
            name=self.name,
            mesh=self.mesh_id,
            model=self.model_name,
            ready=readiness.ready,
            blocker=readiness.blocker,
            coordinator=self.coordination.machine.coordinator,
            plan_id=self._plan_id(),
            nodes_alive=sum(member.state == "alive" for member in members),
            requests_running=running,
            requests_waiting=waiting,
            kv_blocks=KvBlocksView(free=free, used=total - free, cached=0, leased=0),
            replicas=len(plan.replicas) if (plan := self.plan_now()) is not None else 0,
            replicas_whole=len(self._whole_replicas()),
            weights=_weights_view(self.weights.progress) if self.weights.progress is not None else None,
            certificate=self.trust.certificate(),
            dialable=self.reach.is_dialable,
            undialable_by=undialable_by(self.reach, self.directory),
        )

    def members(self) -> list[MemberView]:
        now_s = self.loop_time()
        seen = self.coordination.machine.members(now_s)
        views = []
        for record in self.directory.records():
            member = seen.get(record.node)
            heard_s = member.last_heard_s if member is not None else None
            views.append(
                MemberView(
                    id=record.node,
                    name=record.name,
                    address=record.peer_address,
                    site=record.site,
                    state=self._member_state(record, member, now_s),
                    roles=self._roles(record.node),
                    availability=self.availability_of(record),
                    version=record.hexmesh_version,
                    age_s=max(0.0, now_s - heard_s) if heard_s is not None else None,
                    rtt_s=None if record.node == self.node_id else self.links.rtt_s(record.node),
                    certificate=self.trust.certificate_state(record.node),
                )
            )
        return views

    def link_views(self) -> list[LinkView]:
        return link_views(self.directory, self._links_in_use())

    def topology(self) -> TopologyView:
        plan, machine = self.plan_now(), self.coordination.machine
        held = self.epochs.committed
        members = {member.id: member for member in self.members()}
        return TopologyView(
            mesh_id=self.mesh_id,
            model=self.model_name,
            plan_id=self._plan_id(),
            term=machine.term,
            epoch=held.epoch.n if held is not None else None,
            coordinator=machine.coordinator,
            plan_reason=plan.reason if plan is not None else None,
            plan_age_s=self._plan_age_s(held),
            nodes=[
                self._node_view(record, members[record.node].state) for record in self.directory.records()
            ],
            replicas=self._replica_views(),
            flows=[FlowView(src=flow.src, dst=flow.dst, share=flow.share) for flow in plan.flows]
            if plan
            else [],
            links=self.link_views(),
            bottleneck=self._bottleneck(),
            unused=self._unused(),
        )

    def plan(self) -> PlanView:
        plan, held = self.plan_now(), self.epochs.committed
        blocked = self.coordination.blocked
        replicas = plan.replicas if plan is not None else ()
        return PlanView(
            plan_id=self._plan_id(),
            epoch=held.epoch.n if held is not None else None,
            reason=plan.reason if plan is not None else None,
            model=self.model_name,
            dtype=plan.dtype if plan is not None else self.dtype,
            devices=self._plan_devices(plan),
            replicas=self._replica_views(),
            predicted_tokens_per_s=sum(one.predicted_tokens_per_s for one in replicas) if replicas else None,
            predicted_batch=sum(one.predicted_batch for one in replicas) if replicas else None,
            blocker=_blocker(blocked) if blocked is not None else None,
            explanation=list(plan.explanation) if plan is not None else [],
        )

    def requests(self) -> list[RequestView]:
        now_s = time.monotonic()
        held = self.epochs.committed
        epoch = held.epoch if held is not None else None
        return [_request_view(flight, now_s, epoch) for flight in self.gateway.flights()]

    # --- parts ---

    def _plan_id(self) -> str | None:
        held = self.epochs.committed
        return held.digest[:12] if held is not None else None

    def _plan_age_s(self, held: HeldEpoch | None) -> float | None:
        if held is None or held.committed_s is None:
            return None
        return self.loop_time() - held.committed_s

    def _load(self) -> tuple[int, int, int, int]:
        """(running, waiting, KV blocks, free KV blocks) over the plan's replicas, as their drivers say."""
        plan = self.plan_now()
        running = waiting = total = free = 0
        for replica in plan.replicas if plan is not None else ():
            stats = self._stats_of(replica.id)
            total += replica.kv_blocks
            free += stats.kv_blocks_free if stats is not None else replica.kv_blocks
            running += stats.requests_running if stats is not None else 0
            waiting += stats.requests_waiting if stats is not None else 0
        return running, waiting, total, min(free, total)

    def _stats_of(self, replica_id: str) -> ReplicaStats | None:
        """What the replica does: this moment if it is driven here, else as its driver said last."""
        held = self.epochs.committed
        driver = held.drivers.get(replica_id) if held is not None else None
        return driver.stats(time.monotonic()) if driver is not None else self.stats.get(replica_id)

    def _member_state(
        self, record: NodeRecord, member: CoordinationMember | None, now_s: float
    ) -> MemberState:
        if record.availability == "left":
            return "left"
        if record.node == self.node_id:
            return "alive" if self.starting is None else "joining"
        if is_relay(record):
            peer = self.peer_of(record.node)
            return "alive" if peer is not None and peer.is_up else "failed"
        if member is None or member.last_heard_s is None:
            return "joining" if record.sequence and not record.devices else "failed"
        if member.two_way:
            return "alive"
        return "suspect" if now_s - member.last_heard_s < SUSPECT_S else "failed"

    def availability_of(self, record: NodeRecord) -> AvailabilityView:
        """The node's own word; a drain is under way while it holds stages."""
        if record.availability != "drained":
            return record.availability
        plans = [held.plan for held in (self.epochs.committed, self.epochs.draining) if held is not None]
        return "draining" if any(plan.stages_of(record.node) for plan in plans) else "drained"

    def _roles(self, node: str) -> list[str]:
        plan = self.plan_now()
        record = self.directory.record(node)
        roles = list(record.roles) if record is not None else []
        roles += ["coordinator"] if node == self.coordination.machine.coordinator else []
        roles += ["issuer"] if self.trust.is_issuer(node) else []
        for replica, index in plan.stages_of(node) if plan is not None else ():
            roles.append(f"{replica.id} stage {index}")
        return roles

    def _links_in_use(self) -> set[tuple[str, str]]:
        plan = self.plan_now()
        used = set()
        for replica in plan.replicas if plan is not None else ():
            nodes = [stage.node for stage in replica.stages]
            used |= set(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
        return {(src, dst) for src, dst in used if src != dst}

    def _node_view(self, record: NodeRecord, state: MemberState) -> NodeView:
        used_bytes: dict[int, int] = {}
        plan = self.plan_now()
        for replica, index in plan.stages_of(record.node) if plan is not None else ():
            for device in replica.stages[index].devices:
                used_bytes[device] = used_bytes.get(device, 0) + replica.stages[index].needed_bytes
        return NodeView(
            id=record.node,
            name=record.name,
            site=record.site,
            state=state,
            availability=self.availability_of(record),
            capabilities=list(record.capabilities),
            devices=[
                DeviceView(
                    index=facts.device.index,
                    kind=facts.device.kind,
                    name=facts.device.name,
                    budget_bytes=facts.device.budget_bytes,
                    used_bytes=used_bytes.get(facts.device.index, 0),
                    flops_per_s=facts.device.flops_per_s,
                    bytes_per_s=facts.device.bytes_per_s,
                )
                for facts in record.devices
            ],
        )

    def _replica_views(self) -> list[ReplicaView]:
        plan, whole = self.plan_now(), self._whole_replicas()
        replicas = plan.replicas if plan is not None else ()
        return [self._replica_view(replica, is_whole=replica.id in whole) for replica in replicas]

    def _replica_view(self, replica: Replica, *, is_whole: bool) -> ReplicaView:
        stats = self._stats_of(replica.id)
        n_used = stats.kv_blocks_total - stats.kv_blocks_free if stats is not None else None
        return ReplicaView(
            id=replica.id,
            role=replica.role,
            stages=[_stage_view(stage, n_used) for stage in replica.stages],
            predicted_tokens_per_s=replica.predicted_tokens_per_s,
            predicted_batch=replica.predicted_batch,
            measured_tokens_per_s=stats.tokens_per_s if stats is not None else None,
            requests_running=stats.requests_running if stats is not None else None,
            is_whole=is_whole,
        )

    def _bottleneck(self) -> BottleneckView | None:
        """The busiest stage of all replicas if anything ran lately, else the one predicted to be slowest."""
        plan = self.plan_now()
        if plan is None:
            return None
        stages = [(replica, index) for replica in plan.replicas for index in range(len(replica.stages))]
        busy = {at: self._busy_share(*at) for at in stages}
        busiest = max(stages, key=busy.__getitem__)
        if busy[busiest] > 0:
            return _bottleneck_view(*busiest, busy[busiest])
        slowest = max(stages, key=lambda at: at[0].stages[at[1]].predicted_step_s)
        return _bottleneck_view(*slowest, None)

    def _busy_share(self, replica: Replica, index: int) -> float:
        stats = self._stats_of(replica.id)
        return stats.stage_busy[index] if stats is not None and index < len(stats.stage_busy) else 0.0

    def _unused(self) -> list[UnusedView]:
        plan = self.plan_now()
        if plan is None:
            return []
        word = self.directory.availability(record.node for record in self.directory.records())
        said = {node: WHY_BARRED[one] for node, one in word.items() if one in WHY_BARRED}
        named = [
            UnusedView(node=one.node, device=one.device, reason=said.get(one.node, one.reason))
            for one in plan.unused
        ]
        members = self.coordination.machine.members(self.loop_time())
        outside = [
            UnusedView(
                node=record.node,
                device=facts.device.index,
                reason=said.get(record.node) or _why_outside(members.get(record.node)),
            )
            for record in self.directory.records()
            if record.node not in plan.hosts
            for facts in record.devices
        ]
        return named + outside

    def _plan_devices(self, plan: Plan | None) -> list[PlanDeviceView]:
        stages = {
            (stage.node, device): (replica.id, stage)
            for replica in (plan.replicas if plan is not None else ())
            for stage in replica.stages
            for device in stage.devices
        }
        reasons = {(one.node, one.device): one.reason for one in self._unused()}
        return [
            PlanDeviceView(
                node=record.node,
                name=record.name,
                device=facts.device.index,
                layers=(stage.start, stage.stop) if stage is not None else None,
                needed_bytes=stage.needed_bytes if stage is not None else 0,
                room_bytes=facts.device.budget_bytes,
                reason=reasons.get((record.node, facts.device.index), ""),
                replica=replica_id,
            )
            for record in self.directory.records()
            for facts in record.devices
            for replica_id, stage in [stages.get((record.node, facts.device.index), (None, None))]
        ]


def _answers(member: CoordinationMember | None) -> bool:
    return member is not None and (member.two_way or member.state == "self")


def _not_ready(code: str, message: str, next_step: str) -> Readiness:
    return Readiness(ready=False, blocker=Blocker(code=code, message=message, next_step=next_step))


def _weights_view(progress: FetchProgress) -> WeightsView:
    return WeightsView(
        fetched_bytes=progress.done_bytes,
        needed_bytes=progress.total_bytes,
        bytes_per_s=progress.bytes_per_s,
        left_s=progress.left_s,
        peers=list(progress.peers),
        trouble=progress.trouble,
    )


def _blocker(blocked: PlanBlocked) -> Blocker:
    return Blocker(
        code=blocked.code or "blocked",
        message=blocked.message,
        next_step=blocked.next_step,
        needed_bytes=blocked.needed_bytes,
        room_bytes=blocked.room_bytes,
    )


def _joined(blocker: Blocker, apart: Blocker | None) -> Blocker:
    """What is missing for a plan; where members that run are not connected, that is to be mended first."""
    if apart is None:
        return blocker
    message = f"{blocker.message}; {apart.message}"
    return msgspec.structs.replace(blocker, code=apart.code, message=message, next_step=apart.next_step)


def _stage_view(stage: Stage, n_used: int | None) -> StageView:
    return StageView(
        node=stage.node,
        devices=list(stage.devices),
        layers=(stage.start, stage.stop),
        tp=len(stage.devices),
        kv_blocks=stage.kv_blocks,
        kv_blocks_free=stage.kv_blocks - n_used if n_used is not None else None,
    )


def _bottleneck_view(replica: Replica, index: int, utilisation: float | None) -> BottleneckView:
    stage = replica.stages[index]
    return BottleneckView(kind="stage", id=f"{replica.id}/{index}@{stage.node}", utilisation=utilisation)


def _request_state(flight: Flight, present: Epoch | None) -> RequestState:
    if flight.route is not None and flight.route.epoch != present:
        return "draining"
    if flight.attempt > 1 and not flight.has_token:
        return "replaying"
    return "running" if flight.emitted else "waiting"


def _request_view(flight: Flight, now_s: float, present: Epoch | None) -> RequestView:
    return RequestView(
        id=flight.request.request_id,
        state=_request_state(flight, present),
        replica=flight.route.replica if flight.route is not None else None,
        stage=None,
        role="mixed",
        prompt_tokens=len(flight.request.prompt),
        output_tokens=len(flight.emitted),
        age_s=now_s - flight.started_s,
        attempts=flight.attempt,
        kv_handoff=None,
    )


def _why_outside(member: CoordinationMember | None) -> str:
    """Only the coordinator knows more."""
    why = member.why_excluded if member is not None else None
    return why or "its node is not in the present plan"
