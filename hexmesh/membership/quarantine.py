"""Leased hosts that no plan may use for a while, because they could not get ready for one."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DOUBLINGS = 4


@dataclass(frozen=True, slots=True)
class Entry:
    boot: int
    until_s: float
    reason: str
    n_times: int


class Quarantine:
    """Owner of the entries. A new boot starts with a clean sheet."""

    def __init__(self, quarantine_s: float) -> None:
        self._quarantine_s = quarantine_s
        self._entries: dict[str, Entry] = {}

    def put(self, node: str, boot: int, reason: str, now_s: float) -> None:
        old = self._entries.get(node)
        n_times = old.n_times + 1 if old is not None and old.boot == boot else 1
        length_s = self._quarantine_s * 2 ** min(n_times - 1, MAX_DOUBLINGS)
        self._entries[node] = Entry(boot, now_s + length_s, reason, n_times)

    def reason(self, node: str, boot: int, now_s: float) -> str | None:
        """Why the host must not be used now; None if it may be."""
        entry = self._entries.get(node)
        if entry is None or entry.boot != boot or now_s >= entry.until_s:
            return None
        return entry.reason

    def next_end_s(self, now_s: float) -> float:
        """When the next entry ends; infinity without one."""
        ends = [entry.until_s for entry in self._entries.values() if entry.until_s > now_s]
        return min(ends, default=float("inf"))
