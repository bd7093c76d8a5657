"""One replica of a plan in virtual time: the daemon's batcher and pacing, over stages that take their roofline's time.

Mirrors `daemon/pipeline.py`: steps are sent as `Pacing` says, a result is taken in when the sampled tokens are back at
the first stage, and what can be sent then is sent. A stage belongs to one replica, so the steps of a replica pass it in
their order, and a step's way through the stages of one host is known when it begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from hexmesh.cluster import Cluster
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DTYPE_BYTES, Plan, Replica
from hexmesh.score import pipeline_of
from hexmesh.serving.batcher import Batcher, BatchLimits, Emission, MicroBatch
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.pacing import Pacing
from hexmesh.serving.sequence import Sequence as Tokens
from hexmesh.sim.events import Events
from hexmesh.sim.network import Network
from hexmesh.sim.step_time import StageTimes, StepLoad, decode_load, load_of, windows_of
from hexmesh.wire.control import Ballot, Epoch
from hexmesh.wire.data import ReplicaStats, SampledToken

TOKEN = SampledToken(token_id=0)
_DRAWN = [TOKEN]
_EPOCH = Epoch(ballot=Ballot(term=0, rank=0, node="", boot=0), n=0)
_WORTH_SKIPPING = 3
"""Rounds that must fit in before anything else happens."""
RATE_WINDOW_S = 5.0


@dataclass(slots=True)
class _Step:
    batch: MicroBatch
    load: StepLoad
    sent_s: float
    n_in_flight: int
    seconds: list[float] = field(default_factory=list)
    queue_s: float = 0.0


class SimulatedReplica:
    """Owns a replica's batcher from its start to its end; a replica that comes back is another one."""

    def __init__(
        self,
        replica: Replica,
        plan: Plan,
        cluster: Cluster,
        spec: ModelSpec,
        *,
        limits: BatchLimits,
        events: Events,
        network: Network,
        on_tokens: Callable[[SimulatedReplica, list[Emission], int], None],
        on_room: Callable[[SimulatedReplica, list[Tokens]], None],
    ) -> None:
        pipeline = pipeline_of(replica.stages, cluster)
        self.replica = replica
        self.is_dead = False
        self.batcher = Batcher(BlockPool(replica.kv_blocks, replica.block_tokens), limits, plan.model_id)
        self.stage_busy_s = [0.0] * len(replica.stages)
        self.n_steps = 0
        self._events = events
        self._network = network
        self._on_tokens = on_tokens
        self._on_room = on_room
        self._times = [StageTimes(seat, spec, plan.dtype) for seat in pipeline.seats]
        self._hops = pipeline.hops
        self._ways = [(a.node, b.node) for a, b in pairwise(replica.stages)]
        self._back_s = pipeline.back.delay_s
        self._windows = windows_of(spec)
        self._hidden_bytes = spec.hidden_size * DTYPE_BYTES[plan.dtype]
        self._stage_free_s = [0.0] * len(replica.stages)
        self._hop_free_s = [0.0] * len(self._hops)
        planned_s = [stage.predicted_step_s for stage in replica.stages]
        self._pacing = Pacing(planned_s, max(1, replica.predicted_batch))
        self._in_flight: dict[int, _Step] = {}
        self._is_skipping = False
        self._is_on_one_host = len({stage.node for stage in replica.stages}) == 1
        self._round_s = 0.0
        """What the last step took, from its start to its answer."""
        self._is_send_due = False
        self._drawn: deque[tuple[float, int]] = deque()
        """When steps were answered, and their tokens, lately."""

    def submit(self, sequence: Tokens) -> None:
        """Queue a sequence. Raises Busy and InvalidInput like the batcher."""
        self.batcher.submit(sequence, self._events.now_s)
        self.send_soon()

    def send_soon(self) -> None:
        """After all that happens at this moment, so that requests which come together start together."""
        if not self._is_send_due:
            self._is_send_due = True
            self._events.at(self._events.now_s, self._send_due)

    def die(self) -> list[Tokens]:
        """A stage's host is gone; the sequences that were held."""
        self.is_dead = True
        self._in_flight.clear()
        return self.batcher.abandon()

    def stats(self) -> ReplicaStats:
        """What gateways are told of it now."""
        batcher, pool = self.batcher, self.batcher.pool
        n_waiting = len(batcher.waiting)
        return ReplicaStats(
            replica=self.replica.id,
            epoch=_EPOCH,
            requests_running=batcher.n_running,
            requests_waiting=n_waiting,
            kv_blocks_total=pool.n_blocks,
            kv_blocks_free=pool.n_available,
            kv_blocks_cached=pool.n_cached,
            kv_blocks_leased=pool.n_leased,
            steps_in_flight=len(self._in_flight),
            tokens_per_s=self._tokens_per_s(),
            stage_busy=[],
            queue_room=max(0, batcher.limits.max_waiting - n_waiting),
            tokens_left=sum(one.max_tokens - one.n_output for one in batcher.sequences()),
            is_broken=self.is_dead,
        )

    # --- steps ---

    def _send_due(self) -> None:
        self._is_send_due = False
        self._send_steps()

    def _send_steps(self) -> None:
        """Send as many steps as are worth having in flight."""
        if self.is_dead:
            return
        batcher, now_s = self.batcher, self._events.now_s
        while True:
            n_groups = self._pacing.groups(batcher.n_decoding)
            if len(self._in_flight) >= self._depth(n_groups) or self._skips(n_groups):
                break
            batch = batcher.next_step(now_s, n_groups)
            if batch is None:
                break
            self._send(batch)
        if fetched := batcher.to_fetch():
            self._on_room(self, fetched)

    def _depth(self, n_groups: int) -> int:
        if not self.batcher.has_prompts:
            return n_groups
        return max(n_groups, self._pacing.prompt_depth(self.batcher.limits.step_tokens))

    def _send(self, batch: MicroBatch) -> None:
        self.n_steps += 1
        step = _Step(batch, load_of(batch.rows, self._windows), self._events.now_s, len(self._in_flight) + 1)
        self._in_flight[batch.step] = step
        self._pass_stages(step, 0, self._events.now_s)

    def _pass_stages(self, step: _Step, stage: int, arrives_s: float) -> None:
        """Through the stages that lie on one host, then on to the next host, or back to the driver."""
        while True:
            start_s = max(arrives_s, self._stage_free_s[stage])
            seconds = self._times[stage].seconds(step.load)
            done_s = self._stage_free_s[stage] = start_s + seconds
            self.stage_busy_s[stage] += seconds
            step.seconds.append(seconds)
            step.queue_s += start_s - arrives_s
            if stage == len(self._hops):
                self._events.at(done_s + self._back_s, self._take_answer, step)
                return
            src, dst = self._ways[stage]
            if src != dst:
                self._events.at(done_s, self._cross, step, stage)
                return
            arrives_s = self._hand_on(step, stage, done_s)
            stage += 1

    def _hand_on(self, step: _Step, hop: int, at_s: float) -> float:
        """To another worker of the same host; when it arrives."""
        way = self._hops[hop]
        n_bytes = step.load.n_tokens * self._hidden_bytes
        self._hop_free_s[hop] = max(at_s, self._hop_free_s[hop]) + way.send_s(n_bytes)
        return self._hop_free_s[hop] + way.delay_s

    def _cross(self, step: _Step, hop: int) -> None:
        if self.is_dead:
            return
        arrives_s = self._network.send(self._ways[hop], step.load.n_tokens * self._hidden_bytes)
        self._pass_stages(step, hop + 1, arrives_s)

    def _take_answer(self, step: _Step) -> None:
        if self.is_dead:
            return
        now_s = self._events.now_s
        del self._in_flight[step.batch.step]
        emissions = self.batcher.complete(step.batch.step, [_DRAWN] * step.load.n_heads, now_s)
        self._send_steps()
        self._on_tokens(self, emissions, len(emissions))
        self._account(step, len(emissions))

    def _skips(self, n_groups: int) -> bool:
        """Do at once the rounds that lie ahead in which nothing but drawing happens; whether there are any.

        Their times are added up one by one; whatever else is to happen in the mesh comes after them.
        """
        if self._is_skipping:
            return True
        now_s, left_s = self._events.now_s, self._events.next_s - self._events.now_s
        if self._in_flight or n_groups > 1 or not self._is_on_one_host or self.batcher.has_prompts:
            return False
        if self.batcher.n_running > self.batcher.n_decoding or left_s < _WORTH_SKIPPING * self._round_s:
            return False
        n_rounds = self.batcher.steps_until_change()
        if n_rounds < _WORTH_SKIPPING:
            return False
        contexts = [len(sequence.tokens) for sequence in self.batcher.running]
        seconds, n_done = 0.0, 0
        while n_done < n_rounds:
            stages_s = self._round_stages_s(contexts, n_done)
            round_s = sum(stages_s) + self._hops_s(len(contexts))
            if seconds + round_s >= left_s:
                break
            seconds, n_done = seconds + round_s, n_done + 1
            for stage, stage_s in enumerate(stages_s):
                self.stage_busy_s[stage] += stage_s
        if n_done:
            self.n_steps += n_done
            self._is_skipping = True
            self._events.at(now_s + seconds, self._take_rounds, n_done)
        return n_done > 0

    def _round_stages_s(self, contexts: list[int], n_later: int) -> list[float]:
        load = decode_load(contexts, n_later, self._windows)
        return [times.seconds(load) for times in self._times]

    def _hops_s(self, n_tokens: int) -> float:
        """All ways of a step on one host."""
        n_bytes = n_tokens * self._hidden_bytes
        return sum(hop.send_s(n_bytes) + hop.delay_s for hop in self._hops) + self._back_s

    def _take_rounds(self, n_rounds: int) -> None:
        if self.is_dead:
            return
        self._is_skipping = False
        emissions = self.batcher.advance(n_rounds, TOKEN, self._events.now_s)
        self._send_steps()
        self._on_tokens(self, emissions, n_rounds * len(emissions))

    def _account(self, step: _Step, n_drawn: int) -> None:
        now_s = self._events.now_s
        self._round_s = now_s - step.sent_s
        self._drawn.append((now_s, n_drawn))
        self._pacing.observe(
            len(step.batch.rows),
            step.load.n_tokens,
            step.seconds,
            now_s - step.sent_s,
            step.n_in_flight,
            queue_s=step.queue_s,
        )

    def _tokens_per_s(self) -> float:
        while self._drawn and self._drawn[0][0] < self._events.now_s - RATE_WINDOW_S:
            self._drawn.popleft()
        return sum(n for _, n in self._drawn) / RATE_WINDOW_S
