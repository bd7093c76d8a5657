"""The epochs that this host holds: their plans, their stages, and the replicas it drives in them.

The coordination machine decides which epoch is prepared, committed or draining; this carries it out. Stages are
loaded by `StageHost`, replicas whose first stage is here get a `ReplicaDriver`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from daemon.courier import Courier
from daemon.pipeline import ReplicaDriver, StepTrace
from daemon.stages import StageHost
from hexmesh.errors import HexmeshError
from hexmesh.plan import Plan, decode_plan, digest_of, plan_fault
from hexmesh.serving.batcher import BatchLimits
from hexmesh.serving.carry_over import carried_over
from hexmesh.wire.control import Cert, Epoch
from hexmesh.wire.data import ReplicaIdle, ReplicaStats

log = logging.getLogger("hexmesh.epochs")

COMPLAIN_AFTER_S = 2.0
"""A broken replica is reported if by then no other plan is under way: mostly the coordinator sees the cause too."""


@dataclass(slots=True)
class HeldEpoch:
    """One epoch's plan as this host holds it; owned by `Epochs`."""

    epoch: Epoch
    plan: Plan
    digest: str
    committed_s: float | None = None
    drivers: dict[str, ReplicaDriver] = field(default_factory=dict)
    moved: dict[str, ReplicaDriver] = field(default_factory=dict)
    """Drivers of this epoch that went on in the next one, by the id that their replicas have here."""
    loading: asyncio.Task[None] | None = None
    waiting_devices: frozenset[int] = frozenset()
    """Where a KV pool can only be had once the stages of the epoch before are gone."""
    idle_replicas: set[str] = field(default_factory=set)
    """While draining: replicas in which nothing runs any more, as their drivers say."""
    told: dict[str, int] = field(default_factory=dict)
    """While draining: requests in replicas driven elsewhere, as their drivers said last."""

    def requests_left(self) -> int:
        """Requests that have not ended, as far as it is known here."""
        here = sum(len(driver.sequences()) for driver in self.drivers.values())
        known = self.drivers.keys() | self.moved.keys()
        return here + sum(n for replica, n in self.told.items() if replica not in known)


