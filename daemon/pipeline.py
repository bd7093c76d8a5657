"""Drives one replica: forms batches, sends steps down the stages, hands tokens to the gateways.

Runs on the first stage's node, and goes on in each next epoch that leaves the replica as it is. Several steps are in
flight at a time, as many as keep every stage at work; each answer is taken in where it arrives, and what can be sent
next is sent before anything else is done. A step that got lost is not sent again: its rows come again in later steps.
When a stage refuses, vanishes, hangs or stays silent the replica is broken for good: every sequence it held is handed
back to its gateway, which replays it on another one, or in the next plan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from daemon.courier import Courier
from daemon.replica_rates import ReplicaRates
from hexmesh.errors import Busy, InvalidInput
from hexmesh.ids import short
from hexmesh.plan import Replica
from hexmesh.serving.batcher import Batcher, BatchLimits, Emission, MicroBatch
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.in_flight import StepInFlight, StepsInFlight
from hexmesh.serving.pacing import Pacing
from hexmesh.serving.rows import answer_fault, prompt_scores, wire_row
from hexmesh.serving.sequence import Sequence, sequence_of
from hexmesh.serving.watchdog import LOOK_S, SUSPECT_S, StepTimes
from hexmesh.wire.control import Cert, Epoch
from hexmesh.wire.data import (
    Generate,
    GenerateCancel,
    Generated,
    GenerateFailed,
    HeldSequence,
    PromptScored,
    ReplicaStats,
    SequenceTokens,
    Step,
    StepRefused,
    StepResult,
)

log = logging.getLogger("hexmesh.pipeline")

STRICTNESS = 0.5
"""A driver gives a step twice the time that a stage's own host gives it, so that the host names what hangs."""
MAX_LOSSES = 10
LOSS_PAUSE_S = 0.1
"""After a loss nothing is sent for a moment, so that ten of them in a row take about a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What one step took: the whole round trip, and of it each stage's compute and its queueing there."""

    replica: Replica
    n_rows: int
    n_tokens: int
    round_trip_s: float
    stage_seconds: list[float]
    queue_seconds: list[float]

    @property
    def transit_s(self) -> float:
        """What is left: all the ways between the workers, through daemons and network."""
        return max(0.0, self.round_trip_s - sum(self.stage_seconds) - sum(self.queue_seconds))


