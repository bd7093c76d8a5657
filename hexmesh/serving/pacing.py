"""How many micro-batches to keep in flight, so that neither the slowest stage nor the network idles.

With n sequences in g groups of b = n / g, a round (one token for each sequence) takes
    max(g * slowest stage's time for b rows, all stages' time for b rows + network part of a round trip)
and the fewest groups are wanted of those that make it nearly shortest. What a stage needs for b rows is learnt from
recent steps, by size class, and fitted locally by a line; the network part is what a round trip takes beyond the
stages' time, where steps queue least. Now and then a few steps are sent with half or twice the groups, so that other
sizes, and an emptier pipeline, are seen as well.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

MAX_GROUPS = 32
"""As many steps as may wait at one stage."""
_N_RECENT = 15
"""Observations that a median is taken over."""
_STALE_STEPS = 2000
_REFIT_STEPS = 16
_PROBE_EVERY_STEPS = 256
_NEARLY = 0.01
"""Rounds that differ by less count as equally long."""
_KEPT = 0.03
"""The number of groups is changed for no smaller gain than this."""
_REACH = 1.5
"""How far a size class bears on the fit at another size, in powers of two."""
_FIXED_SHARE = 0.5
"""Of a step's time, taken not to depend on its size while only one size was seen."""


class StageTimes:
    """What one stage needs for a step, by its number of tokens; part of `Pacing`."""

    def __init__(self, planned_tokens: int, planned_s: float) -> None:
        self._planned = (float(max(1, planned_tokens)), planned_s)
        self._recent: dict[int, deque[tuple[int, float]]] = {}
        self._points: list[tuple[float, float, float]] = []
        """log2(tokens), tokens and seconds of each size class seen."""

    @property
    def n_sizes(self) -> int:
        return len(self._recent)

    def took(self, n_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = round(2 * math.log2(n_tokens))
        self._recent.setdefault(size, deque(maxlen=_N_RECENT)).append((n_tokens, seconds))

    def refit(self) -> None:
        """Take in what was seen since the last time."""
        self._points = []
        for recent in self._recent.values():
            n_tokens = sum(n for n, _ in recent) / len(recent)
            self._points.append((math.log2(n_tokens), n_tokens, median(seconds for _, seconds in recent)))

    def expected_s(self, n_tokens: float) -> float:
        """By a line fitted to the size classes seen, the nearer the heavier."""
        if len(self._points) < 2:
            _, n_seen, seconds = self._points[0] if self._points else (0.0, *self._planned)
            return seconds * (_FIXED_SHARE + (1 - _FIXED_SHARE) * n_tokens / n_seen)
        at = math.log2(n_tokens)
        weights = [math.exp(-(((log - at) / _REACH) ** 2) / 2) + 1e-9 for log, _, _ in self._points]
        total = sum(weights)
        mean_n = sum(w * n for w, (_, n, _) in zip(weights, self._points, strict=True)) / total
        mean_s = sum(w * s for w, (_, _, s) in zip(weights, self._points, strict=True)) / total
        spread = sum(w * (n - mean_n) ** 2 for w, (_, n, _) in zip(weights, self._points, strict=True))
        rise = sum(
            w * (n - mean_n) * (s - mean_s) for w, (_, n, s) in zip(weights, self._points, strict=True)
        )
        slope = min(max(0.0, rise / spread), mean_s / mean_n)
        return mean_s + slope * (n_tokens - mean_n)


class Pacing:
    """Learns a replica's times and says how many groups to spread its decoding sequences over; owned by its driver."""

    def __init__(self, planned_stage_s: Iterable[float], planned_tokens: int) -> None:
        self._stages = [StageTimes(planned_tokens, seconds) for seconds in planned_stage_s]
        self._network: dict[int, tuple[int, deque[float]]] = {}
        """By steps in flight: when it was observed last, and round trips less the stages' time."""
        self._n_observed = 0
        self._n_fitted = 0
        self._network_s = 0.0
        self._groups = 1
        self._for_decoding = 0

    def observe(
        self,
        n_rows: int,
        n_tokens: int,
        stage_seconds: Sequence[float],
        round_trip_s: float,
        n_in_flight: int,
    ) -> None:
        """A step was answered; `n_in_flight` steps were under way when it was sent, itself included."""
        for stage, seconds in zip(self._stages, stage_seconds, strict=True):
            stage.took(n_tokens, seconds)
        _, recent = self._network.get(n_in_flight, (0, deque(maxlen=_N_RECENT)))
        recent.append(max(0.0, round_trip_s - sum(stage_seconds)))
        self._network[n_in_flight] = (self._n_observed, recent)
        self._n_observed += 1

    def groups(self, n_decoding: int) -> int:
        """How many steps to spread so many decoding sequences over."""
        if n_decoding <= 1 or not self._n_observed:
            return 1
        if self._n_observed - self._n_fitted >= _REFIT_STEPS or self._n_fitted < _REFIT_STEPS:
            self._refit()
        if self._for_decoding != n_decoding or self._n_fitted == self._n_observed:
            self._for_decoding = n_decoding
            self._groups = self._best_groups(n_decoding)
        return self._probed(n_decoding)

    def prompt_depth(self, n_tokens: int) -> int:
        """How many steps of so many tokens, each a prompt's next, fill the pipeline."""
        if len(self._stages) == 1 and not self._n_observed:
            return 1
        slowest_s, all_s = self._times_s(n_tokens)
        if slowest_s <= 0:
            return 1
        return max(1, min(MAX_GROUPS, math.ceil((all_s + self._network_s) / slowest_s - 0.1)))

    def round_s(self, n_decoding: int, n_groups: int) -> float:
        """How long it takes to draw one token for each, in so many groups."""
        slowest_s, all_s = self._times_s(n_decoding / n_groups)
        return max(n_groups * slowest_s, all_s + self._network_s)

    def _times_s(self, n_tokens: float) -> tuple[float, float]:
        each = [stage.expected_s(n_tokens) for stage in self._stages]
        return max(each), sum(each)

    def _refit(self) -> None:
        for stage in self._stages:
            stage.refit()
        fresh = [recent for seen, recent in self._network.values() if seen >= self._n_observed - _STALE_STEPS]
        self._network_s = min(median(recent) for recent in fresh)
        self._n_fitted = self._n_observed

    def _best_groups(self, n_decoding: int) -> int:
        rounds = {n: self.round_s(n_decoding, n) for n in range(1, min(n_decoding, MAX_GROUPS) + 1)}
        shortest = min(rounds.values())
        kept = rounds.get(self._groups)
        if kept is not None and kept <= shortest * (1 + _KEPT):
            return self._groups
        return next(n for n, seconds in rounds.items() if seconds <= shortest * (1 + _NEARLY))

    def _probed(self, n_decoding: int) -> int:
        """The number of groups, or for a few steps in a while half or twice as many."""
        if self._n_observed % _PROBE_EVERY_STEPS >= self._groups or self._n_observed < self._groups:
            return self._groups
        is_even = (self._n_observed // _PROBE_EVERY_STEPS) % 2 == 0
        other = self._groups * 2 if is_even or self._groups == 1 else self._groups // 2
        return max(1, min(other, n_decoding, MAX_GROUPS))
