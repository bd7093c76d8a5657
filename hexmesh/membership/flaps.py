"""Leased hosts that come and go: how long to plan without one that was lost again and again.

Every loss of a lease is noted with the boot that held it. A boot that is back after it was lost was never gone: its
link failed. Another boot in its place crashed or was restarted, which weighs half. Who weighs too much within
the window is left out, from its last loss on, for a time that doubles with every further one. Nothing has to be
forgiven: what is older than the window counts no more.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SPARED = 3
"""One loss by a bad link and one restart, or three restarts, within the window are nobody's fault."""
_FLAP, _RESTART = 2, 1
_MAX_LOSSES = 32


@dataclass(frozen=True, slots=True)
class _Loss:
    boot: int
    at_s: float


class Flaps:
    """Owner of the losses that this host saw as a coordinator; they outlive a reign."""

    def __init__(self, *, window_s: float, first_s: float, longest_s: float) -> None:
        self._window_s = window_s
        self._first_s = first_s
        self._longest_s = longest_s
        self._losses: dict[str, deque[_Loss]] = {}

    def note_loss(self, node: str, boot: int, now_s: float) -> None:
        self._losses.setdefault(node, deque(maxlen=_MAX_LOSSES)).append(_Loss(boot, now_s))

    def reason(self, node: str, boot: int, now_s: float) -> str | None:
        """Why the host must not be used now; None if it may be."""
        losses = self._recent(node, now_s)
        weight = sum(_FLAP if loss.boot == boot else _RESTART for loss in losses)
        if weight <= SPARED:
            return None
        doublings = (weight - SPARED - 1) // _FLAP
        length_s = min(self._longest_s, self._first_s * 2**doublings)
        if now_s >= losses[-1].at_s + length_s:
            return None
        return (
            f"lost {len(losses)} times within {self._window_s:.0f} s, so left out for up to {length_s:.0f} s; "
            "check the link between it and the coordinator, or why it restarts"
        )

    def _recent(self, node: str, now_s: float) -> list[_Loss]:
        losses = self._losses.get(node)
        if losses is None:
            return []
        while losses and losses[0].at_s <= now_s - self._window_s:
            losses.popleft()
        if not losses:
            del self._losses[node]
        return list(losses)
