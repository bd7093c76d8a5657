"""Rates of one replica in steady state, in closed form.

Symbols: stage j has l layers on t devices; a its time for a layer (`hexmesh.roofline`), tau = l a; s and o mean prompt
and output tokens, ctx the mean context of what decodes (`hexmesh.workload.lengths`); m micro-batches of b sequences.

    prefill   P = 1 / max over stages and hops; latency: the sum of stages, hops and way back
    resident  B = min over stages of (memory - weights - workspace) / (KV of one sequence at ctx)
    decode    C(m) = max(slowest stage or hop, (all stages + all hops + way back) / m), b = min(B / m, cap)
              X = max over m of b / C(m) tokens/s; TPOT = m C(m)
    mixed     as decode, with the prompts' share added to each step: a + (b / o) a of a prompt, and in each hop

C(m) is the bubble of a closed pipeline with m jobs: exact for equal steps. A slow hop is a stage: it sends one thing at
a time. Under a TPOT limit the best b may be set by the limit instead of memory, so for each m it is searched.
After HexGen-2 (replica capacity from the best TP and PP strategy); differs: prefill is as fast as it can be under the
TTFT limit, not as soon as it can be, and decode batches are limited by memory, at the mean context.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from hexmesh.cost import CostModel
from hexmesh.model_spec import LayerSpec
from hexmesh.roofline import Roofline
from hexmesh.score.pipeline import Pipeline, Seat
from hexmesh.workload import Workload

BATCH_CAP = 256
MAX_MICRO_BATCHES = 32
PROMPTS_IN_FLIGHT = 2
"""Prompts whose KV a prefill stage holds: one that it computes, one that is handed over."""
BISECTIONS = 40
"""For a batch that a limit of time allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Prompts alone."""

    requests_per_s: float
    latency_s: float
    """Of one prompt through an idle pipeline and its token back to the first stage: the least TTFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Output tokens alone, their KV being at hand."""

    tokens_per_s: float
    requests_per_s: float
    batch: float
    """Sequences of one micro-batch, b."""
    micro_batches: int
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Prompts and outputs of the same requests, balanced."""

    requests_per_s: float
    batch: float
    micro_batches: int
    tpot_s: float
    uses: tuple[tuple[float, float], ...]
    """Of every stage, every hop and the round trip: seconds for a prompt and for an output, at this batch. With x
    prompts and y outputs a second, x times the first and y times the second must not exceed 1 for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """What a replica's KV pools must hold and may hold, beside what its memory says."""

    least_tokens: int = 0
    """Every stage has room for one sequence of this length."""
    most_sequences: float = math.inf
    """As many as are run at once."""
    prompts: int = PROMPTS_IN_FLIGHT


@dataclass(frozen=True, slots=True)
class _Step:
    """What one step of b sequences is made of."""

    seconds: Callable[[Seat, float], float]
    """Of a stage, by b."""
    tokens: float
    """That cross a hop, for each of the b."""