class Epochs:
    """Owner of every epoch held here; at most one prepared, one committed and one draining."""

    def __init__(
        self,
        *,
        courier: Courier,
        group: asyncio.TaskGroup,
        stages: StageHost,
        limits: BatchLimits,
        vocab_size: int,
        on_loaded: Callable[[Epoch], None],
        on_load_failed: Callable[[Epoch, str], None],
        on_drained: Callable[[Epoch], None],
        on_broken: Callable[[Epoch, str], None],
        on_step: Callable[[StepTrace], None],
        is_heard: Callable[[str], bool],
    ) -> None:
        self._courier = courier
        self._group = group
        self._stages = stages
        self._limits = limits
        self._vocab_size = vocab_size
        self._on_loaded = on_loaded
        self._on_load_failed = on_load_failed
        self._on_drained = on_drained
        self._on_broken = on_broken
        self._on_step = on_step
        self._is_heard = is_heard
        self._held: dict[Epoch, HeldEpoch] = {}
        self._closed = asyncio.Event()
        self.committed: HeldEpoch | None = None
        self.draining: HeldEpoch | None = None

    def prepare(self, epoch: Epoch, plan_bytes: bytes) -> None:
        """Load our part of a plan in the background; `on_loaded` or `on_load_failed` follows."""
        try:
            plan = decode_plan(plan_bytes)
        except msgspec.MsgspecError as error:
            self._on_load_failed(epoch, f"the plan cannot be read: {error}")
            return
        if (fault := plan_fault(plan)) is not None:
            self._on_load_failed(epoch, f"the plan makes no sense: {fault}")
            return
        held = HeldEpoch(epoch, plan, digest_of(plan_bytes))
        self._held[epoch] = held
        held.loading = self._group.create_task(self._load(held), name=f"load-epoch-{epoch.n}")

    def drop(self, epoch: Epoch) -> None:
        """Forget an epoch that will not be committed."""
        held = self._held.pop(epoch, None)
        if held is not None:
            if held.loading is not None:
                held.loading.cancel()
            self._stages.drop(epoch)

    def commit(self, epoch: Epoch, cert: Cert, now_s: float) -> None:
        """New sequences go to this epoch from now on; the one before drains, but for replicas that stay as they are."""
        self.draining, self.committed = self.committed, self._held[epoch]
        self.committed.committed_s = now_s
        if self.draining is not None:
            self._move_drivers(self.draining, self.committed, cert)
            for driver in self.draining.drivers.values():
                driver.drain()
        self._start_drivers(self.committed, cert)
        if self.draining is not None:
            self._make_room(self.draining, self.committed.waiting_devices)
        self.check_drained()

    def release(self, epoch: Epoch, reason: str) -> None:
        """Free an epoch; what still runs in it is handed back to its gateways."""
        held = self._held.pop(epoch, None)
        if held is None:
            return
        if self.draining is held:
            self.draining = None
        for driver in held.drivers.values():
            driver.close(reason)
            self._tell_idle(held, driver.replica.id)
        for driver in held.moved.values():
            driver.epoch_released()
        self._stages.drop(epoch)

    def check_drained(self) -> None:
        """Tell when nothing runs in the draining epoch any more, here or on its other hosts."""
        if self.draining is None:
            return
        ended = {key for key, driver in self.draining.drivers.items() if driver.is_idle}
        ended |= {key for key, driver in self.draining.moved.items() if driver.has_moved}
        for replica_id in sorted(ended - self.draining.idle_replicas):
            self.draining.idle_replicas.add(replica_id)
            self._tell_idle(self.draining, replica_id)
        if self.draining.idle_replicas >= {replica.id for replica in self.draining.plan.replicas}:
            self._on_drained(self.draining.epoch)

    def on_idle(self, idle: ReplicaIdle) -> None:
        """A driver elsewhere says that its replica has drained.

        It may be ahead of this host, so the word is kept for an epoch that is still committed here.
        """
        held = self._held.get(idle.epoch)
        if held is not None:
            held.idle_replicas.add(idle.replica)
            held.told[idle.replica] = 0
            self.check_drained()

    def on_stats(self, stats: ReplicaStats) -> None:
        """A driver says what runs in its replica."""
        if stats.is_broken:
            self._stages.replica_broke(stats.epoch, stats.replica)
        n_left = stats.requests_running + stats.requests_waiting
        for held in (self.committed, self.draining):
            if held is not None and stats.epoch == held.epoch:
                held.told[stats.replica] = n_left

    def node_lost(self, node: str, reason: str) -> None:
        """A node went away: replicas that it drove run no more, those over it are broken."""
        for driver in list(self.drivers()):
            driver.node_lost(node, reason)
        if self.draining is not None:
            for replica in self.draining.plan.replicas:
                if replica.driver == node:
                    self.draining.idle_replicas.add(replica.id)
            self.check_drained()

    def plan(self, epoch: Epoch) -> Plan | None:
        """The plan of an epoch that is held here."""
        held = self._held.get(epoch)
        return held.plan if held is not None else None

    def draining_here(self) -> HeldEpoch | None:
        """The draining epoch, if this node holds a stage of it."""
        held = self.draining
        return held if held is not None and held.plan.stages_of(self._courier.node_id) else None

    def driver(self, epoch: Epoch, replica_id: str) -> ReplicaDriver | None:
        """The driver of that replica in that epoch, if it is here."""
        held = self._held.get(epoch)
        return held.drivers.get(replica_id) or held.moved.get(replica_id) if held is not None else None

    def drivers(self) -> Iterator[ReplicaDriver]:
        """Every driver here, of committed and draining epochs."""
        for held in self._held.values():
            yield from held.drivers.values()

    def close(self, reason: str) -> None:
        """Hand everything back: this daemon ends."""
        self._closed.set()
        for driver in list(self.drivers()):
            driver.close(reason)

    async def _load(self, held: HeldEpoch) -> None:
        try:
            held.waiting_devices = await self._stages.prepare(held.epoch, held.plan)
        except* HexmeshError as failures:
            reason = "; ".join(str(failure) for failure in failures.exceptions)
            log.warning("stage not loaded epoch=%d reason=%s", held.epoch.n, reason)
            self._stages.drop(held.epoch)
            self._on_load_failed(held.epoch, reason)
        else:
            self._on_loaded(held.epoch)

    def _make_room(self, draining: HeldEpoch, devices: frozenset[int]) -> None:
        """End what the draining epoch runs on some devices; its other replicas drain on."""
        for replica_id in self._stages.drop_on(draining.epoch, devices):
            if replica_id in draining.drivers:
                draining.drivers[replica_id].close("the plan changed")

    def _tell_idle(self, held: HeldEpoch, replica_id: str) -> None:
        idle = ReplicaIdle(replica=replica_id, epoch=held.epoch)
        for node in held.plan.hosts.keys() - {self._courier.node_id}:
            self._courier.send(node, idle)

    def _tell_closed(self, driver: ReplicaDriver) -> None:
        if self.committed is not None and self.committed.epoch == driver.epoch:
            stats = driver.stats(time.monotonic())
            for node in self.committed.plan.hosts:
                self._courier.send(node, stats)

    def _move_drivers(self, old: HeldEpoch, new: HeldEpoch, cert: Cert) -> None:
        """What runs in a replica that the new plan leaves as it is goes on, KV and all."""
        replicas = {replica.id: replica for replica in new.plan.replicas}
        for new_id, old_id in carried_over(old.plan, new.plan).items():
            driver = old.drivers.get(old_id)
            if driver is not None and driver.broken is None:
                driver.move(new.epoch, cert, replicas[new_id])
                old.moved[old_id] = new.drivers[new_id] = old.drivers.pop(old_id)
                log.info("replica carried over replica=%s epoch=%d", new_id, new.epoch.n)

    def _start_drivers(self, held: HeldEpoch, cert: Cert) -> None:
        for replica in held.plan.replicas:
            if replica.driver != self._courier.node_id or replica.id in held.drivers:
                continue
            driver = ReplicaDriver(
                epoch=held.epoch,
                cert=cert,
                replica=replica,
                model_id=held.plan.model_id,
                courier=self._courier,
                limits=self._limits,
                vocab_size=self._vocab_size,
                max_model_tokens=held.plan.max_model_tokens,
                on_broken=self._on_broken,
                on_step=self._on_step,
                on_idle=self.check_drained,
                is_heard=self._is_heard,
                on_closed=self._tell_closed,
            )
            held.drivers[replica.id] = driver
            self._group.create_task(self._drive(driver), name=f"drive-{replica.id}-{held.epoch.n}")

    async def _drive(self, driver: ReplicaDriver) -> None:
        """Run a replica to its end; if its end is not the plan's, see to it that another plan is made."""
        await driver.run()
        while self._is_missed(driver):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPLAIN_AFTER_S):
                    await self._closed.wait()
                    return
            if self._is_missed(driver) and not self._is_preparing():
                driver.complain()

    def _is_missed(self, driver: ReplicaDriver) -> bool:
        """Whether the present plan counts on a driver that is broken, and the mesh has not been told."""
        is_planned = self.committed is not None and self.committed.epoch == driver.epoch
        return is_planned and not driver.has_complained and not self._closed.is_set()

    def _is_preparing(self) -> bool:
        return any(held not in (self.committed, self.draining) for held in self._held.values())
