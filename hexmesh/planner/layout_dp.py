"""The layout of a team for a given step: dynamic programs over visits, devices taken and layers placed.

Two programs, both over (visit, devices of its pool taken, layers placed so far), with stages masked that have too
little room or take too long:

    furthest    the most layers that can be placed. A stage of fewer layers needs no more room and time, so being
                further is never worse, and one number a state will do. (Unless a pool must be visited because there
                is no way past it, and then has no layer left to take: where ways are missing, the other decides.)
    soonest     the least sum of stages and hops for each number of layers.

A slow hop is a stage, too: a way that takes longer than the period to send is masked. `tightest` bisects the period,
`fit` answers whether there is a layout within one.

HexGen's inner problem (its dynamic program over equal layers in a fixed order); differs: exact over orders, devices
left idle, unlike layers, embedding and head, and for the period and the way around together, which decide a rate.

This is the twin of `hexmesh/native/layout.c`, written for the eye: whole tables in numpy where the kernel has moving
windows. It answers where the kernel was not built, some hundred times slower.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hexmesh.planner.layout_graph import Graph
from hexmesh.planner.layout_tables import Floats, Option, Step, Tables
from hexmesh.score.pipeline import Hop

ROUNDING = 1e-11
"""Periods that differ by less are one."""
_WEIGHTS = 24
"""Of one limit against the other, tried where a layout must keep two."""
_PROMPT = Step("prefill")


@dataclass(frozen=True, slots=True)
class Placed:
    """A stage of a found layout."""

    visit: int
    tp: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A layout, by its own figures."""

    stages: tuple[Placed, ...]
    slowest_s: float
    """Of its stages and of what its hops send."""
    around_s: float
    """All stages and hops, and the way back."""
    room: float
    """Of its tightest stage, in sequences of mean context."""


_State = tuple[int, int]
"""(visit, devices of its pool taken)"""

Weighted = Sequence[tuple[Step, float]]
"""Steps, each with the weight of its way around in a sum."""


class Kernel(Protocol):
    """Layouts of one team. `resident` is the room that every stage needs, in sequences of mean context."""

    def fit(self, step: Step, resident: float, slowest_s: float, around_s: float) -> Fit | None:
        """Any layout within both limits."""
        ...

    def tightest(
        self, step: Step, resident: float, n_groups: float, period_s: float, around_s: float
    ) -> Fit | None:
        """The layout with the least max(slowest, around / n_groups), which must be within `period_s`."""
        ...

    def soonest(self, weighted: Weighted, resident: float) -> Fit | None:
        """The layout with the least weighted sum of ways around."""
        ...


class TwinKernel:
    """In Python. `options` names the tables' options by kind of device and TP degree."""

    def __init__(self, tables: Tables, graph: Graph, options: Sequence[dict[int, int]]) -> None:
        self._tables, self._graph = tables, graph
        self._options = [
            {tp: at for tp, at in options[found.kind].items() if tp <= found.n_devices}
            for found in graph.classes
        ]
        self._seconds = dict[Step, dict[int, Floats]]()

    def fit(self, step: Step, resident: float, slowest_s: float, around_s: float) -> Fit | None:
        """Any layout within both limits, and for "mixed" with the first token in time."""
        masked = _Masked(self, step, resident, slowest_s)
        found = masked.furthest()
        if found is not None and masked.is_in_time(found, around_s):
            return found
        if found is None and not masked.has_gaps:
            return None
        found = masked.soonest([(step, 1.0)])
        if found is None or found.around_s > around_s:
            return None
        return found if masked.is_in_time(found, around_s) else masked.both_in_time(around_s)

    def tightest(
        self, step: Step, resident: float, n_groups: float, period_s: float, around_s: float
    ) -> Fit | None:
        """By bisection, each time down to what the layout found really takes."""

        def within(period_s: float) -> Fit | None:
            return self.fit(step, resident, period_s, min(n_groups * period_s, around_s))

        best = within(period_s)
        if best is None:
            return None
        low, high = 0.0, max(best.slowest_s, best.around_s / n_groups)
        while high - low > ROUNDING * high:
            middle = (low + high) / 2
            found = within(middle)
            if found is None:
                low = middle
            else:
                best, high = found, max(found.slowest_s, found.around_s / n_groups)
        return best

    def soonest(self, weighted: Weighted, resident: float) -> Fit | None:
        """The layout with the least weighted sum of ways around."""
        return _Masked(self, weighted[-1][0], resident, math.inf).soonest(weighted)

    def options(self, visit: int) -> dict[int, int]:
        """The tables' options by TP degree, for the pool of a visit."""
        return self._options[self._graph.visits[visit].cls]

    def stage_s(self, step: Step) -> dict[int, Floats]:
        """Seconds of every cut, by option. Those of the last step and of prompts are kept."""
        if step not in self._seconds:
            self._seconds = {kept: times for kept, times in self._seconds.items() if kept == _PROMPT}
            used = {at for options in self._options for at in options.values()}
            tables = self._tables
            self._seconds[step] = {at: tables.stage_s(tables.options[at], step) for at in used}
        return self._seconds[step]

    @property
    def tables(self) -> Tables:
        return self._tables

    @property
    def graph(self) -> Graph:
        return self._graph


