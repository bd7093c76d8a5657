"""What this node knows of the mesh, put together for those who act on it: routes, and whether requests can enter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import msgspec

from daemon.coordinator import CoordinationLoop
from daemon.epochs import Epochs, HeldEpoch
from daemon.flight import Flight, Route
from daemon.gateway import Gateway
from daemon.models.node_weights import NodeWeights
from daemon.models.weight_fetch import FetchProgress
from daemon.peering.peer_events import PeerInfo
from daemon.reachability import find_apart
from daemon.views import Blocker, Readiness
from hexmesh.errors import Busy, NotReady
from hexmesh.membership.members import MemberView as CoordinationMember
from hexmesh.membership.records import Directory
from hexmesh.plan import Plan
from hexmesh.serving.router import (
    NOTHING_SENT,
    ReplicaLoad,
    Sent,
    broken_stages,
    choose_pair,
    load_of,
    retry_after_s,
    whole_replicas,
)
from hexmesh.serving.turns import Turns
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import ReplicaStats
from hexmesh.wire.notice import PlanBlocked

OWN_STATS_S = 0.05
"""Figures of a driver here are not made anew more often than that: many requests may ask for them at once."""


@dataclass(frozen=True, slots=True)
class HeardStats:
    """A driver's last word of its replica, and when it came, on the monotonic clock."""

    stats: ReplicaStats
    heard_s: float


@dataclass(slots=True, kw_only=True)
class MeshState:
    """The parts that know something; each has its own owner, this only reads them."""

    node_id: str
    name: str
    directory: Directory
    coordination: CoordinationLoop
    epochs: Epochs
    gateway: Gateway
    weights: NodeWeights
    stats: dict[str, HeardStats]
    loop_time: Callable[[], float]
    rng: random.Random
    turns: Turns
    peer_of: Callable[[str], PeerInfo | None]
    """What connections tell of a node."""
    starting: str | None
    """What this node still does before it can take part; None once it does."""
    is_leaving: bool = False

    def plan_now(self) -> Plan | None:
        return self.epochs.committed.plan if self.epochs.committed is not None else None

    def stats_of(self, replica_id: str) -> ReplicaStats | None:
        """What the replica does: just now if it is driven here, else as its driver said last."""
        heard = self._heard_stats(replica_id)
        return heard.stats if heard is not None else None

    def _heard_stats(self, replica_id: str) -> HeardStats | None:
        held = self.epochs.committed
        driver = held.drivers.get(replica_id) if held is not None else None
        heard = self.stats.get(replica_id)
        if driver is None:
            return heard
        now_s = time.monotonic()
        is_broken = driver.broken is not None
        if heard is None or now_s - heard.heard_s >= OWN_STATS_S or heard.stats.is_broken != is_broken:
            heard = self.stats[replica_id] = HeardStats(driver.stats(now_s), now_s)
        return heard

    def lost_nodes(self) -> frozenset[str]:
        """Hosts of the committed plan that do not answer us now."""
        plan = self.plan_now()
        members = self.coordination.machine.members(self.loop_time())
        if plan is None:
            return frozenset()
        return frozenset(node for node in plan.hosts if not _answers(members.get(node)))

    def route(self, n_tokens: int, avoid: Set[tuple[Epoch, str]], *, may_wait: bool) -> Route | None:
        """As `daemon.gateway.Router` says."""
        held = self.epochs.committed
        if held is None:
            return None
        pair = choose_pair(
            held.plan,
            turns=self.turns,
            loads=self._loads(held),
            n_tokens=n_tokens,
            lost_nodes=self.lost_nodes(),
            avoid=self._broken(held) | {replica for epoch, replica in avoid if epoch == held.epoch},
            here=self.node_id,
            rng=self.rng,
            may_wait=may_wait,
        )
        if pair is None:
            return None
        replica = pair.entry
        nodes = frozenset(stage.node for stage in replica.stages)
        return Route(held.epoch, replica.id, replica.driver, nodes)

    def refusal(self) -> NotReady:
        """Why a request cannot be routed now: the blocker, or that all that could take it is full."""
        held, readiness = self.epochs.committed, self.readiness()
        if held is None or not readiness.ready:
            return blocker_error(readiness)
        loads = self._loads(held)
        full = [loads[replica] for replica in self.whole_replica_ids()]
        n_waiting = sum(load.n_waiting for load in full)
        return Busy(
            f"every replica is full: {n_waiting} requests wait already",
            code="queue_full",
            next_step="try again after Retry-After",
            retry_after_s=retry_after_s(full),
        )

    def readiness(self) -> Readiness:
        """Whether a request entering here can be routed end to end now, else why not."""
        if self.is_leaving:
            return _not_ready("leaving", "this node is leaving the mesh", "use another peer")
        if self.whole_replica_ids():
            return Readiness(ready=True, blocker=None)
        blocked = self.coordination.blocked
        apart = self._apart() if self.starting is None else None
        if blocked is not None:
            return Readiness(ready=False, blocker=_joined(blocker_of(blocked), apart))
        if apart is not None:
            return Readiness(ready=False, blocker=apart)
        if self.starting is not None:
            return _not_ready("starting", self.starting, "wait: hexmesh wait --ready")
        if self.weights.progress is not None:
            return self._fetching(self.weights.progress)
        return self._unplanned()

    def whole_replica_ids(self) -> set[str]:
        """Replicas whose nodes all answer, and which their drivers run."""
        held = self.epochs.committed
        if held is None:
            return set()
        whole = {replica.id for replica in whole_replicas(held.plan, self.lost_nodes())}
        return whole - self._broken(held)

    def _broken(self, held: HeldEpoch) -> set[str]:
        """Replicas that run nothing any more, as their drivers say."""
        stats = (self.stats_of(replica.id) for replica in held.plan.replicas)
        return {one.replica for one in stats if one is not None and one.is_broken}

    def _loads(self, held: HeldEpoch) -> dict[str, ReplicaLoad]:
        """Of every replica: as its driver says, and as entered here and is not counted there yet."""
        now_s = time.monotonic()
        heard = {replica.id: self._heard_stats(replica.id) for replica in held.plan.replicas}
        sent = sent_by(self.gateway, held.epoch, heard)
        return {
            replica.id: load_of(
                None if (word := heard[replica.id]) is None else word.stats,
                0.0 if word is None else now_s - word.heard_s,
                replica.block_tokens,
                sent.get(replica.id, NOTHING_SENT),
            )
            for replica in held.plan.replicas
        }

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
            who = "no coordinator yet"
            if holder is not None:
                who = f"{self.directory.name_of(holder)} coordinates"
            return _not_ready(
                "no_plan", f"no plan is committed here yet; {who}", "wait: hexmesh wait --ready"
            )
        lost = {node for replica in plan.replicas for node in broken_stages(replica, self.lost_nodes())}
        names = ", ".join(sorted(self.directory.name_of(node) for node in lost)) or "a stage"
        return _not_ready(
            "stage_lost", f"{names} cannot be reached; the mesh plans again", "retry in a few seconds"
        )


