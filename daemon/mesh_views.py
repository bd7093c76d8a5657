"""What this node knows, as the read verbs show it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from daemon.epochs import HeldEpoch
from daemon.flight import Flight
from daemon.link_views import link_views
from daemon.mesh_state import MeshState, blocker_of
from daemon.models.weight_fetch import FetchProgress
from daemon.peering.links import LinkMonitor
from daemon.planning import PlannedModel
from daemon.reachability import is_relay, undialable_by
from daemon.trust.desk import TrustDesk
from daemon.views import (
    AvailabilityView,
    BottleneckView,
    DeviceView,
    FlowView,
    KvBlocksView,
    LinkView,
    MemberState,
    MemberView,
    NodeView,
    PlanDeviceView,
    PlanningView,
    PlanView,
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
from hexmesh.membership.records import NodeRecord
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.schedule.availability import WHY_BARRED
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import ReplicaStats

SUSPECT_S = 6.0
"""A node silent for longer counts as failed."""


@dataclass(slots=True, kw_only=True)
class MeshViews:
    """Makes the read verbs' answers of the node's state."""

    state: MeshState
    mesh_id: str
    model_name: str
    dtype: str | None
    planned: PlannedModel
    links: LinkMonitor
    trust: TrustDesk
    reach: OwnReach

    # --- the read verbs ---

    def status(self) -> StatusView:
        readiness = self.state.readiness()
        running, waiting, blocks = self._load()
        members = self.members()
        return StatusView(
            node=self.state.node_id,
            name=self.state.name,
            mesh=self.mesh_id,
            model=self.model_name,
            ready=readiness.ready,
            blocker=readiness.blocker,
            coordinator=self.state.coordination.machine.coordinator,
            plan_id=self._plan_id(),
            nodes_alive=sum(member.state == "alive" for member in members),
            requests_running=running,
            requests_waiting=waiting,
            kv_blocks=blocks,
            replicas=len(plan.replicas) if (plan := self.state.plan_now()) is not None else 0,
            replicas_whole=len(self.state.whole_replica_ids()),
            weights=_weights_view(fetch) if (fetch := self.state.weights.progress) is not None else None,
            certificate=self.trust.certificate(),
            dialable=self.reach.is_dialable,
            undialable_by=undialable_by(self.reach, self.state.directory),
        )

    def members(self) -> list[MemberView]:
        now_s = self.state.loop_time()
        seen = self.state.coordination.machine.members(now_s)
        views = []
        for record in self.state.directory.records():
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
                    availability=self._availability_of(record),
                    version=record.hexmesh_version,
                    age_s=max(0.0, now_s - heard_s) if heard_s is not None else None,
                    rtt_s=None if record.node == self.state.node_id else self.links.rtt_s(record.node),
                    certificate=self.trust.certificate_state(record.node),
                )
            )
        return views

    def link_views(self) -> list[LinkView]:
        return link_views(self.state.directory, self._links_in_use())

    def topology(self) -> TopologyView:
        plan, machine = self.state.plan_now(), self.state.coordination.machine
        held = self.state.epochs.committed
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
                self._node_view(record, members[record.node].state)
                for record in self.state.directory.records()
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
        plan, held = self.state.plan_now(), self.state.epochs.committed
        blocked = self.state.coordination.blocked
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
            blocker=blocker_of(blocked) if blocked is not None else None,
            explanation=list(plan.explanation) if plan is not None else [],
        )

    def planning(self) -> PlanningView:
        """What a plan could be made from now: nodes that answer and that no operator's word keeps out."""
        alive = {member.id for member in self.members() if member.state == "alive"}
        records = [
            record
            for record in self.state.directory.records()
            if record.node in alive and record.availability == "active"
        ]
        planned = self.planned
        return PlanningView(
            model_id=planned.model_id,
            model_name=planned.name,
            spec=planned.spec,
            dtype=planned.dtype,
            max_model_tokens=planned.max_model_tokens,
            workload=planned.workload,
            cluster=self.state.directory.cluster(record.node for record in records),
            hosts={record.node: record.boot for record in records if record.devices},
        )

    def requests(self) -> list[RequestView]:
        now_s = time.monotonic()
        held = self.state.epochs.committed
        epoch = held.epoch if held is not None else None
        return [_request_view(flight, now_s, epoch) for flight in self.state.gateway.flights()]

    # --- parts ---

    def _plan_id(self) -> str | None:
        held = self.state.epochs.committed
        return held.digest[:12] if held is not None else None

    def _plan_age_s(self, held: HeldEpoch | None) -> float | None:
        if held is None or held.committed_s is None:
            return None
        return self.state.loop_time() - held.committed_s

    def _load(self) -> tuple[int, int, KvBlocksView]:
        """(running, waiting, KV blocks) over the plan's replicas, as their drivers say."""
        plan = self.state.plan_now()
        running = waiting = free = used = cached = leased = 0
        for replica in plan.replicas if plan is not None else ():
            stats = self.state.stats_of(replica.id)
            if stats is None:
                free += replica.kv_blocks
                continue
            cached += stats.kv_blocks_cached
            leased += stats.kv_blocks_leased
            used += _used(stats)
            free += max(0, stats.kv_blocks_free - stats.kv_blocks_cached)
            running += stats.requests_running
            waiting += stats.requests_waiting
        return running, waiting, KvBlocksView(free=free, used=used, cached=cached, leased=leased)

    def _member_state(
        self, record: NodeRecord, member: CoordinationMember | None, now_s: float
    ) -> MemberState:
        if record.availability == "left":
            return "left"
        if record.node == self.state.node_id:
            return "alive" if self.state.starting is None else "joining"
        if is_relay(record):
            peer = self.state.peer_of(record.node)
            return "alive" if peer is not None and peer.is_up else "failed"
        if member is None or member.last_heard_s is None:
            return "joining" if record.sequence and not record.devices else "failed"
        if member.two_way:
            return "alive"
        return "suspect" if now_s - member.last_heard_s < SUSPECT_S else "failed"

    def _availability_of(self, record: NodeRecord) -> AvailabilityView:
        """The node's own word; a drain is under way while it holds stages."""
        if record.availability != "drained":
            return record.availability
        plans = [
            held.plan
            for held in (self.state.epochs.committed, self.state.epochs.draining)
            if held is not None
        ]
        return "draining" if any(plan.stages_of(record.node) for plan in plans) else "drained"

    def _roles(self, node: str) -> list[str]:
        plan = self.state.plan_now()
        record = self.state.directory.record(node)
        roles = list(record.roles) if record is not None else []
        roles += ["coordinator"] if node == self.state.coordination.machine.coordinator else []
        roles += ["issuer"] if self.trust.is_issuer(node) else []
        for replica, index in plan.stages_of(node) if plan is not None else ():
            roles.append(f"{replica.id} stage {index}")
        return roles

    def _links_in_use(self) -> set[tuple[str, str]]:
        plan = self.state.plan_now()
        used = set()
        for replica in plan.replicas if plan is not None else ():
            nodes = [stage.node for stage in replica.stages]
            used |= set(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
        return {(src, dst) for src, dst in used if src != dst}

    def _node_view(self, record: NodeRecord, state: MemberState) -> NodeView:
        used_bytes: dict[int, int] = {}
        plan = self.state.plan_now()
        for replica, index in plan.stages_of(record.node) if plan is not None else ():
            for device in replica.stages[index].devices:
                used_bytes[device] = used_bytes.get(device, 0) + replica.stages[index].needed_bytes
        return NodeView(
            id=record.node,
            name=record.name,
            site=record.site,
            state=state,
            availability=self._availability_of(record),
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
        plan, whole = self.state.plan_now(), self.state.whole_replica_ids()
        replicas = plan.replicas if plan is not None else ()
        return [self._replica_view(replica, is_whole=replica.id in whole) for replica in replicas]

    def _replica_view(self, replica: Replica, *, is_whole: bool) -> ReplicaView:
        stats = self.state.stats_of(replica.id)
        n_used = _used(stats) if stats is not None else None
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
        plan = self.state.plan_now()
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
        stats = self.state.stats_of(replica.id)
        return stats.stage_busy[index] if stats is not None and index < len(stats.stage_busy) else 0.0

    def _unused(self) -> list[UnusedView]:
        plan = self.state.plan_now()
        if plan is None:
            return []
        word = self.state.directory.availability(record.node for record in self.state.directory.records())
        said = {node: WHY_BARRED[one] for node, one in word.items() if one in WHY_BARRED}
        named = [
            UnusedView(node=one.node, device=one.device, reason=said.get(one.node, one.reason))
            for one in plan.unused
        ]
        members = self.state.coordination.machine.members(self.state.loop_time())
        outside = [
            UnusedView(
                node=record.node,
                device=facts.device.index,
                reason=said.get(record.node) or _why_outside(members.get(record.node)),
            )
            for record in self.state.directory.records()
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
            for record in self.state.directory.records()
            for facts in record.devices
            for replica_id, stage in [stages.get((record.node, facts.device.index), (None, None))]
        ]


def _weights_view(progress: FetchProgress) -> WeightsView:
    return WeightsView(
        fetched_bytes=progress.done_bytes,
        needed_bytes=progress.total_bytes,
        bytes_per_s=progress.bytes_per_s,
        left_s=progress.left_s,
        peers=list(progress.peers),
        trouble=progress.trouble,
    )


def _used(stats: ReplicaStats) -> int:
    """Blocks in the tables of sequences."""
    return max(0, stats.kv_blocks_total - stats.kv_blocks_free - stats.kv_blocks_leased)


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