@dataclass(frozen=True, slots=True)
class _Came:
    """How a state got furthest: so many layers placed, by a stage of `tp` devices after another state."""

    stop: int
    state: _State | None
    tp: int


@dataclass(slots=True)
class _Sums:
    """Least seconds by layers placed, and how each came about: from which start and state, by how many devices."""

    least_s: Floats
    starts: npt.NDArray[np.int64]
    tps: npt.NDArray[np.int64]
    states: list[_State | None]

    @staticmethod
    def none(n_layers: int) -> _Sums:
        zeros = np.zeros(n_layers + 1, np.int64)
        return _Sums(np.full(n_layers + 1, math.inf), zeros, zeros.copy(), [None] * (n_layers + 1))

    def lower(self, least_s: Floats, state: _State | None, tp: int) -> None:
        """Take what is less, layers being as they were."""
        for stop in np.flatnonzero(least_s < self.least_s).tolist():
            self.least_s[stop], self.starts[stop] = least_s[stop], stop
            self.states[stop], self.tps[stop] = state, tp

    def extend(self, source: _Sums, hop_s: float, stage_s: Floats, state: _State | None, tp: int) -> None:
        """Take what is less with one more stage after `source`, which is an entry where `state` is None."""
        sums = source.least_s[:, None] + hop_s + stage_s  # (start, stop)
        starts = sums.argmin(axis=0)
        least_s = np.take_along_axis(sums, starts[None, :], axis=0)[0]
        for stop in np.flatnonzero(least_s < self.least_s).tolist():
            start = int(starts[stop])
            self.least_s[stop], self.starts[stop], self.tps[stop] = least_s[stop], start, tp
            self.states[stop] = source.states[start] if state is None else state


