"""How many micro-batches to keep in flight, so that neither the slowest stage nor the network idles.

With n sequences in g groups of b = n / g, a round (one token for each sequence) takes
    max(g * slowest stage's time for b rows, all stages' time for b rows + network part of a round trip)
(both with what comes beside the b rows in a step, such as chunks of prompts), and the fewest groups are wanted of
those that make it nearly shortest. What a stage needs for b rows is learnt from recent steps, by size class, and
fitted locally by a line; the network part is what a round trip takes beyond the stages' time, where steps queue
least. Where all steps of late had one size, or one number of them was in flight, a few are sent in other groups, so
that the rest is learnt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

MAX_GROUPS = 32
"""As many steps as may wait at one stage."""
_N_RECENT = 63
"""Observations that a median is taken over."""
_N_LATELY = 15
_N_ENOUGH = 4
"""With fewer observations of a kind, more are looked for; with more of them as time goes by."""
_STEPS_PER_MORE = 32
_STALE_STEPS = 2000
"""What was observed so many steps ago is not believed any more."""
_DOUBTFUL_STEPS = 200
"""And what is so old not where it does not explain what is observed."""
_REFIT_STEPS = 16
_NEWS = 0.05
"""What one step weighs in a running mean."""
_NEARLY = 0.005
"""Rounds that differ by less count as equally long."""
_KEPT = 0.015
"""The number of groups is changed for no smaller gain than this."""
_WORTH = 0.1
"""For no smaller gain, at best, is anything tried."""
_REACH = 1.5
"""How far a size class bears on the fit at another size, in powers of two."""
_FIXED_SHARE = 0.5
"""Of a step's time, taken not to depend on its size while only one size was seen."""
_UNEXPLAINED = 1.2
"""Round trips so many times longer than expected call for another look at the network."""