@dataclass(frozen=True)
class Capacities:
    """Rates of any pipeline for one model and workload. A rate of 0 means that it does not fit, or breaks the limit."""

    costs: CostModel
    workload: Workload
    residency: Residency = Residency()

    @cached_property
    def model(self) -> Roofline:
        return Roofline(self.costs.spec, self.costs.dtype)

    def prefill(self, pipeline: Pipeline) -> Prefill:
        """Rate and latency of prompts of the mean length."""
        prompt = self.workload.prompt_tokens
        payload = prompt * self.model.hidden_bytes
        steps = [self._prefill_s(seat) for seat in pipeline.seats]
        sends = [hop.send_s(payload) for hop in pipeline.hops]
        latency_s = sum(steps) + sum(sends) + _delays_s(pipeline)
        limit_s = self.workload.slo.ttft_s
        least_tokens = max(self.residency.prompts * prompt, self.residency.least_tokens)
        fits = all(self._free_bytes(seat) >= self._kv_bytes(seat, least_tokens) for seat in pipeline.seats)
        is_in_time = limit_s is None or latency_s <= limit_s
        rate = 1 / max(*steps, *sends, 0.0) if fits and is_in_time else 0.0
        return Prefill(requests_per_s=rate, latency_s=latency_s)

    def resident(self, pipeline: Pipeline) -> float:
        """Sequences of mean context that all stages have room for; 0 if one long sequence is too much."""
        context = self.workload.mean_context
        if not all(
            self._free_bytes(seat) >= self._kv_bytes(seat, self.residency.least_tokens)
            for seat in pipeline.seats
        ):
            return 0.0
        room = min(
            max(0.0, self._free_bytes(seat)) / self._kv_bytes(seat, context) for seat in pipeline.seats
        )
        return min(room, self.residency.most_sequences)

    def decode(self, pipeline: Pipeline) -> Decode:
        """The best number and size of micro-batches for output tokens alone."""
        batch, n, period_s = self._best(pipeline, _Step(self.step_s, 1.0))
        rate = batch / period_s
        return Decode(
            tokens_per_s=rate,
            requests_per_s=rate / self.workload.output_tokens,
            batch=batch,
            micro_batches=n,
            tpot_s=n * period_s,
        )

    def mixed(self, pipeline: Pipeline) -> Mixed:
        """The same when every sequence's prompt is computed here, too, a share of it in each step."""
        output = self.workload.output_tokens
        batch, n, period_s = self._best(pipeline, self._mixed_step)
        return Mixed(
            requests_per_s=batch / period_s / output,
            batch=batch,
            micro_batches=n,
            tpot_s=n * period_s,
            uses=tuple(self.uses(pipeline, batch, n)) if batch > 0 else (),
        )

    def tpot_at(self, pipeline: Pipeline, requests_per_s: float, *, computes_prompts: bool) -> float:
        """Mean time between tokens at a rate below the highest: of the fewest sequences at once that reach it.

        Infinite where the rate is out of reach.
        """
        step = self._mixed_step if computes_prompts else _Step(self.step_s, 1.0)
        tokens_per_s = requests_per_s * self.workload.output_tokens

        def shortest_s(n_sequences: float) -> float:
            groups = range(1, min(MAX_MICRO_BATCHES, int(n_sequences)) + 1)
            return min(n * self._period_s(pipeline, step, n_sequences / n, n) for n in groups)

        low, high = 1.0, min(self.resident(pipeline), float(MAX_MICRO_BATCHES * BATCH_CAP))
        if high < 1.0 or high / shortest_s(high) < tokens_per_s:
            return math.inf
        if low / shortest_s(low) >= tokens_per_s:
            return shortest_s(low)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_enough = middle / shortest_s(middle) >= tokens_per_s
            low, high = (low, middle) if is_enough else (middle, high)
        return shortest_s(high)

    @cached_property
    def _mixed_step(self) -> _Step:
        output = self.workload.output_tokens

        def step_s(seat: Seat, batch: float) -> float:
            return self.step_s(seat, batch) + batch / output * self._prefill_s(seat)

        return _Step(step_s, 1.0 + self.workload.prompt_tokens / output)

    def token_alone_s(self, pipeline: Pipeline) -> float:
        """Seconds of an output token when its request is alone."""
        return self._period_s(pipeline, _Step(self.step_s, 1.0), 1.0, 1)

    def uses(self, pipeline: Pipeline, batch: float, n: int) -> Iterator[tuple[float, float]]:
        """As in `Mixed`, with n micro-batches of that size."""
        prompt, output = self.workload.prompt_tokens, self.workload.output_tokens
        prompts = [self._prefill_s(seat) for seat in pipeline.seats]
        outputs = [self.step_s(seat, batch) * output / batch for seat in pipeline.seats]
        token_s = [hop.send_s(self.model.hidden_bytes) for hop in pipeline.hops]
        sends = [(prompt * send_s, output * send_s) for send_s in token_s]
        yield from zip(prompts, outputs, strict=True)
        yield from sends
        delays_s = _delays_s(pipeline)
        yield (
            (sum(prompts) + sum(there for there, _ in sends)) / n,
            (sum(outputs) + sum(back for _, back in sends) + delays_s * output / batch) / n,
        )

    def _best(self, pipeline: Pipeline, step: _Step) -> tuple[float, int, float]:
        """(b, m, C) of the highest rate within the TPOT limit; b is 0 if there is none."""
        resident = self.resident(pipeline)
        found = [
            (batch, n, self._period_s(pipeline, step, batch, n))
            for n in range(1, min(MAX_MICRO_BATCHES, int(resident)) + 1)
            for batch in self._batches(pipeline, step, min(resident / n, BATCH_CAP), n)
        ]
        return max(found, key=lambda one: one[0] / one[2], default=(0.0, 1, 1.0))

    def _batches(self, pipeline: Pipeline, step: _Step, most: float, n: int) -> Iterator[float]:
        """The largest batch that memory and the limit allow."""
        limit_s = self.workload.slo.tpot_s

        def is_in_time(batch: float) -> bool:
            return limit_s is None or n * self._period_s(pipeline, step, batch, n) <= limit_s

        if is_in_time(most):
            yield most
        elif is_in_time(1.0):
            low, high = 1.0, most
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if is_in_time(middle) else (low, middle)
            yield low

    def _period_s(self, pipeline: Pipeline, step: _Step, batch: float, n: int) -> float:
        payload = batch * step.tokens * self.model.hidden_bytes
        steps = [step.seconds(seat, batch) for seat in pipeline.seats]
        sends = [hop.send_s(payload) for hop in pipeline.hops]
        around_s = sum(steps) + sum(sends) + _delays_s(pipeline)
        return max(*steps, *sends, around_s / n)

    def _prefill_s(self, seat: Seat) -> float:
        prompt = self.workload.prompt_tokens
        layers = self._kinds(seat)
        total_s = sum(n * self.model.prefill_layer_s(seat.group, layer, prompt) for layer, n in layers)
        return total_s + seat.group.step_s + self._head_s(seat, 1)

    def step_s(self, seat: Seat, batch: float) -> float:
        """A stage's time for a step in which `batch` sequences decode."""
        context = self.workload.mean_context
        layers = self._kinds(seat)
        total_s = sum(n * self.model.decode_layer_s(seat.group, layer, batch, context) for layer, n in layers)
        return total_s + seat.group.step_s + self._head_s(seat, batch)

    def _kinds(self, seat: Seat) -> list[tuple[LayerSpec, int]]:
        """The stage's layers, like ones together."""
        return self._kinds_of_cut(seat.start, seat.stop)

    @cached_property
    def _kinds_of_cut(self) -> Callable[[int, int], list[tuple[LayerSpec, int]]]:
        layers = self.costs.spec.layers
        return cache(lambda start, stop: list(Counter(layers[start:stop]).items()))

    def _head_s(self, seat: Seat, n_tokens: float) -> float:
        is_last = seat.stop == self.costs.spec.n_layers
        return self.model.head_s(seat.group, n_tokens) if is_last else 0.0

    def _free_bytes(self, seat: Seat) -> float:
        """Of each device of the group, beside weights and workspace."""
        return seat.group.device.budget_bytes - self.costs.fixed_bytes(seat.start, seat.stop, seat.group.tp)

    def _kv_bytes(self, seat: Seat, n_tokens: float) -> float:
        """On each device of the group."""
        n_layers, group = seat.stop - seat.start, seat.group
        per_block = self.costs.block_bytes(n_layers, group.device.kind, group.tp)
        return n_tokens * per_block / self.costs.block_tokens


def _delays_s(pipeline: Pipeline) -> float:
    """Of all hops and the way back."""
    return sum(hop.delay_s for hop in pipeline.hops) + pipeline.back.delay_s
