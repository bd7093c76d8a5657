"""Drives one replica: forms batches, sends steps down the stages, hands tokens to the gateways.

Runs on the first stage's node, and goes on in each next epoch that leaves the replica as it is. One step is in
flight at a time, and every sequence that can run is in it. When a stage refuses, vanishes, hangs or stays silent the
replica is broken for good: every sequence it held is handed back to its gateway, which replays it on another one, or
in the next plan.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from daemon.courier import Courier
from hexmesh.errors import Busy, InvalidInput
from hexmesh.ids import short
from hexmesh.plan import Replica
from hexmesh.serving.batcher import Batcher, BatchLimits, Emission, MicroBatch
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.rows import answer_fault, prompt_scores, wire_row
from hexmesh.serving.sequence import Sequence, sequence_of
from hexmesh.serving.watchdog import LOOK_S, SUSPECT_S, Patience, StepTimes
from hexmesh.wire.control import Cert, Epoch
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    ReplicaStats,
    Row,
    Step,
    StepRefused,
    StepResult,
)

log = logging.getLogger("hexmesh.pipeline")

STRICTNESS = 0.5
"""A driver gives a step twice the time that a stage's own host gives it, so that the host names what hangs."""
RATE_WINDOW_S = 5.0
MAX_RESENDS = 10
RESEND_PAUSE_S = 0.1
"""Rows name their positions and blocks, so a step that got lost is simply sent again, for about a second."""


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step took: the whole round trip, and the compute time of each stage."""

    replica: str
    round_trip_s: float
    stage_seconds: list[float]


class ReplicaDriver:
    """Owns the batcher of one replica; `run` is its only loop."""

    def __init__(
        self,
        *,
        epoch: Epoch,
        cert: Cert,
        replica: Replica,
        courier: Courier,
        limits: BatchLimits,
        vocab_size: int,
        max_model_tokens: int,
        on_broken: Callable[[Epoch, str], None],
        on_step: Callable[[StepTrace], None],
        on_idle: Callable[[], None],
        is_heard: Callable[[str], bool],
        on_closed: Callable[[ReplicaDriver], None],
    ) -> None:
        self.epoch = epoch
        self.replica = replica
        self.broken: str | None = None
        self.draining = False
        self.has_moved = True
        """No step of an epoch before the present one is under way."""
        self.steps_run = 0
        self.has_complained = False
        """Whether the mesh was asked for another plan because of what broke here."""
        self._cert = cert
        self._is_known = False
        """Whether every stage has run a step of this epoch, and so has committed it."""
        self._pools: list[str] = []
        """The stages' KV pools that the sequences held here rely on."""
        self._courier = courier
        self._vocab_size = vocab_size
        self._max_model_tokens = max_model_tokens
        self._on_broken = on_broken
        self._on_step = on_step
        self._on_idle = on_idle
        self._is_heard = is_heard
        self._on_closed = on_closed
        self._times = StepTimes(
            sum(stage.predicted_step_s for stage in replica.stages),
            max(1, replica.predicted_batch),
            strictness=STRICTNESS,
        )
        self._batcher = Batcher(BlockPool(replica.kv_blocks, replica.block_tokens), limits)
        self._n_started_over = 0
        self._gateways: dict[str, str] = {}
        self._sent: list[Row] = []
        """The rows of the step in flight."""
        self._answer: asyncio.Future[StepResult | str] | None = None
        self._work = asyncio.Event()
        self._emitted: deque[tuple[float, int]] = deque()
        self._stage_seconds: deque[tuple[float, list[float]]] = deque()

    @property
    def pool(self) -> BlockPool:
        return self._batcher.pool

    @property
    def is_idle(self) -> bool:
        return not self._batcher.has_work

    def sequences(self) -> list[Sequence]:
        """Everything this replica holds, running first."""
        return self._batcher.sequences()

    def submit(self, gateway: str, message: Generate) -> None:
        """Take in a gateway's sequence, or tell it why not."""
        if self.broken is not None or self.draining:
            reason = self.broken or "the plan changed"
            self._fail(gateway, message.sequence, message.attempt, reason, retry=True)
            return
        self._batcher.cancel(message.sequence)
        try:
            self._check_tokens(message)
            self._batcher.submit(sequence_of(message), time.monotonic())
        except Busy as busy:
            self._fail(gateway, message.sequence, message.attempt, busy.message, retry=True, busy=True)
        except InvalidInput as invalid:
            self._fail(gateway, message.sequence, message.attempt, invalid.one_line(), retry=False)
        else:
            self._gateways[message.sequence] = gateway
            self._work.set()

    def cancel(self, message: GenerateCancel) -> None:
        """Free a sequence that nobody waits for."""
        if self._batcher.cancel(message.sequence, message.attempt):
            self._gateways.pop(message.sequence, None)

    def gateway_lost(self, node: str) -> None:
        """Free everything that a dead gateway asked for."""
        for sequence_id in [key for key, gateway in self._gateways.items() if gateway == node]:
            self._batcher.cancel(sequence_id)
            del self._gateways[sequence_id]

    def node_lost(self, node: str, reason: str) -> None:
        """A node went away: break if it holds a stage, and free what it asked for as a gateway."""
        self.gateway_lost(node)
        if any(stage.node == node for stage in self.replica.stages):
            self.close(reason)

    def on_result(self, result: StepResult) -> None:
        """The last stage answered the step in flight."""
        if self._answer is None or self._answer.done() or result.step != self.steps_run:
            return
        if (fault := self._result_fault(result)) is not None:
            last = self.replica.stages[-1].node
            self._break(f"the last stage on {short(last)} answered nonsense: {fault}")
        else:
            self._answer.set_result(result)

    def on_refused(self, refusal: StepRefused) -> None:
        """A stage did not run the step in flight: send it again if it got lost, else this replica is broken."""
        if refusal.step != self.steps_run or self._answer is None or self._answer.done():
            return
        if refusal.is_transient or refusal.epoch != self.epoch:
            self._lose_step(refusal.reason)
        elif refusal.is_pool_new:
            self._start_over(refusal.reason)
        else:
            stage = self.replica.stages[refusal.stage]
            self.close(f"stage {refusal.stage} on {short(stage.node)} refused: {refusal.reason}")

    def _start_over(self, reason: str) -> None:
        """The KV of what runs here is gone, the stages are not: hand back the sequences and go on without them."""
        log.info("sequences handed back replica=%s reason=%s", self.replica.id, reason)
        self._pools = []
        self._n_started_over += 1
        for sequence in self._batcher.abandon():
            self._hand_back(sequence, reason)
        self.pool.forget_cached()
        self._lose_step(reason)

    def link_reset(self, node: str) -> None:
        """A connection to or from a stage's node was cut: the step in flight may have been on it."""
        if any(stage.node == node for stage in self.replica.stages):
            self._lose_step(f"the connection to {short(node)} was cut")

    def drain(self) -> None:
        """The epoch takes no new sequences any more: hand back those that no stage has seen yet."""
        self.draining = True
        for sequence in self._batcher.waiting:
            self._batcher.cancel(sequence.id)
            self._hand_back(sequence, "the plan changed")

    def move(self, epoch: Epoch, cert: Cert, replica: Replica) -> None:
        """Go on in a later epoch whose plan leaves this replica as it is: same stages, same KV pools, same blocks.

        A step under way is of the epoch before; `has_moved` once it is answered.
        """
        self.epoch, self._cert, self.replica = epoch, cert, replica
        self.has_moved = self._answer is None or self._answer.done()
        self._is_known = False
        if self.is_idle and not self.pool.n_cached:
            self._pools = []

    def epoch_released(self) -> None:
        """A step of the epoch before, if one is under way, will not be answered: send it again in the present one."""
        if not self.has_moved:
            self._lose_step("the epoch that it was sent in was released")

    def close(self, reason: str) -> None:
        """Hand every sequence back to its gateway; nothing is accepted any more."""
        if self.broken is not None:
            return
        self.broken = reason
        log.info("replica closed replica=%s epoch=%d reason=%s", self.replica.id, self.epoch.n, reason)
        self._on_closed(self)
        for sequence in self._batcher.abandon():
            self._hand_back(sequence, reason)
        self._lose_step(reason)
        self._work.set()
        self._on_idle()

    async def run(self) -> None:
        """Step until closed."""
        while self.broken is None:
            await self._work.wait()
            batch = self._batcher.next_step(time.monotonic(), 1) if self.broken is None else None
            if batch is None:
                self._work.clear()
                self._on_idle()
                continue
            await self._step(batch)

    def stats(self, now_s: float) -> ReplicaStats:
        """What this replica does just now."""
        window = self._recent(now_s)
        return ReplicaStats(
            replica=self.replica.id,
            epoch=self.epoch,
            requests_running=len(self._batcher.running),
            requests_waiting=len(self._batcher.waiting),
            kv_blocks_total=self._batcher.pool.n_blocks,
            kv_blocks_free=self._batcher.pool.n_available,
            tokens_per_s=sum(n for _, n in self._emitted) / window,
            stage_busy=[
                min(1.0, sum(seconds[index] for _, seconds in self._stage_seconds) / window)
                for index in range(len(self.replica.stages))
            ],
            is_broken=self.broken is not None,
        )

    async def _step(self, batch: MicroBatch) -> None:
        started_s = time.monotonic()
        result = await self._answered(batch)
        if result is None:
            return
        now_s = time.monotonic()
        self._note_stages(result)
        self._hand_out_scores(batch, result)
        emissions = self._batcher.complete(batch.step, result.sampled, now_s)
        self._hand_out(emissions)
        self._account(result, emissions, started_s, now_s)

    def _note_stages(self, result: StepResult) -> None:
        """Take down which KV pools the stages run on, and whether they have followed into this epoch."""
        self._pools = result.pools
        self._is_known = result.epoch == self.epoch
        if not self.has_moved:
            self.has_moved = True
            self._on_idle()

    async def _answered(self, batch: MicroBatch) -> StepResult | None:
        """The step's result; None when the replica was closed meanwhile."""
        n_started_over = self._n_started_over
        for _ in range(MAX_RESENDS):
            self.steps_run += 1
            self._answer = asyncio.get_running_loop().create_future()
            self._courier.send(self._courier.node_id, self._message(batch), _token_ids(batch))
            answer = await self._awaited(self._answer, batch.n_tokens)
            if answer is None or self.broken is not None or self._n_started_over != n_started_over:
                return None
            if isinstance(answer, StepResult):
                return answer
            await asyncio.sleep(RESEND_PAUSE_S)
        self._break(f"a step was lost {MAX_RESENDS} times: {answer}")
        return None

    async def _awaited(
        self, answer: asyncio.Future[StepResult | str], n_tokens: int
    ) -> StepResult | str | None:
        """The answer to a step; None when it cannot come any more, and this replica is closed."""
        patience = Patience(self._times.deadline_s(n_tokens), time.monotonic())
        while not answer.done():
            await asyncio.wait({answer}, timeout=LOOK_S)
            patience.spend(time.monotonic())
            if answer.done():
                break
            if patience.spent_s >= SUSPECT_S and (silent := self._silent_stage()) is not None:
                self.close(silent)
                return None
            if patience.is_over:
                self._break(f"no stage of replica {self.replica.id} answered within {patience.limit_s:.1f} s")
                return None
        found = answer.result()
        if isinstance(found, StepResult):
            self._times.took(n_tokens, patience.spent_s)
        return found

    def _silent_stage(self) -> str | None:
        """What to say of the first stage whose node is not heard any more."""
        for index, stage in enumerate(self.replica.stages):
            if stage.node != self._courier.node_id and not self._is_heard(stage.node):
                return f"stage {index} of replica {self.replica.id}: node {stage.node} is not heard"
        return None

    def _lose_step(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(reason)

    def _message(self, batch: MicroBatch) -> Step:
        opens = any(row.start <= row.sequence.n_cached for row in batch.rows)
        self._sent = [wire_row(row) for row in batch.rows]
        return Step(
            epoch=self.epoch,
            cert=self._cert if opens or not self._is_known else None,
            kept_pools=[] if self._is_known else self._pools,
            replica=self.replica.id,
            stage=0,
            step=self.steps_run,
            driver=self._courier.node_id,
            rows=self._sent,
        )

    def _hand_out_scores(self, batch: MicroBatch, result: StepResult) -> None:
        scheduled = zip(batch.rows, self._sent, strict=True)
        for message in prompt_scores(
            scheduled, result.scored, lambda row: self._batcher.counts(batch.step, row)
        ):
            gateway = self._gateways.get(message.sequence)
            if gateway is not None:
                self._courier.send(gateway, message)

    def _hand_out(self, emissions: Iterable[Emission]) -> None:
        for emission in emissions:
            sequence = emission.sequence
            gateway = self._gateways.get(sequence.id)
            if gateway is None:
                continue
            if emission.finish_reason is not None:
                del self._gateways[sequence.id]
            generated = Generated(
                sequence=sequence.id,
                attempt=sequence.attempt,
                first=emission.first,
                tokens=emission.tokens,
                finish_reason=emission.finish_reason,
            )
            self._courier.send(gateway, generated)

    def _account(
        self,
        result: StepResult,
        emissions: list[Emission],
        started_s: float,
        now_s: float,
    ) -> None:
        self._emitted.append((now_s, sum(len(emission.tokens) for emission in emissions)))
        self._stage_seconds.append((now_s, result.stage_seconds))
        self._recent(now_s)
        self._on_step(StepTrace(self.replica.id, now_s - started_s, result.stage_seconds))

    def _recent(self, now_s: float) -> float:
        """Drop what is older than the window; the window's length in seconds."""
        for history in (self._emitted, self._stage_seconds):
            while history and history[0][0] < now_s - RATE_WINDOW_S:
                history.popleft()
        return RATE_WINDOW_S

    def _result_fault(self, result: StepResult) -> str | None:
        """Why this cannot be the answer to the step in flight."""
        if (fault := answer_fault(self._sent, result, self._vocab_size)) is not None:
            return fault
        if len(result.stage_seconds) != len(self.replica.stages):
            return f"times of {len(result.stage_seconds)} stages, not {len(self.replica.stages)}"
        return None

    def _break(self, reason: str) -> None:
        self.close(reason)
        self.complain()

    def complain(self) -> None:
        """Ask the mesh for another plan: this replica is broken."""
        assert self.broken is not None
        self.has_complained = True
        self._on_broken(self.epoch, self.broken)

    def _check_tokens(self, message: Generate) -> None:
        """A token that the model does not have would break the step for every sequence in it."""
        n_final = len(message.prompt) + message.max_tokens
        if not len(message.emitted) < message.max_tokens or n_final > self._max_model_tokens:
            raise InvalidInput(
                f"{len(message.prompt)} prompt tokens, {len(message.emitted)} of {message.max_tokens} answered: "
                f"the model takes {self._max_model_tokens} in all, and one or more must be left to answer",
                code="context_length_exceeded",
            )
        biased = [token for token, _ in message.sampling.logit_bias]
        tokens = [*message.prompt, *message.emitted, *biased]
        if not message.prompt or min(tokens) < 0 or max(tokens) >= self._vocab_size:
            raise InvalidInput(
                f"a request takes at least one token id in its prompt, and ids from 0 to {self._vocab_size - 1}",
                code="bad_tokens",
            )

    def _hand_back(self, sequence: Sequence, reason: str) -> None:
        gateway = self._gateways.pop(sequence.id, None)
        if gateway is not None:
            self._fail(gateway, sequence.id, sequence.attempt, reason, retry=True)

    def _fail(
        self, gateway: str, sequence_id: str, attempt: int, reason: str, *, retry: bool, busy: bool = False
    ) -> None:
        failed = GenerateFailed(
            sequence=sequence_id, attempt=attempt, reason=reason, retry=retry, busy=busy, cert=self._cert
        )
        self._courier.send(gateway, failed)


def _token_ids(batch: MicroBatch) -> bytes:
    """The int64 ids (n_tokens,) that the first stage embeds, in row order."""
    ids = array("q")
    for row in batch.rows:
        ids.extend(row.token_ids)
    return ids.tobytes()
