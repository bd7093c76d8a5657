"""Rates of many layouts at once, all of one number of stages. The figures of `hexmesh.score.capacity`, in numpy.

Exhaustive search rates tens of thousands of layouts; one by one that would take minutes. A test compares each figure
with `Capacities`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hexmesh.plan import DTYPE_BYTES
from hexmesh.planner.layout_tables import Step, Tables
from hexmesh.score.capacity import BATCH_CAP, MAX_MICRO_BATCHES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]
_BISECTIONS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """N layouts of k stages."""

    options: Ints
    """(N, k): each stage's group, as an index into the tables' options."""
    cuts: Ints
    """(N, k + 1): 0, where layers go over to the next stage, and the number of layers."""
    send_s: Floats
    """(N, k - 1): of a byte over each hop."""
    delay_s: Floats
    """(N,): of all hops."""
    back_s: Floats
    """(N,): delay of the way from the last stage to the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of N layouts; 0 where one does not fit or breaks a limit. The arrays are (N,) but for `uses`."""

    prefill: Floats
    decode: Floats
    mixed: Floats
    """Balanced."""
    uses: Floats
    """(N, 2 k, 2), as `Mixed.uses`; only where `mixed` is not 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Coefficients of layouts' steps, (rows, k) or (kinds of layer, rows, k); b sequences decode in a step.

    Of a kind's layers in a stage: max(read - spared gone^b + b kept, b counted) and b slope beside it.
    """

    read: Floats
    spared: Floats
    gone: Floats
    """(kinds, 1, 1)"""
    kept: Floats
    counted: Floats
    fixed: Floats
    slope: Floats
    head_read: Floats
    head_counted: Floats
    send: Floats
    """(rows, k - 1)"""
    around: Floats
    """(rows,)"""

    def of(self, rows: Ints | npt.NDArray[np.bool_]) -> _Steps:
        """Some of the layouts."""
        return _Steps(
            read=self.read[:, rows],
            spared=self.spared[:, rows],
            gone=self.gone,
            kept=self.kept[:, rows],
            counted=self.counted[:, rows],
            fixed=self.fixed[rows],
            slope=self.slope[rows],
            head_read=self.head_read[rows],
            head_counted=self.head_counted[rows],
            send=self.send[rows],
            around=self.around[rows],
        )

    def stages_s(self, batch: Floats) -> Floats:
        """(rows, k)"""
        b = batch[:, None]
        found = self.fixed + b * self.slope
        for kind in range(len(self.read)):
            memory = self.read[kind] + b * self.kept[kind]
            if self.gone[kind, 0, 0] > 0:
                memory = memory - self.spared[kind] * self.gone[kind] ** b
            found += np.maximum(memory, b * self.counted[kind])
        found[:, -1] += np.maximum(self.head_read, batch * self.head_counted)
        return found

    def period_s(self, batch: Floats, n: Ints) -> Floats:
        """(rows,): of a micro-batch, where n go round."""
        steps, sends = self.stages_s(batch), batch[:, None] * self.send
        around_s = steps.sum(axis=1) + sends.sum(axis=1) + self.around
        longest = np.maximum(steps.max(axis=1), sends.max(axis=1, initial=0.0))
        found: Floats = np.maximum(longest, around_s / n)
        return found


class RatesOfMany:
    """For one model, workload and set of groups."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._prompt_s = np.stack([tables.stage_s(option, Step("prefill")) for option in tables.options])
        self._room = np.stack([option.room for option in tables.options])
        kinds = np.arange(len(tables.layer_kinds))[:, None] == tables.kind_of_layer[None, :]
        self._before = np.concatenate([np.zeros((len(kinds), 1)), np.cumsum(kinds, axis=1)], axis=1)

    def fits(self, options: Sequence[int], cuts: Ints) -> npt.NDArray[np.bool_]:
        """(N,): whether layers of one sequence, cut so, have room; `cuts` is (N, k + 1)."""
        room: Floats = self._room[list(options), cuts[:, :-1], cuts[:, 1:]]
        return np.asarray(room.min(axis=1) > 0)

    def rates(self, batch: Batch) -> Rates:
        """Of every layout."""
        capacities = self._tables.capacities
        prompt, output = capacities.workload.prompt_tokens, capacities.workload.output_tokens
        starts, stops = batch.cuts[:, :-1], batch.cuts[:, 1:]
        prompt_s = self._prompt_s[batch.options, starts, stops]
        resident = self._room[batch.options, starts, stops].min(axis=1)
        tokens = self._steps(batch, 1.0)
        both = self._steps(batch, 1.0 + prompt / output)
        both = replace(both, slope=both.slope + prompt_s / output)
        decode, _, _ = self._fastest(tokens, resident)
        mixed, sequences, n = self._fastest(both, resident)
        return Rates(
            prefill=self._prefill(batch, prompt_s, resident),
            decode=decode,
            mixed=mixed,
            uses=self._uses(batch, tokens, prompt_s, np.maximum(sequences, 1.0), n),
        )

    def _prefill(self, batch: Batch, prompt_s: Floats, resident: Floats) -> Floats:
        capacities = self._tables.capacities
        sends = batch.send_s * (capacities.workload.prompt_tokens * capacities.model.hidden_bytes)
        latency_s = prompt_s.sum(axis=1) + sends.sum(axis=1) + batch.delay_s + batch.back_s
        limit_s = capacities.workload.slo.ttft_s
        slowest = np.maximum(prompt_s.max(axis=1), sends.max(axis=1, initial=0.0))
        holds = resident >= self._tables.least_resident * (1 - 1e-11)
        in_time = latency_s <= (np.inf if limit_s is None else limit_s)
        return np.where(holds & in_time, 1 / slowest, 0.0)

    @cached_property
    def _coefficients(self) -> dict[str, Floats]:
        """By (kind of layer, option), of one layer; the last three by option."""
        capacities, options = self._tables.capacities, self._tables.options
        spec, itemsize = capacities.costs.spec, DTYPE_BYTES[capacities.costs.dtype]
        shape = len(self._tables.layer_kinds), len(options)
        found = {name: np.zeros(shape) for name in ("read", "spared", "kept", "counted", "fixed", "slope")}
        steps = {name: np.zeros(len(options)) for name in ("step", "head_read", "head_counted")}
        hidden, params = capacities.model.hidden_bytes, spec.head_matmul_params
        for at, option in enumerate(options):
            group, device = option.group, option.group.device
            byte_s, flop_s = itemsize / device.bytes_per_s, 1 / group.tp / device.flops_per_s
            still_s = group.all_reduces_s(0.0)
            for kind, layer in enumerate(self._tables.layer_kinds):
                seen = layer.seen_tokens(capacities.workload.mean_context)
                found["read"][kind, at] = layer.params / group.tp * byte_s
                found["spared"][kind, at] = layer.n_experts * layer.expert_params / group.tp * byte_s
                found["kept"][kind, at] = seen * spec.kv_values_per_rank(group.tp) * byte_s
                found["counted"][kind, at] = (
                    layer.flops_per_token + seen * spec.decode_attention_flops
                ) * flop_s
                found["fixed"][kind, at] = still_s + group.launch_s
                found["slope"][kind, at] = group.all_reduces_s(hidden) - still_s + device.row_s
            steps["step"][at] = group.step_s
            steps["head_read"][at] = params * byte_s / group.tp
            steps["head_counted"][at] = 2 * params * flop_s
        return found | steps

    def _steps(self, batch: Batch, tokens: float) -> _Steps:
        """`tokens` cross a hop for each sequence."""
        capacities, own = self._tables.capacities, self._coefficients
        n_layers = np.diff(self._before[:, batch.cuts], axis=2)  # (kinds, N, k)
        last = batch.options[:, -1]

        def of_stage(name: str) -> Floats:
            found: Floats = own[name][:, batch.options] * n_layers
            return found

        gone = [
            1.0 - layer.n_active_experts / layer.n_experts if layer.n_experts else 0.0
            for layer in self._tables.layer_kinds
        ]
        return _Steps(
            read=of_stage("read"),
            spared=of_stage("spared"),
            gone=np.array(gone)[:, None, None],
            kept=of_stage("kept"),
            counted=of_stage("counted"),
            fixed=of_stage("fixed").sum(axis=0) + own["step"][batch.options],
            slope=of_stage("slope").sum(axis=0),
            head_read=own["head_read"][last],
            head_counted=own["head_counted"][last],
            send=batch.send_s * (tokens * capacities.model.hidden_bytes),
            around=batch.delay_s + batch.back_s,
        )

    def _fastest(self, steps: _Steps, resident: Floats) -> tuple[Floats, Floats, Ints]:
        """Highest rate in requests/s of each, its batch and number of micro-batches."""
        most = np.clip(np.floor(resident), 0, MAX_MICRO_BATCHES).astype(np.intp)
        rows = np.repeat(np.arange(len(most)), most)
        n = np.arange(len(rows)) - np.repeat(np.cumsum(most) - most, most) + 1
        batch = np.minimum(resident[rows] / n, BATCH_CAP)
        asked = steps.of(rows)
        period_s = asked.period_s(batch, n)
        limit_s = self._tables.capacities.workload.slo.tpot_s
        if limit_s is not None:
            late = np.flatnonzero(n * period_s > limit_s)
            batch[late] = _in_time(asked.of(late), batch[late], n[late], limit_s)
            period_s[late] = asked.of(late).period_s(batch[late], n[late])
        rates, batches = (np.zeros((len(most), MAX_MICRO_BATCHES)) for _ in range(2))
        rates[rows, n - 1], batches[rows, n - 1] = batch / period_s, batch
        every, at = np.arange(len(most)), rates.argmax(axis=1)
        return rates[every, at] / self._tables.capacities.workload.output_tokens, batches[every, at], at + 1

    def _uses(self, batch: Batch, tokens: _Steps, prompt_s: Floats, sequences: Floats, n: Ints) -> Floats:
        workload, hidden = self._tables.capacities.workload, self._tables.capacities.model.hidden_bytes
        prompt, output = workload.prompt_tokens, workload.output_tokens
        stages = np.stack([prompt_s, tokens.stages_s(sequences) * (output / sequences)[:, None]], axis=2)
        sends = np.stack([batch.send_s * (prompt * hidden), batch.send_s * (output * hidden)], axis=2)
        parts = np.concatenate([stages, sends], axis=1)
        trip = parts.sum(axis=1)
        trip[:, 1] += tokens.around * output / sequences
        return np.concatenate([parts, (trip / n[:, None])[:, None, :]], axis=1)


def _in_time(steps: _Steps, most: Floats, n: Ints, limit_s: float) -> Floats:
    """The largest batches whose round of n keeps the limit, all below `most`; 0 where not even 1 does."""
    low, high = np.ones(len(most)), most
    is_possible = n * steps.period_s(low, n) <= limit_s
    left, n = steps.of(is_possible), n[is_possible]
    low, high = low[is_possible], high[is_possible]
    for _ in range(_BISECTIONS if len(n) else 0):
        middle = (low + high) / 2
        is_in_time = n * left.period_s(middle, n) <= limit_s
        low, high = np.where(is_in_time, middle, low), np.where(is_in_time, high, middle)
    found = np.zeros(len(most))
    found[is_possible] = low
    return found
