"""This host's stages: loaded for an epoch, run step by step in the device's worker, forwarded to the next stage.

A host holds stages of at most three epochs (prepared, committed, draining). Whether a step may run is judged by
its epoch alone (`admit`); the worker holds no per-sequence state but KV in blocks that the step itself names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import msgspec

from daemon.compute.workers import Worker
from daemon.courier import Courier, Payload
from daemon.models.node_weights import NodeWeights
from daemon.stage_watch import StageWatch
from hexmesh.errors import HexmeshError, InvalidInput, Lost
from hexmesh.ids import short
from hexmesh.membership.outputs import Accepted, Admission
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.serving.pacing import MAX_GROUPS
from hexmesh.serving.watchdog import StepTimes
from hexmesh.wire.control import Epoch
from hexmesh.wire.data import MAX_STEP_TOKENS, Row, Step, StepRefused, StepResult
from hexmesh.wire.worker import LoadStage, RunStep, StepDone

log = logging.getLogger("hexmesh.stages")

StageKey = tuple[Epoch, str, int]
MAX_STEPS_WAITING = 2 * MAX_GROUPS
"""Of one stage: those that a driver has under way, and as many that it has given up. More would only fill memory."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where workers read the model."""

    folder: str
    model_id: str


@dataclass(slots=True)
class StepOrder:
    """Which steps a KV pool has seen; owned by `StageHost`.

    A step that comes after a later one might write into blocks that are another sequence's by now.
    """

    newest: int = -1
    n_running: int = 0


@dataclass(frozen=True, slots=True)
class HeldStage:
    """A stage that is loaded on one device here."""

    name: str
    pool: str
    """Its KV memory's name in the worker; the same for a replica that stays as it is in the next plan."""
    placement: tuple[object, ...]
    replica: Replica
    index: int
    worker: Worker
    times: StepTimes
    order: StepOrder

    @property
    def is_last(self) -> bool:
        return self.index == len(self.replica.stages) - 1

    @property
    def stage(self) -> Stage:
        return self.replica.stages[self.index]

    @property
    def title(self) -> str:
        """The stage as people know it."""
        stage = self.stage
        return f"stage {self.index} of replica {self.replica.id} (layers {stage.start}-{stage.stop - 1})"