class Recent:
    """The last observations of one kind, none older than `_STALE_STEPS`; part of `Pacing`."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=_N_RECENT)
        self.last_step = 0

    def add(self, value: float, step: int) -> None:
        """Take in what step number `step` showed."""
        self.values.append(value)
        self.last_step = step

    def is_fresh(self, step: int) -> bool:
        """Whether it still says something at that step."""
        return step - self.last_step <= _STALE_STEPS

    def is_enough(self, step: int) -> bool:
        """Whether it need not be looked for at that step."""
        return len(self.values) >= min(_N_RECENT // 2, _N_ENOUGH + step // _STEPS_PER_MORE)


class StageTimes:
    """What one stage needs for a step, by its number of tokens; part of `Pacing`."""

    def __init__(self, planned_tokens: int, planned_s: float) -> None:
        self._planned = (float(max(1, planned_tokens)), planned_s)
        self._sizes: dict[int, tuple[Recent, Recent]] = {}
        """Tokens and seconds, by size class."""
        self._points: list[tuple[float, float, float, int]] = []
        """log2(tokens), tokens and seconds of each size class, and how often it was seen."""

    def took(self, n_tokens: int, seconds: float, step: int) -> None:
        """A step of so many tokens took so long."""
        size = round(2 * math.log2(n_tokens))
        tokens, times = self._sizes.setdefault(size, (Recent(), Recent()))
        tokens.add(n_tokens, step)
        times.add(seconds, step)

    def refit(self, step: int) -> None:
        """Take in what was seen since the last time."""
        self._sizes = {size: seen for size, seen in self._sizes.items() if seen[0].is_fresh(step)}
        self._points = []
        for tokens, times in self._sizes.values():
            n_tokens, seconds = sum(tokens.values) / len(tokens.values), median(times.values)
            self._points.append((math.log2(n_tokens), n_tokens, seconds, len(times.values)))

    def n_sizes_known(self, step: int) -> int:
        """How many size classes were seen often enough."""
        return sum(times.is_enough(step) for _, times in self._sizes.values())

    def line_at(self, n_tokens: float) -> tuple[float, float]:
        """What a step takes whatever its size, and what each token adds: for sizes near n_tokens.

        A line fitted to the size classes seen, the nearer the heavier.
        """
        if len(self._points) < 2:
            n_seen, seconds = self._points[0][1:3] if self._points else self._planned
            return seconds * _FIXED_SHARE, seconds * (1 - _FIXED_SHARE) / n_seen
        at = math.log2(n_tokens)
        total, sum_n, sum_s, sum_nn, sum_ns = 0.0, 0.0, 0.0, 0.0, 0.0
        for log, n_seen, seconds, n_times in self._points:
            weight = n_times * (math.exp(-(((log - at) / _REACH) ** 2) / 2) + 1e-9)
            total += weight
            sum_n += weight * n_seen
            sum_s += weight * seconds
            sum_nn += weight * n_seen * n_seen
            sum_ns += weight * n_seen * seconds
        mean_n, mean_s = sum_n / total, sum_s / total
        rise, spread = sum_ns / total - mean_n * mean_s, sum_nn / total - mean_n * mean_n
        slope = min(max(0.0, rise / max(spread, 1e-9)), mean_s / mean_n)
        return mean_s - slope * mean_n, slope


class Pacing:
    """Learns a replica's times and says how many groups to spread its decoding sequences over; owned by its driver."""

    def __init__(self, planned_stage_s: Iterable[float], planned_tokens: int) -> None:
        self._stages = [StageTimes(planned_tokens, seconds) for seconds in planned_stage_s]
        self._network: dict[int, Recent] = {}
        """Round trips less the stages' time, by steps in flight."""
        self._step = 0
        self._fitted_step = 0
        self._chosen_step = 0
        self._network_s = 0.0
        self._n_beside = 0.0
        """Tokens that a step carries of late beside one for each row: chunks of prompts, mostly."""
        self._groups = 1
        self._for_decoding = 0
        self._probe_groups = 0
        self._probe_until = 0

    def observe(
        self,
        n_rows: int,
        n_tokens: int,
        stage_seconds: Sequence[float],
        round_trip_s: float,
        n_in_flight: int,
        queue_s: float = 0.0,
    ) -> None:
        """A step was answered; `n_in_flight` steps were under way when it was sent, itself included.

        `queue_s`: how much of its round trip it is known to have waited at stages for others.
        """
        self._step += 1
        self._n_beside += (n_tokens - n_rows - self._n_beside) * _NEWS
        for stage, seconds in zip(self._stages, stage_seconds, strict=True):
            stage.took(n_tokens, seconds, self._step)
        rest_s = max(0.0, round_trip_s - sum(stage_seconds) - queue_s)
        self._network.setdefault(n_in_flight, Recent()).add(rest_s, self._step)

    def groups(self, n_decoding: int) -> int:
        """How many steps to spread so many decoding sequences over."""
        if n_decoding <= 1 or not self._step:
            return 1
        self._refit_if_due()
        if (
            self._chosen_step < self._fitted_step
            or not 7 * self._for_decoding <= 8 * n_decoding <= 9 * self._for_decoding
        ):
            self._choose(n_decoding)
        if self._step < self._probe_until:
            return min(self._probe_groups, n_decoding)
        return min(self._groups, n_decoding)

    def prompt_depth(self, n_tokens: int) -> int:
        """How many steps of so many tokens, each a prompt's next, fill the pipeline."""
        if len(self._stages) == 1 and not self._step:
            return 1
        self._refit_if_due()
        slowest_s, all_s, _ = self._times_s(n_tokens, n_tokens)
        if slowest_s <= 0:
            return 1
        return max(1, min(MAX_GROUPS, math.ceil((all_s + self._network_s) / slowest_s - 0.1)))

    def round_s(self, n_decoding: int, n_groups: int) -> float:
        """How long it takes to draw one token for each, in so many groups."""
        n_mean, n_most = n_decoding / n_groups, -(-n_decoding // n_groups)
        slowest_s, _, all_s = self._times_s(n_mean + self._n_beside, n_most + self._n_beside)
        return max(n_groups * slowest_s, all_s + self._network_s)

    def _times_s(self, n_mean: float, n_most: float) -> tuple[float, float, float]:
        """The slowest stage's time for n_mean tokens; all stages' time for so many, and for n_most."""
        lines = [stage.line_at(n_mean) for stage in self._stages]
        each = [fixed_s + token_s * n_mean for fixed_s, token_s in lines]
        return max(each), sum(each), sum(fixed_s + token_s * n_most for fixed_s, token_s in lines)

    def _refit_if_due(self) -> None:
        if self._step - self._fitted_step >= min(_REFIT_STEPS, 1 + self._fitted_step // 4):
            self._refit()

    def _refit(self) -> None:
        for stage in self._stages:
            stage.refit(self._step)
        self._fitted_step = self._step
        self._network = {n: recent for n, recent in self._network.items() if recent.is_fresh(self._step)}
        self._network_s = self._shortest_way_s()
        if self._is_way_longer():
            self._network = {
                n: recent
                for n, recent in self._network.items()
                if self._step - recent.last_step < _DOUBTFUL_STEPS
            }
            self._network_s = self._shortest_way_s()

    def _shortest_way_s(self) -> float:
        return min(median(recent.values) for recent in self._network.values())

    def _is_way_longer(self) -> bool:
        """Whether round trips are longer of late than the network, as it was, and the queues explain."""
        recent = self._network.get(self._groups)
        if recent is None or not self._for_decoding:
            return False
        slowest_s, all_s, _ = self._times_s(self._for_decoding / self._groups + self._n_beside, 1)
        explained_s = max(all_s + self._network_s, self._groups * slowest_s)
        return all_s + median(list(recent.values)[-_N_LATELY:]) > _UNEXPLAINED * explained_s

    def _choose(self, n_decoding: int) -> None:
        self._chosen_step = self._fitted_step
        self._for_decoding = n_decoding
        self._groups = self._best_groups(n_decoding)
        if self._step >= self._probe_until + 2 * self._groups:
            self._look_further(n_decoding)

    def _best_groups(self, n_decoding: int) -> int:
        rounds = {n: self.round_s(n_decoding, n) for n in _group_numbers(n_decoding)}
        shortest = min(rounds.values())
        fewest = next(n for n, seconds in rounds.items() if seconds <= shortest * (1 + _NEARLY))
        fewest = min(fewest, 2 * self._groups)  # the fit does not reach much further than what was seen
        is_kept = rounds.get(self._groups, math.inf) <= shortest * (1 + _KEPT)
        return min(fewest, self._groups) if is_kept else fewest

    def _look_further(self, n_decoding: int) -> None:
        """Send the next few steps in other groups if what decides between them is not known."""
        slowest_s, all_s, _ = self._times_s(n_decoding + self._n_beside, n_decoding)
        if self._groups == 1 and all_s + self._network_s <= slowest_s * (1 + _WORTH):
            return  # one stage and a short way: hardly anything idles
        if self._n_beside > n_decoding / self._groups:
            return  # prompts fill every step up to the same size, whatever the groups
        most, fewer = min(n_decoding, MAX_GROUPS), self._groups - max(1, self._groups // 3)
        if self._stages[0].n_sizes_known(self._step) < 2:
            self._probe(2 * self._groups if 2 * self._groups <= most else self._groups // 2)
        elif fewer and not any(n <= fewer and seen.is_enough(0) for n, seen in self._network.items()):
            self._probe(fewer)

    def _probe(self, n_groups: int) -> None:
        self._probe_groups = n_groups
        self._probe_until = self._step + max(self._groups, n_groups) + _N_ENOUGH


def _group_numbers(n_decoding: int) -> list[int]:
    """Numbers of groups worth telling apart: with 8 sequences, 5, 6 or 7 groups are the same as 4 of 2."""
    numbers = [n for n in range(1, min(n_decoding, MAX_GROUPS) + 1) if n <= 8 or n % (n // 8 + 1) == 0]
    shares = {-(-n_decoding // n) for n in numbers}
    return sorted(-(-n_decoding // share) for share in shares)
