"""What a gateway of the mesh knows of the replicas' work, and where the daemon's router sends requests by that.

Drivers tell once a second what their replicas do; what the gateway sent since is its own knowledge.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Set
from dataclasses import dataclass

from hexmesh.plan import Plan
from hexmesh.serving.router import ReplicaLoad, Sent, choose_pair, load_of
from hexmesh.serving.turns import Turns
from hexmesh.wire.data import ReplicaStats


@dataclass(frozen=True, slots=True)
class Route:
    """Who computes a request's prompt, and who its output."""

    prefill: str
    decode: str

    @property
    def replicas(self) -> tuple[str, ...]:
        return (self.prefill,) if self.prefill == self.decode else (self.prefill, self.decode)


@dataclass(slots=True)
class _Known:
    """What the gateway knows of a replica; owned by `Routes`."""

    stats: ReplicaStats | None = None
    told_s: float = 0.0
    n_under_way: int = 0
    n_new: int = 0
    """More since the driver's last word; those that ended since count less than none."""
    new_tokens: int = 0


class Routes:
    """Owns what the gateway knows of the replicas' loads."""

    def __init__(self, plan: Plan, rng: random.Random) -> None:
        self._plan = plan
        self._rng = rng
        self._turns = Turns(rng)
        self._block_tokens = {replica.id: replica.block_tokens for replica in plan.replicas}
        self._known = {replica.id: _Known() for replica in plan.replicas}

    def told(self, stats: Iterable[ReplicaStats], now_s: float) -> None:
        """Drivers say what they do."""
        for one in stats:
            known = self._known[one.replica]
            known.stats, known.told_s, known.n_new, known.new_tokens = one, now_s, 0, 0

    def sent(self, route: Route, n_tokens: int) -> None:
        """A sequence was sent there."""
        for replica in route.replicas:
            known = self._known[replica]
            known.n_under_way += 1
            known.n_new += 1
            known.new_tokens += n_tokens

    def ended(self, replica: str) -> None:
        """It has nothing more to do with a sequence that was sent."""
        known = self._known[replica]
        known.n_under_way -= 1
        known.n_new -= 1

    def choose(
        self, n_tokens: int, now_s: float, *, lost_nodes: Set[str], avoid: Set[str], may_wait: bool
    ) -> Route | None:
        """For a sequence of so many tokens; None if all are full (and it may not wait), or broken."""
        pair = choose_pair(
            self._plan,
            turns=self._turns,
            loads={name: self._load(name, now_s) for name in self._known},
            n_tokens=n_tokens,
            lost_nodes=lost_nodes,
            avoid=avoid,
            here="",
            rng=self._rng,
            may_wait=may_wait,
        )
        return None if pair is None else Route(pair.entry.id, pair.decode.id)

    def _load(self, name: str, now_s: float) -> ReplicaLoad:
        known = self._known[name]
        sent = Sent(n_requests=known.n_under_way, n_new=known.n_new, new_tokens=known.new_tokens)
        return load_of(known.stats, now_s - known.told_s, self._block_tokens[name], sent)
