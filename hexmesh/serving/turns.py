"""Whose turn it is: smooth weighted round-robin over a plan's flows.

Every flow that may be taken gains its share, the one that has most is taken and pays the sum of what was gained. Over
a cycle each is taken exactly by its share, and as evenly spread as can be. One that may not be taken (lost, full,
overloaded) gains nothing, so that it is not flooded afterwards. After nginx's balancing of upstream servers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hexmesh.plan import Flow

_MOST_SKIPPED = 64


class Turns:
    """Owned by a gateway."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._flows: tuple[Flow, ...] = ()
        self._gained: list[float] = []

    def take(self, flows: tuple[Flow, ...], candidates: Sequence[int]) -> int:
        """Which of the candidates, places in `flows`, has its turn; there must be one."""
        if flows != self._flows:
            self._begin(flows)
        return self._take(candidates)

    def _begin(self, flows: tuple[Flow, ...]) -> None:
        """Somewhere in the cycle: gateways that know nothing of each other shall not choose in step."""
        self._flows, self._gained = flows, [0.0] * len(flows)
        for _ in range(self._rng.randrange(_MOST_SKIPPED)):
            self._take(range(len(flows)))

    def _take(self, candidates: Sequence[int]) -> int:
        for at in candidates:
            self._gained[at] += self._flows[at].share
        taken = max(candidates, key=lambda at: self._gained[at])
        self._gained[taken] -= sum(self._flows[at].share for at in candidates)
        return taken
