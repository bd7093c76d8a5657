"""How long a step may take before whatever runs it counts as hung.

Deadlines follow the work: what steps of that size took lately, or what the plan predicts while nothing is
known, times a margin. `Patience` charges only time in which the waiting process itself ran, so that a paused
daemon does not blame its workers when it wakes, and a machine too busy to look blames nobody.
"""

from __future__ import annotations

FLOOR_S = 2.0
"""No step is given less: shorter silences have causes that pass, such as another epoch's weights being loaded."""
MARGIN = 10.0
"""How many times longer than the slowest step of its size a step may take."""
FIRST_S = 10.0
"""The least for a stage's first steps, which allocate, compile and may wait for their KV pool."""
N_FIRST = 3
FIRST_MARGIN = 100.0
SUSPECT_S = 1.0
"""A step that takes longer is asked about: a node on its way that is not heard any more ends it."""
LOOK_S = 0.1
"""How often one who waits looks."""
MAX_LOOK_S = 0.25
"""What one look charges at most, however late it comes."""
_MEMORY = 0.99
"""A slow step weighs this much less with every later one of its size."""


class StepTimes:
    """Learns what steps take, by size class (powers of two of tokens); owned by whoever waits for them.

    `strictness` below 1 gives every deadline that much more time: for one who waits for others that watch too.
    """

    def __init__(self, planned_s: float, planned_tokens: int, *, strictness: float = 1.0) -> None:
        if planned_s < 0 or planned_tokens < 1 or strictness <= 0:
            raise ValueError(
                f"no estimate: {planned_s} s for {planned_tokens} tokens, strictness {strictness}"
            )
        self._planned_s = planned_s
        self._planned_tokens = planned_tokens
        self._strictness = strictness
        self._slowest_s: dict[int, float] = {}
        self._n_seen = 0

    def took(self, n_tokens: int, seconds: float) -> None:
        """A step of so many tokens was answered after so long."""
        size = n_tokens.bit_length()
        self._slowest_s[size] = max(seconds, _MEMORY * self._slowest_s.get(size, 0.0))
        self._n_seen += 1

    def expected_s(self, n_tokens: int) -> float:
        """The slowest of its size lately; for a size not seen, scaled up from the next smaller; else as planned."""
        size = n_tokens.bit_length()
        smaller = max((known for known in self._slowest_s if known <= size), default=None)
        if smaller is not None:
            return self._slowest_s[smaller] * float(1 << (size - smaller))
        planned_s = self._planned_s * max(1.0, n_tokens / self._planned_tokens)
        return max(planned_s, min(self._slowest_s.values(), default=0.0))

    def deadline_s(self, n_tokens: int) -> float:
        """How long to wait for a step of so many tokens."""
        is_first = self._n_seen < N_FIRST
        least_s, margin = (FIRST_S, FIRST_MARGIN) if is_first else (FLOOR_S, MARGIN)
        return max(least_s, margin * self.expected_s(n_tokens)) / self._strictness


class Patience:
    """How long one wait may yet go on. `spend` at least every LOOK_S."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        self.limit_s = limit_s
        self.spent_s = 0.0
        """Time charged so far: at most MAX_LOOK_S for each look."""
        self._looked_s = now_s

    def spend(self, now_s: float) -> None:
        """Charge the time since the last look."""
        self.spent_s += min(MAX_LOOK_S, max(0.0, now_s - self._looked_s))
        self._looked_s = now_s

    @property
    def is_over(self) -> bool:
        return self.spent_s >= self.limit_s
