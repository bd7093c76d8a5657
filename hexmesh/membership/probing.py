"""How a link's figures come out of what a prober saw: round-trip quantiles, and a sustained rate.

A rate probe is one stream of chunks; the receiver reports how much had arrived and when, by its own clock. What
arrived is cut into rounds of at least two round trips, long enough to even out a sender that fills its window in
bursts. A connection starts slowly and doubles every round trip, so rounds count only once the rate has stopped
rising: three in a row agree within 10 % and do not climb. A probe whose bytes or time end first gives a lower bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

AGREEMENT = 0.10
N_AGREEING = 3
ROUND_RTTS = 2.0
_CLIMB = 0.05
"""Three rounds that rise each time, and by more than this, are still the ramp."""
_CHUNK_S, _QUEUE_S = 0.01, 0.02
_MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 4 * 1024, 256 * 1024
_MIN_QUEUE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeBudget:
    """What one probe may cost: bytes, and seconds of which `n_rtts` round trips come on top of `time_s`."""

    n_bytes: int
    time_s: float
    n_rtts: float
    round_s: float
    """The least length of a round."""


QUICK_PROBE = ProbeBudget(n_bytes=6 * 2**20, time_s=0.1, n_rtts=6, round_s=0.02)
"""For the first plan: some tens of milliseconds on a near link. A far one gives a lower bound."""

HURRIED_PROBE = ProbeBudget(n_bytes=2**20, time_s=0.1, n_rtts=6, round_s=0.02)
"""Where nothing is known and requests leave no pause: little enough to pass beside them."""

FULL_PROBE = ProbeBudget(n_bytes=64 * 10**6, time_s=1.0, n_rtts=24, round_s=0.03)
"""A ramp to 1 Gbit/s over 220 ms takes about eleven round trips, and three rounds six more."""


@dataclass(frozen=True, slots=True)
class RateEstimate:
    """`lower_bound`: the probe ended while the rate still rose, or before three rounds agreed."""

    bytes_per_s: float
    lower_bound: bool


@dataclass(frozen=True, slots=True)
class _Round:
    n_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.n_bytes / self.seconds


class RateProbe:
    """Decides how much to send and when to stop, and what the reports come to."""

    def __init__(self, budget: ProbeBudget, rtt_s: float) -> None:
        self._rtt_s = rtt_s
        self._n_bytes = budget.n_bytes
        self._limit_s = budget.time_s + budget.n_rtts * rtt_s
        self._round_s = max(budget.round_s, ROUND_RTTS * rtt_s)
        self._rounds: deque[_Round] = deque(maxlen=N_AGREEING)
        self._round_at = (0, 0.0)
        self._latest = (0, 0.0)

    @property
    def chunk_bytes(self) -> int:
        """The size of the next chunk: about 10 ms of the link, so that reports come often and cost little."""
        return min(MAX_CHUNK_BYTES, max(_MIN_CHUNK_BYTES, int(self._rate_so_far() * _CHUNK_S)))

    @property
    def queue_bytes(self) -> int:
        """How much should wait for the connection: it must never run dry, and what waits is spent too."""
        return max(_MIN_QUEUE_BYTES, int(self._rate_so_far() * _QUEUE_S))

    def is_over(self, n_sent: int, spent_s: float) -> bool:
        """Whether to send no more, `spent_s` after the first chunk."""
        return self._has_agreement() or n_sent >= self._n_bytes or spent_s >= self._limit_s

    def record(self, n_bytes: int, elapsed_s: float) -> None:
        """`n_bytes` in all had arrived `elapsed_s` after the first chunk, which is not counted."""
        self._latest = n_bytes, elapsed_s
        start_bytes, start_s = self._round_at
        if elapsed_s - start_s >= self._round_s and not self._has_agreement():
            self._rounds.append(_Round(n_bytes - start_bytes, elapsed_s - start_s))
            self._round_at = self._latest

    def estimate(self) -> RateEstimate | None:
        """The link's rate; None when next to nothing came through."""
        if self._has_agreement():
            n_bytes = sum(one.n_bytes for one in self._rounds)
            rate = n_bytes / sum(one.seconds for one in self._rounds)
            return RateEstimate(bytes_per_s=rate, lower_bound=False)
        rate = self._rate_so_far()
        return RateEstimate(bytes_per_s=rate, lower_bound=True) if rate > 0 else None

    def _rate_so_far(self) -> float:
        """That of the last round while it rises, else the median; of everything before the first round ended."""
        rates = [one.bytes_per_s for one in self._rounds]
        if rates:
            return rates[-1] if rates[-1] == max(rates) else median(rates)
        n_bytes, elapsed_s = self._latest
        return n_bytes / max(elapsed_s, self._rtt_s, 1e-3)

    def _has_agreement(self) -> bool:
        if len(self._rounds) < N_AGREEING:
            return False
        rates = [one.bytes_per_s for one in self._rounds]
        first, second, third = rates
        climbs = first < second < third and third > (1 + _CLIMB) * first
        return not climbs and max(rates) - min(rates) <= AGREEMENT * median(rates)


class RttWindow:
    """The last round-trip times to one peer."""

    def __init__(self, size: int = 32) -> None:
        self._samples_s: deque[float] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._samples_s)

    def add(self, rtt_s: float) -> None:
        self._samples_s.append(rtt_s)

    def clear(self) -> None:
        self._samples_s.clear()

    @property
    def p50_s(self) -> float:
        return quantile(sorted(self._samples_s), 0.50)

    @property
    def p95_s(self) -> float:
        return quantile(sorted(self._samples_s), 0.95)


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of ascending samples; there must be at least one."""
    rank = max(1, -(-len(ordered) * q // 1))
    return ordered[int(rank) - 1]
