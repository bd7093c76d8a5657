"""Waits until the set of hosts stopped changing, so that one plan answers a burst of joins (rule C6)."""

from __future__ import annotations

from hexmesh.membership.timers import Timers


class Settle:
    """Owner of the time of the last change and of the first one not answered by a plan."""

    def __init__(self, timers: Timers, now_s: float) -> None:
        self._timers = timers
        self._hosts: dict[str, int] = {}
        self._changed_s = now_s
        self._unanswered_since_s: float | None = None
        self._is_loss = False

    def observe(self, hosts: dict[str, int], now_s: float) -> None:
        if hosts == self._hosts:
            return
        self._is_loss = any(hosts.get(node) != boot for node, boot in self._hosts.items())
        self._hosts = dict(hosts)
        self._changed_s = now_s

    def answered(self) -> None:
        """Nothing waits for a plan any more."""
        self._unanswered_since_s = None

    def is_settled(self, now_s: float, *, is_waiting: bool) -> bool:
        """Whether to plan now; `is_waiting` says that a heard host may yet join."""
        if self._unanswered_since_s is None:
            self._unanswered_since_s = max(self._changed_s, now_s - self._timers.settle_max_s)
        patient = is_waiting and not self._is_loss
        calm_s = self._timers.settle_join_s if patient else self._timers.settle_loss_s
        is_calm = now_s - self._changed_s >= calm_s
        return is_calm or now_s - self._unanswered_since_s >= self._timers.settle_max_s

    def next_wakeup_s(self, now_s: float) -> float:
        """When to look again; infinity if nothing waits for a plan."""
        if self._unanswered_since_s is None:
            return float("inf")
        ends_s = (
            self._changed_s + self._timers.settle_loss_s,
            self._changed_s + self._timers.settle_join_s,
            self._unanswered_since_s + self._timers.settle_max_s,
        )
        return min((end_s for end_s in ends_s if end_s > now_s), default=float("inf"))
