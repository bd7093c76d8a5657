"""How soon a full queue has room again: one sequence moves up whenever one ends.

Whoever is told to come back is given a place of his own in that order, so that not all come back at once.
"""

from __future__ import annotations

from collections import deque

UNKNOWN_S = 2.0
"""While nothing has ended yet."""
LEAST_S, MOST_S = 1.0, 60.0
_N_ENDS = 64


class Turnover:
    """Learns how often sequences end; owned by a batcher."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque(maxlen=_N_ENDS)
        self._promised_s = 0.0
        """The time by which all who were refused will have had their turn."""

    def ended(self, now_s: float) -> None:
        """A sequence left for good."""
        self._ended_s.append(now_s)

    def retry_after_s(self, now_s: float) -> float:
        """When to come back, for one who is refused now."""
        self._promised_s = min(max(self._promised_s, now_s) + self._interval_s(now_s), now_s + MOST_S)
        return max(LEAST_S, self._promised_s - now_s)

    def _interval_s(self, now_s: float) -> float:
        """Between two ends, lately; a long silence since counts too."""
        if not self._ended_s:
            return UNKNOWN_S
        return max(0.0, now_s - self._ended_s[0]) / len(self._ended_s)
