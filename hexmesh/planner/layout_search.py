"""The layout of a team with the highest rate in a role: a search over batches around the kernel's `tightest`.

Prefill is one call: the least period at which the way of a prompt keeps its limit. Decoding has a batch b and a number
m of micro-batches to choose with the layout: X = b / C(m, b), and b is at most B / m where B is the room of the
layout's tightest stage. For one layout a larger batch is always better, so the best b is one of

    levels   B / m for the room B of some possible stage, or the cap
    limited  under a TPOT limit, the largest batch of any layout that turns around in time

For each m the levels are searched by halves: a range of batches is left out if even with the room and the seconds of
its smallest and the batch of its largest no layout beats the best rate known. Without the way around, more
micro-batches never help, so m rises until even that bound is beaten. Nothing is sampled, so the result is exact to
1e-10, as far as the graph has all orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from hexmesh.cluster import Role
from hexmesh.planner.layout_dp import Fit, Kernel
from hexmesh.planner.layout_tables import Floats, Step
from hexmesh.score.capacity import BATCH_CAP, MAX_MICRO_BATCHES
from hexmesh.workload.slo import Slo

_GAIN = 1 + 1e-10
"""A rate must be so much better to count as better."""
_BISECTIONS = 40


def fastest_prompts(kernel: Kernel, least_resident: float, slo: Slo) -> Fit | None:
    """The layout of the highest prefill rate."""
    limit_s = math.inf if slo.ttft_s is None else slo.ttft_s
    return kernel.tightest(Step("prefill"), least_resident, math.inf, math.inf, limit_s)


def fastest_tokens(kernel: Kernel, role: Role, levels: Floats, least_resident: float, slo: Slo) -> Fit | None:
    """The layout of the highest decode or mixed rate. `levels` are the rooms of all possible stages, rising."""
    limit_s = math.inf if slo.tpot_s is None else slo.tpot_s
    search = _TokenSearch(kernel, role, levels, least_resident, limit_s)
    search.run()
    return search.best


@dataclass(slots=True)
class _TokenSearch:
    """The best so far, and the search for better. `best` is the state."""

    kernel: Kernel
    role: Role
    levels: Floats
    least_resident: float
    limit_s: float
    best: Fit | None = None
    rate: float = 0.0
    """Tokens per second of `best`."""
    _batches: Floats = field(default_factory=lambda: np.zeros(0))
    _rooms: Floats = field(default_factory=lambda: np.zeros(0))

    def run(self) -> None:
        """Search all numbers of micro-batches."""
        if not self._cut_levels():
            return
        for n in range(1, min(MAX_MICRO_BATCHES, int(self.levels[-1])) + 1):
            self._set_batches(n)
            if not self._may_gain(n):
                return
            self._search_levels(n)
            if self.limit_s < math.inf:
                self._search_limited(n)

    def _cut_levels(self) -> bool:
        """Leave out levels that no layout has room for; False if none is left."""
        low, high = int(np.searchsorted(self.levels, 1.0)), len(self.levels)
        step = Step(self.role, 1.0)
        while low < high:  # levels below `low` are possible, from `high` on they are not
            middle = (low + high) // 2
            found = self.kernel.fit(step, self._room(self.levels[middle]), math.inf, math.inf)
            low, high = (low, middle) if found is None else (middle + 1, high)
        self.levels = self.levels[np.searchsorted(self.levels, 1.0) : high]
        return len(self.levels) > 0

    def _room(self, resident: float) -> float:
        """What a layout for so many sequences needs."""
        return max(resident, self.least_resident) if self.role == "mixed" else resident

    def _set_batches(self, n: int) -> None:
        """Batches that may be best with n micro-batches, and the room that each needs."""
        fits = self.levels[self.levels >= n]
        below = fits[fits < n * BATCH_CAP]
        is_capped = len(below) < len(fits)
        self._rooms = np.append(below, n * BATCH_CAP) if is_capped else below
        self._batches = np.append(below / n, BATCH_CAP) if is_capped else below / n

    def _may_gain(self, n: int) -> bool:
        """Whether n or more micro-batches may beat the best, by a bound that leaves out the way around.

        Under a limit of time the best batch need not be a level, so what lies between two counts, too.
        """
        is_limited = self.limit_s < math.inf
        batches, rooms = self._batches, self._rooms
        if is_limited:
            batches, rooms = np.append(1.0, batches), np.append(n, rooms)
        stack = [(0, len(batches) - 1)]
        while stack:
            low, high = stack.pop()
            ceiling_s = self._ceiling_s(batches[high], n)
            if self._fit(batches[low], rooms[low], ceiling_s, math.inf) is not None:
                if high - low <= is_limited:
                    return True
                middle = (low + high) // 2
                stack += [(low, middle), (middle + (not is_limited), high)]
        return False

    def _search_levels(self, n: int) -> None:
        stack = [(0, len(self._batches) - 1)]
        while stack:
            low, high = stack.pop()
            if low == high:
                self._take_tightest(low, n)
                continue
            ceiling_s = self._ceiling_s(self._batches[high], n)
            found = self._fit(self._batches[low], self._rooms[low], ceiling_s, n * ceiling_s)
            if found is not None:
                self._take(found, self._batches[low], n)
                middle = (low + high) // 2
                stack += [(low, middle), (middle + 1, high)]

    def _search_limited(self, n: int) -> None:
        """The largest batch that turns around within the limit, if that beats the best."""
        low = max(1.0, self.rate * _GAIN * self.limit_s / n)
        high = float(self._batches[-1])
        found = self._in_time(low, n) if low <= high else None
        if found is None:
            return
        self._take(found, low, n)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = self._in_time(middle, n)
            if found is None:
                high = middle
            else:
                low = middle
                self._take(found, low, n)

    def _in_time(self, batch: float, n: int) -> Fit | None:
        step = Step(self.role, batch)
        return self.kernel.fit(step, self._room(n * batch), self.limit_s / n, self.limit_s)

    def _take_tightest(self, at: int, n: int) -> None:
        batch = float(self._batches[at])
        ceiling_s = self._ceiling_s(batch, n)
        step = Step(self.role, batch)
        found = self.kernel.tightest(step, self._room(float(self._rooms[at])), n, ceiling_s, math.inf)
        if found is not None:
            self._take(found, batch, n)

    def _fit(self, batch: float, resident: float, slowest_s: float, around_s: float) -> Fit | None:
        step = Step(self.role, float(batch))
        return self.kernel.fit(step, self._room(float(resident)), slowest_s, around_s)

    def _take(self, found: Fit, batch: float, n: int) -> None:
        rate = batch / max(found.slowest_s, found.around_s / n)
        if rate > self.rate:
            self.best, self.rate = found, rate

    def _ceiling_s(self, batch: float, n: int) -> float:
        """The period that such a batch must stay within to beat the best."""
        to_gain_s = batch / (self.rate * _GAIN) if self.rate > 0 else math.inf
        return min(to_gain_s, self.limit_s / n)
