"""When a free host stands as coordinator (rule C1). Places, not votes: collisions merge and do no harm."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hexmesh.membership.lease import Lease
from hexmesh.membership.peers import Peer, Peers
from hexmesh.membership.timers import Timers

SLOTS_AFTER_HEIRS = 7


@dataclass(slots=True)
class Standing:
    """Owner of one free spell: since when the host is free, and its jitter for this spell."""

    node: str
    rank: int
    timers: Timers
    rng: random.Random
    listen_s: float
    free_since_s: float
    jitter: float

    @classmethod
    def at_start(cls, node: str, rank: int, timers: Timers, rng: random.Random, now_s: float) -> Standing:
        """A daemon that just started listens before it may stand."""
        return cls(node, rank, timers, rng, 0.6 * timers.hear_s, now_s, rng.random())

    def restart(self, now_s: float) -> None:
        """The host just became free."""
        self.listen_s = 0.0
        self.free_since_s = now_s
        self.jitter = self.rng.random()

    def due_s(self, lease: Lease, peers: Peers, now_s: float) -> float:
        """When to stand, as things look now."""
        wait_s = self.listen_s + self.timers.stand_min_s + self._place_s(lease, peers, now_s)
        if hears_coordinator(peers, now_s):
            wait_s += self.timers.patience_s
        return self.free_since_s + wait_s

    def _place_s(self, lease: Lease, peers: Peers, now_s: float) -> float:
        slot_s = self.timers.slot_s
        if self.node in lease.heirs:
            return 2 * lease.heirs.index(self.node) * slot_s
        if lease.heirs:
            spread = max(1.0, len(peers) / 20)
            return SLOTS_AFTER_HEIRS * slot_s + self.timers.jitter_s * self.jitter * spread
        mine = (-self.rank, self.node)
        return slot_s * sum(_place(peer) < mine for peer in peers.heard(now_s))


def _place(peer: Peer) -> tuple[int, str]:
    return (0 if peer.view is None else -peer.view.rank, peer.node)


def hears_coordinator(peers: Peers, now_s: float) -> bool:
    return any(peer.view is not None and peer.view.is_coordinator for peer in peers.two_way(now_s))