class ReplicaDriver:
    """Owns the batcher of one replica. `run` watches; what comes in drives it."""

    def __init__(
        self,
        *,
        epoch: Epoch,
        cert: Cert,
        replica: Replica,
        model_id: str,
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
        """The stages' KV pools that the sequences held here, and the cached blocks, rely on."""
        self._courier = courier
        self._vocab_size = vocab_size
        self._max_model_tokens = max_model_tokens
        self._on_broken = on_broken
        self._on_step = on_step
        self._on_idle = on_idle
        self._is_heard = is_heard
        self._on_closed = on_closed
        planned_s = [stage.predicted_step_s for stage in replica.stages]
        planned_tokens = max(1, replica.predicted_batch)
        self._in_flight: StepsInFlight[Epoch] = StepsInFlight(
            StepTimes(sum(planned_s), planned_tokens, strictness=STRICTNESS)
        )
        self._pacing = Pacing(planned_s, planned_tokens)
        self._batcher = Batcher(BlockPool(replica.kv_blocks, replica.block_tokens), limits, model_id)
        self._number_before = time.monotonic_ns() // 1000
        """Steps are numbered from here: higher than any of a driver before, whose KV pools this one may have."""
        self._gateways: dict[str, str] = {}
        self._rates = ReplicaRates(len(replica.stages))
        self._n_losses = 0
        """Since a step was answered."""
        self._is_pausing = False
        self._is_send_due = False
        self._work = asyncio.Event()
        self._closed = asyncio.Event()

    @property
    def pool(self) -> BlockPool:
        return self._batcher.pool

    @property
    def is_idle(self) -> bool:
        return not self._batcher.has_work

    def sequences(self) -> list[Sequence]:
        """Everything this replica holds, running first."""
        return self._batcher.sequences()

    def held(self) -> Iterator[tuple[str, HeldSequence]]:
        """Everything that is wanted here, with the gateway that waits for it."""
        for sequence in self._batcher.sequences():
            if (gateway := self._gateways.get(sequence.id)) is not None:
                yield (
                    gateway,
                    HeldSequence(sequence=sequence.id, attempt=sequence.attempt, n_output=sequence.n_output),
                )

    def submit(self, gateway: str, message: Generate) -> None:
        """Take in a gateway's sequence, or tell it why not."""
        if self.broken is not None or self.draining:
            reason = self.broken or "the plan changed"
            self._fail(gateway, message.sequence, message.attempt, reason, retry=True)
            return
        self._batcher.cancel(message.sequence)
        now_s = time.monotonic()
        try:
            self._check_tokens(message)
            sequence = sequence_of(message)
            if message.timeout_s is not None:
                sequence.deadline_s = now_s + message.timeout_s
            self._batcher.submit(sequence, now_s)
        except Busy as busy:
            self._fail(gateway, message.sequence, message.attempt, busy.message, retry=True, busy=True)
        except InvalidInput as invalid:
            self._fail(gateway, message.sequence, message.attempt, invalid.one_line(), retry=False)
        else:
            self._gateways[message.sequence] = gateway
            self._work.set()
            self._send_soon()

    def cancel(self, message: GenerateCancel) -> None:
        """Free a sequence that nobody waits for."""
        if self._batcher.cancel(message.sequence, message.attempt):
            self._gateways.pop(message.sequence, None)

    def gateway_lost(self, node: str) -> None:
        """Free everything that a dead gateway asked for."""
        for sequence_id in [key for key, gateway in self._gateways.items() if gateway == node]:
            self._batcher.cancel(sequence_id)
            self._gateways.pop(sequence_id, None)

    def node_lost(self, node: str, reason: str) -> None:
        """A node went away: break if it holds a stage, and free what it asked for as a gateway."""
        self.gateway_lost(node)
        if any(stage.node == node for stage in self.replica.stages):
            self.close(reason)

    def on_result(self, result: StepResult) -> None:
        """The last stage answered a step: take it in, and first of all send what can be sent now."""
        step = self._in_flight.get(result.step)
        if step is None:
            return
        if (fault := self._result_fault(step, result)) is not None:
            last = self.replica.stages[-1].node
            self._break(f"the last stage on {short(last)} answered nonsense: {fault}")
            return
        if self._pools and result.pools != self._pools:
            self._start_over("a stage's KV pool was made anew")
            return
        now_s = time.monotonic()
        for overtaken in self._in_flight.answered(step, now_s):
            self._batcher.lose(overtaken.batch.step)
        self._n_losses = 0
        self._pools = result.pools
        self._is_known = self._is_known or result.epoch == self.epoch
        scores = self._new_scores(step, result)
        emissions = self._batcher.complete(step.batch.step, result.sampled, now_s)
        self._send_steps(now_s)
        self._hand_out_scores(scores)
        self._hand_out(emissions)
        self._account(step, result, emissions, now_s)
        self._note_moved()
        self._note_idle()

    def on_refused(self, refusal: StepRefused) -> None:
        """A stage did not run a step: go on without it if it got lost, else this replica is broken."""
        step = self._in_flight.get(refusal.step)
        if step is None:
            return
        if refusal.is_transient or refusal.epoch != self.epoch:
            self._lose([step], refusal.reason)
        elif refusal.is_pool_new:
            self._start_over(refusal.reason)
        else:
            stage = self.replica.stages[refusal.stage]
            self.close(f"stage {refusal.stage} on {short(stage.node)} refused: {refusal.reason}")

    def _start_over(self, reason: str) -> None:
        """The KV of what runs here is gone, the stages are not: hand back the sequences and go on without them."""
        log.info("sequences handed back replica=%s reason=%s", self.replica.id, reason)
        self._pools = []
        for sequence in self._batcher.abandon():
            self._hand_back(sequence, reason)
        self.pool.forget_cached()
        self._in_flight.forget()
        self._note_moved()
        self._note_idle()

    def link_reset(self, node: str) -> None:
        """A connection to or from a stage's node was cut: the steps in flight may have been on it."""
        if any(stage.node == node for stage in self.replica.stages):
            self._lose(self._in_flight.steps(), f"the connection to {short(node)} was cut")

    def drain(self) -> None:
        """The epoch takes no new sequences any more: hand back those that no stage has seen yet."""
        self.draining = True
        for sequence in self._batcher.waiting:
            self._batcher.cancel(sequence.id)
            self._hand_back(sequence, "the plan changed")

    def move(self, epoch: Epoch, cert: Cert, replica: Replica) -> None:
        """Go on in a later epoch whose plan leaves this replica as it is: same stages, same KV pools, same blocks.

        Steps under way are of the epoch before; `has_moved` once all of them are answered.
        """
        self.epoch, self._cert, self.replica = epoch, cert, replica
        self.has_moved = not self._in_flight.not_of(epoch)
        self._is_known = False
        if self.is_idle and not self.pool.n_cached:
            self._pools = []

    def epoch_released(self) -> None:
        """Steps of the epoch before that are under way will not be answered: go on without them."""
        self._lose(self._in_flight.not_of(self.epoch), "the epoch that it was sent in was released")

    def close(self, reason: str) -> None:
        """Hand every sequence back to its gateway; nothing is accepted any more."""
        if self.broken is not None:
            return
        self.broken = reason
        log.info("replica closed replica=%s epoch=%d reason=%s", self.replica.id, self.epoch.n, reason)
        self._on_closed(self)
        for sequence in self._batcher.abandon():
            self._hand_back(sequence, reason)
        self._in_flight.forget()
        self.has_moved = True
        self._closed.set()
        self._work.set()
        self._on_idle()

    async def run(self) -> None:
        """Watch over what is in flight until closed."""
        while self.broken is None:
            await self._work.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._closed.wait()
            if self.broken is None:
                self._look(time.monotonic())

    def stats(self, now_s: float) -> ReplicaStats:
        """What this replica does just now."""
        pool = self.pool
        return ReplicaStats(
            replica=self.replica.id,
            epoch=self.epoch,
            requests_running=len(self._batcher.running),
            requests_waiting=len(self._batcher.waiting),
            kv_blocks_total=pool.n_blocks,
            kv_blocks_free=pool.n_available,
            kv_blocks_cached=pool.n_cached,
            kv_blocks_leased=pool.n_leased,
            steps_in_flight=len(self._in_flight),
            tokens_per_s=self._rates.tokens_per_s(now_s),
            stage_busy=self._rates.stage_busy(now_s),
            queue_room=max(0, self._batcher.limits.max_waiting - len(self._batcher.waiting)),
            tokens_left=sum(one.max_tokens - one.n_output for one in self._batcher.sequences()),
            is_broken=self.broken is not None,
        )

    # --- sending ---

    def _send_soon(self) -> None:
        """In the loop's next turn, so that requests which come together start together."""
        if not self._is_send_due:
            self._is_send_due = True
            asyncio.get_running_loop().call_soon(self._send_due)

    def _send_due(self) -> None:
        self._is_send_due = False
        self._send_steps(time.monotonic())
        self._note_idle()

    def _send_steps(self, now_s: float) -> None:
        """Send as many steps as are worth having in flight."""
        while self.broken is None and not self._is_pausing:
            n_groups = self._pacing.groups(self._batcher.n_decoding)
            if len(self._in_flight) >= self._depth(n_groups):
                break
            batch = self._batcher.next_step(now_s, n_groups)
            if batch is None:
                break
            self._send(batch, now_s)

    def _depth(self, n_groups: int) -> int:
        """How many steps may be in flight: prompts need no answer before the next chunk goes."""
        batcher = self._batcher
        if not batcher.has_prompts:
            return n_groups
        return max(n_groups, self._pacing.prompt_depth(batcher.limits.step_tokens))

    def _send(self, batch: MicroBatch, now_s: float) -> None:
        self.steps_run += 1
        self._work.set()
        message = self._message(batch)
        self._in_flight.sent(message.step, self.epoch, batch, message.rows, now_s)
        self._courier.send(self._courier.node_id, message, _token_ids(batch))

    def _message(self, batch: MicroBatch) -> Step:
        opens = any(row.start <= row.sequence.n_cached for row in batch.rows)
        return Step(
            epoch=self.epoch,
            cert=self._cert if opens or not self._is_known else None,
            kept_pools=[] if self._is_known else self._pools,
            replica=self.replica.id,
            stage=0,
            step=self._number_before + batch.step,
            driver=self._courier.node_id,
            rows=[wire_row(row) for row in batch.rows],
        )

    # --- waiting ---

    def _look(self, now_s: float) -> None:
        """Called now and then while there is work: what waits too long?"""
        for sequence in self._batcher.expire(now_s):
            self._hand_back(sequence, "its time is over")
        step = self._in_flight.look(now_s)
        if step is not None and step.charged_s >= SUSPECT_S and (silent := self._silent_stage()) is not None:
            self.close(silent)
        elif step is not None and step.charged_s >= step.patience.limit_s:
            limit_s = step.patience.limit_s
            self._break(f"no stage of replica {self.replica.id} answered within {limit_s:.1f} s")
        else:
            self._send_steps(now_s)  # blocks may have become free
            self._note_idle()

    def _silent_stage(self) -> str | None:
        """What to say of the first stage whose node is not heard any more."""
        for index, stage in enumerate(self.replica.stages):
            if stage.node != self._courier.node_id and not self._is_heard(stage.node):
                return f"stage {index} of replica {self.replica.id}: node {stage.node} is not heard"
        return None

    def _lose(self, steps: list[StepInFlight[Epoch]], reason: str) -> None:
        """These steps will not be answered; what was in them is sent anew after a pause."""
        if not steps:
            return
        now_s = time.monotonic()
        for step in steps:
            self._in_flight.lost(step, now_s)
            self._batcher.lose(step.batch.step)
        self._note_moved()
        if self._is_pausing:
            return
        self._n_losses += 1
        if self._n_losses >= MAX_LOSSES:
            self._break(f"steps were lost {MAX_LOSSES} times: {reason}")
            return
        self._is_pausing = True
        asyncio.get_running_loop().call_later(LOSS_PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        self._is_pausing = False
        self._send_steps(time.monotonic())
        self._note_idle()

    def _note_moved(self) -> None:
        if not self.has_moved and not self._in_flight.not_of(self.epoch):
            self.has_moved = True
            self._on_idle()

    def _note_idle(self) -> None:
        if self.is_idle:
            self._work.clear()
            self._on_idle()

    # --- what comes of a step ---

    def _new_scores(self, step: StepInFlight[Epoch], result: StepResult) -> list[PromptScored]:
        """To be asked for before the step is completed."""
        if not result.scored:
            return []
        scheduled = zip(step.batch.rows, step.rows, strict=True)
        number = step.batch.step
        return list(prompt_scores(scheduled, result.scored, lambda row: self._batcher.counts(number, row)))

    def _hand_out_scores(self, scores: list[PromptScored]) -> None:
        for message in scores:
            gateway = self._gateways.get(message.sequence)
            if gateway is not None:
                self._courier.send(gateway, message)

    def _hand_out(self, emissions: Iterable[Emission]) -> None:
        """One message to each gateway: it is read, and its clients are served, once a step."""
        answers: dict[str, list[SequenceTokens]] = {}
        for emission in emissions:
            sequence = emission.sequence
            gateway = self._gateways.get(sequence.id)
            if gateway is None:
                continue
            if emission.finish_reason is not None:
                del self._gateways[sequence.id]
            tokens = SequenceTokens(
                sequence=sequence.id,
                attempt=sequence.attempt,
                first=emission.first,
                tokens=emission.tokens,
                finish_reason=emission.finish_reason,
                n_cached=sequence.n_cached,
            )
            answers.setdefault(gateway, []).append(tokens)
        for gateway, drawn in answers.items():
            self._courier.send(gateway, Generated(answers=drawn))

    def _account(
        self, step: StepInFlight[Epoch], result: StepResult, emissions: list[Emission], now_s: float
    ) -> None:
        round_trip_s = now_s - step.sent_s
        n_drawn = sum(len(emission.tokens) for emission in emissions)
        self._rates.answered(now_s, n_drawn, result.stage_seconds)
        self._pacing.observe(
            len(step.rows),
            step.batch.n_tokens,
            result.stage_seconds,
            round_trip_s,
            step.n_in_flight,
            queue_s=sum(result.queue_seconds),
        )
        trace = StepTrace(
            replica=self.replica,
            n_rows=len(step.rows),
            n_tokens=step.batch.n_tokens,
            round_trip_s=round_trip_s,
            stage_seconds=result.stage_seconds,
            queue_seconds=result.queue_seconds,
        )
        self._on_step(trace)

    def _result_fault(self, step: StepInFlight[Epoch], result: StepResult) -> str | None:
        """Why this cannot be the answer to that step."""
        if (fault := answer_fault(step.rows, result, self._vocab_size)) is not None:
            return fault
        n_stages = len(self.replica.stages)
        for times in (result.stage_seconds, result.queue_seconds):
            if len(times) != n_stages:
                return f"times of {len(times)} stages, not {n_stages}"
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
