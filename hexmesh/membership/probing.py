"""How a link's figures come out of what a prober saw: round-trip quantiles, and a sustained rate.

A rate probe sends windows of bytes one after another, each reported back when all of it has arrived. Windows
grow until one takes long enough to be told from the round trip; the rate is then the median of three windows
that agree within 10 %. A probe that runs out of time or bytes first gives a lower bound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

AGREEMENT = 0.10
N_AGREEING = 3
_MIN_GROWTH, _MAX_GROWTH = 2.0, 8.0
_OVERTIME = 3.0
_CLEAR_OF_RTT = 0.3
"""Net of the round trip a window should take this share of it, or the round trip's own spread hides it."""
_LEAST_OF_RTT = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeBudget:
    """What one probe may cost, and how long a window should take."""

    time_s: float
    n_bytes: int
    target_s: float
    max_window_bytes: int
    first_window_bytes: int = 64 * 1024


QUICK_PROBE = ProbeBudget(time_s=0.2, n_bytes=6 * 2**20, target_s=0.01, max_window_bytes=2**20)
"""For the first plan: some tens of milliseconds on a fast link."""

FULL_PROBE = ProbeBudget(time_s=1.0, n_bytes=32 * 10**6, target_s=0.05, max_window_bytes=8 * 10**6)


@dataclass(frozen=True, slots=True)
class RateEstimate:
    """`lower_bound`: the probe ended before three windows agreed."""

    bytes_per_s: float
    lower_bound: bool


class RateProbe:
    """Decides how large the next window is and when to stop. `rtt_s` is not charged to the link's rate."""

    def __init__(self, budget: ProbeBudget, rtt_s: float) -> None:
        self._budget = budget
        self._rtt_s = rtt_s
        self._target_s = max(budget.target_s, _CLEAR_OF_RTT * rtt_s)
        self._time_s = budget.time_s + 8 * rtt_s
        self._next_bytes = budget.first_window_bytes
        self._spent_s = 0.0
        self._spent_bytes = 0
        self._rates: list[float] = []
        self._full: list[float] = []

    def next_window_bytes(self) -> int | None:
        """The size of the next window; None when the probe is over."""
        if self._has_agreement():
            return None
        if self._spent_bytes + self._next_bytes > self._budget.n_bytes and self._rates:
            return None
        patience_s = self._time_s if len(self._full) >= N_AGREEING else _OVERTIME * self._time_s
        if self._spent_s >= (patience_s if self._full else self._time_s):
            return None
        return self._next_bytes

    def record(self, n_bytes: int, seconds: float) -> None:
        """A window of n_bytes was sent and reported back in `seconds`."""
        net_s = max(seconds - self._rtt_s, 1e-9)
        rate = n_bytes / max(net_s, _LEAST_OF_RTT * self._rtt_s)
        self._spent_s += seconds
        self._spent_bytes += n_bytes
        self._rates.append(rate)
        if net_s >= self._target_s / 2 or n_bytes >= self._budget.max_window_bytes:
            self._full.append(rate)
            return
        growth = min(_MAX_GROWTH, max(_MIN_GROWTH, self._target_s / net_s))
        self._next_bytes = min(self._budget.max_window_bytes, int(n_bytes * growth))

    def estimate(self) -> RateEstimate | None:
        """The link's rate; None when not one window came through."""
        if not self._rates:
            return None
        if not self._full:
            return RateEstimate(bytes_per_s=self._rates[-1], lower_bound=True)
        rate = median(self._full[-N_AGREEING:])
        return RateEstimate(bytes_per_s=rate, lower_bound=not self._has_agreement())

    def _has_agreement(self) -> bool:
        last = self._full[-N_AGREEING:]
        return len(last) == N_AGREEING and max(last) - min(last) <= AGREEMENT * median(last)


class RttWindow:
    """The last round-trip times to one peer."""

    def __init__(self, size: int = 64) -> None:
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
