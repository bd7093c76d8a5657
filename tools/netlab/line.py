"""When a packet leaves a directed link: a virtual clock for its rate, then its latency. No clock is read here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from tools.netlab.links import Link

Drop = Literal["down", "undialable", "queue", "loss", "refused"]


@dataclass(slots=True)
class Line:
    """One directed link at work. Owner: the switch."""

    link: Link
    free_s: float = 0.0
    """When the last packet is through the bottleneck."""
    last_release_s: float = 0.0
    n_packets: int = 0
    n_bytes: int = 0
    dropped: dict[Drop, int] = field(default_factory=dict)

    def admit(self, now_s: float, n_bytes: int, rng: random.Random) -> float | None:
        """When the packet arrives at the other end; None when it is dropped, which is counted."""
        link = self.link
        if (cause := self._why_lost(now_s, rng)) is not None:
            self.drop(cause)
            return None
        release_s = now_s + link.latency_s
        if link.rate_bytes_per_s is not None:
            self.free_s = max(now_s, self.free_s) + n_bytes / link.rate_bytes_per_s
            release_s = self.free_s + link.latency_s
        if link.jitter_s:
            release_s += rng.random() * link.jitter_s
        # In order also when the latency has just become less.
        self.last_release_s = release_s = max(release_s, self.last_release_s)
        return release_s

    def _why_lost(self, now_s: float, rng: random.Random) -> Drop | None:
        if not self.link.is_up:
            return "down"
        if self.link.loss and rng.random() < self.link.loss:
            return "loss"
        has_rate = self.link.rate_bytes_per_s is not None
        return "queue" if has_rate and self.free_s - now_s > self.link.queue_s else None

    def drop(self, cause: Drop) -> None:
        """Count a lost packet."""
        self.dropped[cause] = self.dropped.get(cause, 0) + 1

    def change(self, link: Link) -> None:
        """Behave as `link` from the next packet on; a new rate does not inherit the old one's backlog."""
        if link.rate_bytes_per_s != self.link.rate_bytes_per_s:
            self.free_s = 0.0
        self.link = link
