"""What a replica gave lately: tokens a second, and how busy its stages were."""

from __future__ import annotations

from collections import deque

RATE_WINDOW_S = 5.0


class ReplicaRates:
    """Owned by the replica's driver."""

    def __init__(self, n_stages: int) -> None:
        self._n_stages = n_stages
        self._answers: deque[tuple[float, int, list[float]]] = deque()
        """When a step was answered, its tokens, and each stage's compute time."""

    def answered(self, now_s: float, n_tokens: int, stage_seconds: list[float]) -> None:
        self._answers.append((now_s, n_tokens, stage_seconds))
        self._drop_old(now_s)

    def tokens_per_s(self, now_s: float) -> float:
        self._drop_old(now_s)
        return sum(n_tokens for _, n_tokens, _ in self._answers) / RATE_WINDOW_S

    def stage_busy(self, now_s: float) -> list[float]:
        """Of each stage, the share of the time in which it computed this replica's steps."""
        self._drop_old(now_s)
        return [
            min(1.0, sum(seconds[index] for _, _, seconds in self._answers) / RATE_WINDOW_S)
            for index in range(self._n_stages)
        ]

    def _drop_old(self, now_s: float) -> None:
        while self._answers and self._answers[0][0] < now_s - RATE_WINDOW_S:
            self._answers.popleft()