def sent_by(gateway: Gateway, epoch: Epoch, heard: Mapping[str, HeardStats | None]) -> dict[str, Sent]:
    """What the gateway has under way in each replica of an epoch, given the drivers' last words."""
    flights: dict[str, list[Flight]] = {}
    for flight in gateway.flights():
        if flight.route is not None and flight.route.epoch == epoch:
            flights.setdefault(flight.route.replica, []).append(flight)
    sent = {}
    for replica, under_way in flights.items():
        word = heard.get(replica)
        new = [one for one in under_way if word is not None and one.sent_s >= word.heard_s]
        n_new_tokens = sum(one.n_tokens for one in new)
        sent[replica] = Sent(n_requests=len(under_way), n_new=len(new), new_tokens=n_new_tokens)
    return sent


def _answers(member: CoordinationMember | None) -> bool:
    return member is not None and (member.two_way or member.state == "self")


def _not_ready(code: str, message: str, next_step: str) -> Readiness:
    return Readiness(ready=False, blocker=Blocker(code=code, message=message, next_step=next_step))


def blocker_error(readiness: Readiness) -> NotReady:
    """Why a request cannot be routed now, as an error."""
    blocker = readiness.blocker
    if blocker is None:
        return NotReady("no replica can take the request now", code="no_route", next_step="try again shortly")
    return NotReady(
        blocker.message,
        code=blocker.code,
        next_step=blocker.next_step,
        needed_bytes=blocker.needed_bytes,
        room_bytes=blocker.room_bytes,
    )


def blocker_of(blocked: PlanBlocked) -> Blocker:
    """What the coordinator said, as readers see it."""
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