class _Masked:
    """One step's stages and hops, those left out that do not fit."""

    def __init__(self, kernel: TwinKernel, step: Step, resident: float, slowest_s: float) -> None:
        self._kernel, self._step, self._slowest_s = kernel, step, slowest_s
        self._graph, self._n_layers = kernel.graph, kernel.tables.n_layers
        self._payload_bytes = kernel.tables.payload_bytes(step)
        options = kernel.tables.options
        self._fits = {
            at: (options[at].room >= resident) & (seconds <= slowest_s)
            for at, seconds in kernel.stage_s(step).items()
        }

    @property
    def has_gaps(self) -> bool:
        """Whether some pools have no way to each other that is fast enough."""
        ways = (entry.hop for visit in self._graph.visits for entry in visit.entries)
        return not self._graph.is_complete or not all(map(self._may_send, ways))

    def furthest(self) -> Fit | None:
        """A layout that places all layers, if one can."""
        came = dict[_State, _Came]()
        stops = {at: _last_stops(fits) for at, fits in self._fits.items()}
        for at, visit in enumerate(self._graph.visits):
            furthest = self._n_layers if visit.back is not None else self._n_layers - 1  # others must end it
            begin = _Came(0, None, 0) if visit.is_first else None
            entered = [_Came(came[state].stop, state, 0) for state, _ in self._entered_from(at, came)]
            entry = max(entered, key=lambda one: one.stop, default=begin)
            for taken in range(1, self._n_devices(at) + 1):
                best: _Came | None = None
                for tp, option in self._kernel.options(at).items():
                    before = self._before(at, taken, tp, entry, came)
                    if before is None or before.stop >= self._n_layers:
                        continue
                    stop = min(int(stops[option][before.stop]), furthest)
                    if stop > max(before.stop, best.stop if best else 0):
                        best = _Came(stop, before.state, tp)
                if best is not None:
                    came[at, taken] = best
                    if best.stop == self._n_layers:
                        return self._fit(self._stages_to((at, taken), came))
        return None

    def _before(
        self, at: int, taken: int, tp: int, entry: _Came | None, came: Mapping[_State, _Came]
    ) -> _Came | None:
        """Where a stage of so many devices, the last of those taken, begins."""
        if tp == taken:
            return entry
        state = at, taken - tp
        if state not in came or not self._may_send(self._graph.inside):
            return None
        return _Came(came[state].stop, state, 0)

    def soonest(self, weighted: Weighted) -> Fit | None:
        """The layout with the least sum of stages and hops, each step's times its weight."""
        seconds, sums = self._weighted(weighted), dict[_State, _Sums]()
        inside_s = self._hop_s(self._graph.inside, weighted)
        n_weighted = sum(weight for _, weight in weighted)
        found: tuple[float, _State] | None = None
        alone: tuple[float, Placed] | None = None
        for at, visit in enumerate(self._graph.visits):
            entry = _Sums.none(self._n_layers)
            if visit.is_first:
                entry.least_s[0] = 0.0
            for state, hop in self._entered_from(at, sums):
                entry.lower(sums[state].least_s + self._hop_s(hop, weighted), state, 0)
            for taken in range(1, self._n_devices(at) + 1):
                row = sums[at, taken] = _Sums.none(self._n_layers)
                for tp, option in self._kernel.options(at).items():
                    if tp == taken:
                        row.extend(entry, 0.0, seconds[option], None, tp)
                        whole = Placed(at, tp, 0, self._n_layers)
                        if visit.is_first and (alone is None or seconds[option][0, -1] < alone[0]):
                            alone = float(seconds[option][0, -1]), whole
                    elif tp < taken and self._may_send(self._graph.inside):
                        row.extend(sums[at, taken - tp], inside_s, seconds[option], (at, taken - tp), tp)
                back_s = math.inf if visit.back is None else n_weighted * visit.back.delay_s
                total_s = float(row.least_s[-1]) + back_s
                if found is None or total_s < found[0]:
                    found = total_s, (at, taken)
        if alone is not None and alone[0] < math.inf and (found is None or alone[0] <= found[0]):
            return self._fit((alone[1],))
        if found is None or found[0] == math.inf:
            return None
        return self._fit(self._unwound(found[1], sums))

    def _unwound(self, last: _State, sums: Mapping[_State, _Sums]) -> tuple[Placed, ...]:
        stages, state, stop = list[Placed](), last, self._n_layers
        while stop > 0:
            row = sums[state]
            start, tp = int(row.starts[stop]), int(row.tps[stop])
            stages.append(Placed(state[0], tp, start, stop))
            state, stop = row.states[stop] or state, start
        return tuple(reversed(stages))

    def is_in_time(self, found: Fit, around_s: float) -> bool:
        """Whether a layout keeps the limit of the way around and, computing prompts too, that to the first token."""
        return found.around_s <= around_s and self._first_token_s(found) <= self._ttft_s

    def both_in_time(self, around_s: float) -> Fit | None:
        """The same, looking for the layout: the least weighted sum of both, for several weights.

        Not exact: a layout that keeps both limits and has for no weight the least sum is not found.
        """
        low, high = 0.0, 1.0
        found = self.soonest([(_PROMPT, 1.0)])
        if found is None or self._first_token_s(found) > self._ttft_s:
            return None
        for _ in range(_WEIGHTS):
            if self.is_in_time(found, around_s):
                return found
            weight = (low + high) / 2
            found = self.soonest([(self._step, (1 - weight) / around_s), (_PROMPT, weight / self._ttft_s)])
            assert found is not None
            if found.around_s <= around_s:
                low = weight
            else:
                high = weight
        return None

    @property
    def _ttft_s(self) -> float:
        limit_s = self._kernel.tables.capacities.workload.slo.ttft_s
        return math.inf if limit_s is None or self._step.role != "mixed" else limit_s

    def _first_token_s(self, found: Fit) -> float:
        if self._ttft_s == math.inf:
            return 0.0
        return _Masked(self._kernel, _PROMPT, 0.0, math.inf)._fit(found.stages).around_s

    def _weighted(self, weighted: Weighted) -> dict[int, Floats]:
        total = {at: np.where(fits, 0.0, np.inf) for at, fits in self._fits.items()}
        for step, weight in weighted:
            if weight:
                for at, seconds in self._kernel.stage_s(step).items():
                    total[at] = total[at] + weight * np.where(np.isfinite(seconds), seconds, 0.0)
        return total

    def _entered_from(self, at: int, known: Container[_State]) -> Iterator[tuple[_State, Hop]]:
        """States that the visit can be entered from, and over what."""
        for entry in self._graph.visits[at].entries:
            if self._may_send(entry.hop):
                for taken in range(1, self._n_devices(entry.visit) + 1):
                    if (entry.visit, taken) in known:
                        yield (entry.visit, taken), entry.hop

    def _n_devices(self, visit: int) -> int:
        return self._graph.classes[self._graph.visits[visit].cls].n_devices

    def _may_send(self, hop: Hop) -> bool:
        return hop.send_s(self._payload_bytes) <= self._slowest_s

    def _hop_s(self, hop: Hop, weighted: Weighted) -> float:
        payload_bytes = self._kernel.tables.payload_bytes
        return sum(weight * (hop.delay_s + hop.send_s(payload_bytes(step))) for step, weight in weighted)

    def _stages_to(self, last: _State, came: Mapping[_State, _Came]) -> tuple[Placed, ...]:
        stages, state = list[Placed](), last
        while True:
            one = came[state]
            start = 0 if one.state is None else came[one.state].stop
            stages.append(Placed(state[0], one.tp, start, one.stop))
            if one.state is None:
                return tuple(reversed(stages))
            state = one.state

    def _fit(self, stages: tuple[Placed, ...]) -> Fit:
        """A layout's own figures."""
        visits, seconds = self._graph.visits, self._kernel.stage_s(self._step)
        steps = [
            float(seconds[self._kernel.options(one.visit)[one.tp]][one.start, one.stop]) for one in stages
        ]
        hops = list(self._hops(stages))
        sends = [hop.send_s(self._payload_bytes) for hop in hops]
        around_s = sum(steps) + sum(sends) + sum(hop.delay_s for hop in hops)
        back = visits[stages[-1].visit].back
        if len(stages) > 1:
            assert back is not None
            around_s += back.delay_s
        room = min(self._option(one).room[one.start, one.stop] for one in stages)
        return Fit(stages=stages, slowest_s=max(*steps, *sends, 0.0), around_s=around_s, room=float(room))

    def _option(self, stage: Placed) -> Option:
        return self._kernel.tables.options[self._kernel.options(stage.visit)[stage.tp]]

    def _hops(self, stages: Sequence[Placed]) -> Iterator[Hop]:
        for before, after in pairwise(stages):
            if before.visit == after.visit:
                yield self._graph.inside
            else:
                entries = self._graph.visits[after.visit].entries
                yield next(entry.hop for entry in entries if entry.visit == before.visit)


def _last_stops(fits: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """By start, the last stop of a stage that fits; -1 if none does."""
    n_ends = fits.shape[1]
    last = n_ends - 1 - fits[:, ::-1].argmax(axis=1)
    return np.where(fits.any(axis=1), last, -1)
