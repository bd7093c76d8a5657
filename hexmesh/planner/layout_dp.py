"""The layout of a team for a given step: dynamic programs over visits, devices taken and layers placed.

Two programs, both over (visit, devices of its pool taken, layers placed so far), with stages masked that have too
little room or take too long:

    furthest    the most layers that can be placed. A stage of fewer layers needs no more room and time, so being
                further is never worse, and one number a state will do.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from hexmesh.planner.layout_graph import Graph
from hexmesh.planner.layout_tables import Floats, Step, Tables
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
    """All stages and hops, and the way back where tokens return."""


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
        if found is None or masked.is_in_time(found, around_s):
            return found
        found = masked.soonest([(step, 1.0)])
        assert found is not None
        if found.around_s > around_s:
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

    def furthest(self) -> Fit | None:
        """A layout that places all layers, if one can."""
        n_layers, came = self._n_layers, dict[tuple[int, int], tuple[tuple[int, int] | None, int, int]]()
        stops = {at: _last_stops(fits) for at, fits in self._fits.items()}
        for at, visit in enumerate(self._graph.visits):
            furthest = n_layers if visit.back is not None else n_layers - 1  # others must end it
            start: tuple[int, tuple[int, int] | None] = (0, None) if visit.is_first else (-1, None)
            for state in self._states_before(at, came):
                start = max(start, (came[state][2], state), key=lambda one: one[0])
            for taken in range(1, self._n_devices(at) + 1):
                best = (-1, 0, None)  # layers, tp, state before
                for tp, option in self._kernel.options(at).items():
                    before = (at, taken - tp)
                    if tp == taken:
                        placed, state = start
                    elif tp < taken and before in came and self._may_send(self._graph.inside):
                        placed, state = came[before][2], before
                    else:
                        continue
                    stop = min(int(stops[option][placed]), furthest) if placed >= 0 else -1
                    if stop > max(placed, best[0]):
                        best = (stop, tp, state)
                if best[0] > 0:
                    came[at, taken] = (best[2], best[1], best[0])
                if best[0] == n_layers:
                    return self._fit(self._stages_to((at, taken), came))
        return None

    def soonest(self, weighted: Weighted) -> Fit | None:
        """The layout with the least sum of stages and hops, each step's times its weight."""
        seconds = self._weighted(weighted)
        n_ends = self._n_layers + 1
        sums = dict[tuple[int, int], Floats]()
        came = dict[tuple[int, int, int], tuple[tuple[int, int] | None, int, int]]()
        best, last = math.inf, (0, 0)
        alone: tuple[float, int, int] = (math.inf, 0, 0)
        for at, visit in enumerate(self._graph.visits):
            entry, entered = np.full(n_ends, math.inf), np.zeros(n_ends, int)
            states = list(self._states_before(at, sums))
            if visit.is_first:
                entry[0] = 0.0
            for index, state in enumerate(states):
                hop = next(entry.hop for entry in visit.entries if entry.visit == state[0])
                reached = sums[state] + self._hop_s(hop, weighted)
                entered = np.where(reached < entry, index, entered)
                entry = np.minimum(entry, reached)
            inside_s = self._hop_s(self._graph.inside, weighted)
            for taken in range(1, self._n_devices(at) + 1):
                total = np.full(n_ends, math.inf)
                for tp, option in self._kernel.options(at).items():
                    if tp == taken:
                        before = entry
                    elif (at, taken - tp) in sums and self._may_send(self._graph.inside):
                        before = sums[at, taken - tp] + inside_s
                    else:
                        continue
                    reached = before[:, None] + seconds[option]
                    starts = reached.argmin(axis=0)
                    reached = reached[starts, np.arange(n_ends)]
                    for stop in np.flatnonzero(reached < total):
                        start = int(starts[stop])
                        state = (at, taken - tp) if tp < taken else None
                        if tp == taken and not visit.is_first:
                            state = states[entered[start]]
                        came[at, taken, int(stop)] = (state, tp, start)
                    total = np.minimum(total, reached)
                    if visit.is_first and tp == taken and seconds[option][0, -1] < alone[0]:
                        alone = (float(seconds[option][0, -1]), at, tp)
                sums[at, taken] = total
                back_s = math.inf if visit.back is None else self._back_s(visit.back, weighted)
                if total[-1] + back_s < best:
                    best, last = float(total[-1] + back_s), (at, taken)
        if alone[0] <= best and alone[0] < math.inf:
            return self._fit((Placed(alone[1], alone[2], 0, self._n_layers),))
        if best == math.inf:
            return None
        found, state, stop = list[Placed](), last, self._n_layers
        while state is not None:
            before_state, tp, start = came[*state, stop]
            found.append(Placed(state[0], tp, start, stop))
            state, stop = before_state, start
        return self._fit(tuple(reversed(found)))

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

    def _states_before(self, at: int, known: dict[tuple[int, int], object]) -> Iterator[tuple[int, int]]:
        """States that the visit can be entered from."""
        for entry in self._graph.visits[at].entries:
            if self._may_send(entry.hop):
                for taken in range(1, self._n_devices(entry.visit) + 1):
                    if (entry.visit, taken) in known:
                        yield entry.visit, taken

    def _n_devices(self, visit: int) -> int:
        return self._graph.classes[self._graph.visits[visit].cls].n_devices

    def _may_send(self, hop: Hop) -> bool:
        return hop.send_s(self._payload_bytes) <= self._slowest_s

    def _hop_s(self, hop: Hop, weighted: Weighted) -> float:
        payload_bytes = self._kernel.tables.payload_bytes
        return sum(weight * (hop.delay_s + hop.send_s(payload_bytes(step))) for step, weight in weighted)

    def _back_s(self, hop: Hop, weighted: Weighted) -> float:
        return sum(weight * hop.delay_s for step, weight in weighted if step.role != "prefill")

    def _stages_to(
        self, last: tuple[int, int], came: dict[tuple[int, int], tuple[tuple[int, int] | None, int, int]]
    ) -> tuple[Placed, ...]:
        found, state = list[Placed](), last
        while True:
            before, tp, stop = came[state]
            start = 0 if before is None else came[before][2]
            found.append(Placed(state[0], tp, start, stop))
            if before is None:
                return tuple(reversed(found))
            state = before

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
        if len(stages) > 1 and self._step.role != "prefill":
            assert back is not None
            around_s += back.delay_s
        return Fit(stages=stages, slowest_s=max(*steps, *sends, 0.0), around_s=around_s)

    def _hops(self, stages: Sequence[Placed]) -> Iterator[Hop]:
        for before, after in pairwise(stages):
            if before.visit == after.visit:
                yield self._graph.inside
            else:
                entries = self._graph.visits[after.visit].entries
                yield next(entry.hop for entry in entries if entry.visit == before.visit)


def _last_stops(fits: np.ndarray) -> np.ndarray:
    """By start, the last stop of a stage that fits; -1 if none does."""
    n_ends = fits.shape[1]
    last = n_ends - 1 - fits[:, ::-1].argmax(axis=1)
    return np.where(fits.any(axis=1), last, -1)