class StageHost:
    """Owns the mapping from (epoch, replica, stage) to workers; one instance a node."""

    def __init__(
        self,
        *,
        courier: Courier,
        group: asyncio.TaskGroup,
        files: ModelFiles,
        weights: NodeWeights,
        budgets: Mapping[int, int],
        worker_of: Callable[[int], Awaitable[Worker]],
        admit: Callable[[Step], Admission],
        on_broken: Callable[[Epoch, str], None],
        is_heard: Callable[[str], bool],
        on_timed: Callable[[Stage, Sequence[Row], float], None],
    ) -> None:
        self._on_timed = on_timed
        self._courier = courier
        self._group = group
        self._files = files
        self._weights = weights
        self._budgets = budgets
        self._worker_of = worker_of
        self._admit = admit
        self._on_broken = on_broken
        self._held: dict[StageKey, HeldStage] = {}
        self._broken: set[tuple[Epoch, str]] = set()
        self.watch = StageWatch(is_heard=is_heard, on_unheard=self._next_is_silent)
        self.last_step_s = -math.inf
        """When a step was taken in last, on the monotonic clock."""

    async def prepare(self, epoch: Epoch, plan: Plan) -> frozenset[int]:
        """Load every stage that the plan gives this node; the devices where a KV pool waits for older stages to go.

        Raises an ExceptionGroup of HexmeshError when a stage cannot be loaded.
        """
        async with asyncio.TaskGroup() as group:
            loads = [
                (replica.stages[index].devices, group.create_task(self._load(epoch, plan, replica, index)))
                for replica, index in plan.stages_of(self._courier.node_id)
            ]
        return frozenset(device for devices, load in loads if load.result() for device in devices)

    def drop(self, epoch: Epoch) -> None:
        """Forget all stages of an epoch; layers and KV pools that another epoch shares stay in memory."""
        self._drop([key for key in self._held if key[0] == epoch])
        self._broken = {broken for broken in self._broken if broken[0] != epoch}

    def drop_on(self, epoch: Epoch, devices: Set[int]) -> frozenset[str]:
        """Forget the stages of an epoch on some devices; the replicas that this breaks."""
        keys = [
            key
            for key, held in self._held.items()
            if key[0] == epoch and devices & {*held.replica.stages[held.index].devices}
        ]
        self._drop(keys)
        return frozenset(replica for _, replica, _ in keys)

    def replica_broke(self, epoch: Epoch, replica: str) -> None:
        """A step of this replica may still be on its way: its KV memory goes to no later plan."""
        if any(key[:2] == (epoch, replica) for key in self._held):
            self._broken.add((epoch, replica))

    def _drop(self, keys: list[StageKey]) -> None:
        for key in keys:
            held = self._held.pop(key)
            self.watch.forget(held.name)
            held.worker.drop(held.name)
            self._weights.release(held.name)

    def worker_died(self, worker: Worker, reason: str) -> None:
        """Forget what the dead worker held and say which epochs are broken by it."""
        lost = [key for key, held in self._held.items() if held.worker is worker]
        for key in lost:
            self._weights.release(self._held.pop(key).name)
        for epoch in {key[0] for key in lost}:
            self._on_broken(epoch, reason)

    def stage_failed(self, name: str, reason: str) -> None:
        """A worker gave up one of its stages: its epoch is broken."""
        for key in [key for key, held in self._held.items() if held.name == name]:
            del self._held[key]
            self._weights.release(name)
            self._on_broken(key[0], reason)

    def link_lost(self, node: str) -> None:
        """Steps on their way to a node may not have arrived.

        The driver is told of each stage's last one: what it sends next shows whether the others got lost.
        """
        for step in self.watch.sent_to(node):
            self._refuse(step, f"the connection to {short(node)} was cut", None, is_transient=True)

    def on_step(self, step: Step, payload: Payload) -> None:
        """Run a step of ours and pass its result on; a step of another epoch is refused."""
        admission = self._admit(step)
        if not isinstance(admission, Accepted):
            self._refuse(step, admission.reason, admission)
            return
        self.last_step_s = time.monotonic()
        key = (step.epoch, step.replica, step.stage)
        held = self._held.get(key)
        if held is None:
            self._refuse(step, "this stage is not loaded here", None)
            return
        if (fault := _size_fault(step)) is not None:
            self._refuse(step, fault, None)
            return
        if held.order.n_running >= MAX_STEPS_WAITING:
            reason = f"{MAX_STEPS_WAITING} steps wait at this stage already"
            self._refuse(step, reason, None, is_transient=True)
            return
        if step.kept_pools and step.kept_pools[step.stage : step.stage + 1] != [held.pool]:
            self._refuse(step, "this stage's KV pool was made anew", None, is_pool_new=True)
            return
        if step.step <= held.order.newest:
            self._refuse(step, f"step {held.order.newest} was run before it", None, is_transient=True)
            return
        held.order.newest = step.step
        self._run(held, step, payload)

    async def _load(self, epoch: Epoch, plan: Plan, replica: Replica, index: int) -> bool:
        stage = replica.stages[index]
        if stage.devices[0] not in self._budgets:
            raise InvalidInput(f"the plan names device {stage.devices[0]}, which this host does not have")
        worker = await self._worker_of(stage.devices[0])
        order = self._load_order(stage_name(epoch, replica.id, index), plan, replica, stage)
        try:
            if not self._weights.is_whole:
                await self._weights.hold(order.stage, await worker.name_tensors(order))
            held = self._make_stage(order.stage, plan, replica, index, worker)
            loaded = await worker.load(msgspec.structs.replace(order, pool=held.pool))
        except BaseException as error:
            self._weights.release(order.stage)
            if isinstance(error, asyncio.CancelledError):
                with contextlib.suppress(Lost):  # it may be loading what nobody wants any more
                    worker.drop(order.stage)
            raise
        self._held[(epoch, replica.id, index)] = held
        log.info(
            "stage loaded replica=%s stage=%d layers=%d-%d load_s=%.2f reused_layers=%d",
            replica.id,
            index,
            stage.start,
            stage.stop - 1,
            loaded.load_s,
            loaded.n_layers_reused,
        )
        return loaded.pool_deferred

    def _make_stage(self, name: str, plan: Plan, replica: Replica, index: int, worker: Worker) -> HeldStage:
        """To be called when its load is about to be ordered: the pool that it may take over must not go before."""
        placement, stage = plan.placement_of(replica), replica.stages[index]
        same = self._same_stage(placement, index, worker)
        fresh = StepTimes(stage.predicted_step_s, max(1, replica.predicted_batch))
        return HeldStage(
            name=name,
            pool=name if same is None else same.pool,
            placement=placement,
            replica=replica,
            index=index,
            worker=worker,
            times=fresh if same is None else same.times,
            order=StepOrder() if same is None else same.order,
        )

    def _same_stage(self, placement: tuple[object, ...], index: int, worker: Worker) -> HeldStage | None:
        """The newest stage in the worker that is the same, unless its replica broke: its KV pool stays in use."""
        same = [
            (epoch, (epoch, replica) in self._broken, held)
            for (epoch, replica, at), held in self._held.items()
            if held.placement == placement and at == index and held.worker is worker
        ]
        if not same:
            return None
        _, is_broken, held = max(same, key=lambda one: one[0])
        return None if is_broken else held

    def _load_order(self, name: str, plan: Plan, replica: Replica, stage: Stage) -> LoadStage:
        """With a KV pool of its own."""
        return LoadStage(
            stage=name,
            pool=name,
            model_dir=self._files.folder,
            model_id=self._files.model_id,
            start=stage.start,
            stop=stage.stop,
            dtype=plan.dtype,
            kv_blocks=replica.kv_blocks,
            block_tokens=replica.block_tokens,
            budget_bytes=self._budgets[stage.devices[0]],
        )

    def _run(self, held: HeldStage, step: Step, payload: Payload) -> None:
        """Callbacks all the way: a task or a future would cost each step a turn of the loop."""
        order = RunStep(stage=held.name, step=step.step, rows=step.rows, sent_s=time.monotonic())

        def on_end(answer: StepDone | HexmeshError, out: memoryview) -> None:
            if isinstance(answer, StepDone):
                self._pass_on(held, step, answer, out)
            else:
                self._fail(step, answer)
            held.order.n_running -= 1
            self.watch.end(running, is_done=isinstance(answer, StepDone))

        try:
            held.worker.run_step(order, payload, on_end)
        except HexmeshError as error:
            self._fail(step, error)
            return
        held.order.n_running += 1
        running = self.watch.begin(held.name, step, held.worker, held.times, held.title)

    def _fail(self, step: Step, error: HexmeshError) -> None:
        self._refuse(step, error.message, None)
        if isinstance(error, InvalidInput):
            self._on_broken(step.epoch, error.message)

    def _pass_on(self, held: HeldStage, step: Step, done: StepDone, out: Payload) -> None:
        self._on_timed(held.stage, step.rows, done.compute_s)
        seconds = [*step.stage_seconds, done.compute_s]
        waits = [*step.queue_seconds, done.waited_s]
        pools = [*step.pools, held.pool]
        if held.is_last:
            result = StepResult(
                epoch=step.epoch,
                replica=step.replica,
                step=step.step,
                sampled=done.sampled,
                scored=done.scored,
                stage_seconds=seconds,
                queue_seconds=waits,
                pools=pools,
            )
            self._courier.send(step.driver, result)
            return
        onward = msgspec.structs.replace(
            step, stage=step.stage + 1, stage_seconds=seconds, queue_seconds=waits, pools=pools
        )
        to = held.replica.stages[step.stage + 1].node
        self.watch.passed_on(held.name, step, to)
        if not self._courier.send(to, onward, out):
            self._refuse(
                step, f"the next stage's node {short(to)} cannot be reached", None, is_transient=True
            )

    def _next_is_silent(self, step: Step, node: str) -> None:
        self._refuse(step, f"the next stage's node {short(node)} is not heard", None)

    def _refuse(
        self,
        step: Step,
        reason: str,
        admission: Admission | None,
        *,
        is_transient: bool = False,
        is_pool_new: bool = False,
    ) -> None:
        refusal = StepRefused(
            epoch=step.epoch,
            replica=step.replica,
            stage=step.stage,
            step=step.step,
            reason=reason,
            is_transient=is_transient,
            is_pool_new=is_pool_new,
            cert=getattr(admission, "cert", None),
        )
        self._courier.send(step.driver, refusal)


def _size_fault(step: Step) -> str | None:
    """Why a step is more than any driver would ask of a stage, so that it is not even queued."""
    n_tokens = sum(row.n_tokens for row in step.rows)
    if not 0 < n_tokens <= MAX_STEP_TOKENS:
        return f"a step of {n_tokens} tokens, and 1 to {MAX_STEP_TOKENS} are taken"
    return None


def stage_name(epoch: Epoch, replica_id: str, index: int) -> str:
    """A stage's key in its worker. Two epochs may hold equal plans, so the digest would not do."""
    return f"{epoch.ballot.term}.{epoch.ballot.boot:x}.{epoch.n}/{replica_id}/{index}"
