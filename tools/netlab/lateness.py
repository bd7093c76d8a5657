"""How late the switch was: a histogram, so that percentiles cost neither memory nor sorting."""

from __future__ import annotations

from dataclasses import dataclass, field

_BUCKET_S = 1e-5
_N_BUCKETS = 5_000


@dataclass(slots=True)
class Lateness:
    """Times between when something was due and when it was done."""

    counts: list[int] = field(default_factory=lambda: [0] * (_N_BUCKETS + 1))
    """By 10 us; the last holds whatever took longer than 50 ms."""
    n_samples: int = 0
    max_s: float = 0.0

    def add(self, late_s: float) -> None:
        self.counts[min(int(late_s / _BUCKET_S), _N_BUCKETS)] += 1
        self.n_samples += 1
        self.max_s = max(self.max_s, late_s)

    def percentile_s(self, share: float) -> float:
        """An upper bound on what `share` of the samples kept to, to 10 us; 0 without samples."""
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= share * self.n_samples:
                return min((index + 1) * _BUCKET_S, self.max_s) if index < _N_BUCKETS else self.max_s
        return 0.0
