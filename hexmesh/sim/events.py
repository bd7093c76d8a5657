"""Virtual time: what is to happen, in order of time and then of being planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Events:
    """Owns the clock of a simulation. The same calls give the same order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.n_run = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._n_planned = 0
        self._look: Callable[[], float] | None = None
        self._look_s = math.inf

    @property
    def next_s(self) -> float:
        """When something is to happen next; infinite if there is nothing."""
        return self._heap[0][0] if self._heap else math.inf

    def at(self, time_s: float, do: Callable[..., None], *args: Any) -> None:
        """Plan a call; one for the past happens now, behind what is planned for now."""
        self._n_planned += 1
        heappush(self._heap, (max(time_s, self.now_s), self._n_planned, do, args))

    def watch(self, look: Callable[[], float]) -> None:
        """Call `look` now, then whenever it said; it changes nothing, so it is nothing that happens."""
        self._look, self._look_s = look, self.now_s

    def run_while(self, is_wanted: Callable[[], bool]) -> None:
        """Let things happen until nothing is left, or wanted."""
        heap = self._heap
        while heap and is_wanted():
            time_s, _, do, args = heappop(heap)
            while self._look is not None and self._look_s < time_s:
                self.now_s = self._look_s
                self._look_s = self._look()
            self.now_s = time_s
            self.n_run += 1
            do(*args)
