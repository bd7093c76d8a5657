"""Which replica gets a request: the one with the least work per block of KV among those that are whole."""

from __future__ import annotations

from collections.abc import Mapping, Set

from hexmesh.plan import Plan, Replica
from hexmesh.wire.data import ReplicaStats


def broken_stages(replica: Replica, lost_nodes: Set[str]) -> list[str]:
    """The nodes of this replica that are known to be gone."""
    return [stage.node for stage in replica.stages if stage.node in lost_nodes]


def choose_replica(plan: Plan, stats: Mapping[str, ReplicaStats], lost_nodes: Set[str]) -> Replica | None:
    """The replica to send a new request to; None when every replica lacks a stage."""
    whole = [replica for replica in plan.replicas if not broken_stages(replica, lost_nodes)]
    return min(whole, key=lambda replica: _load(replica, stats), default=None)


def _load(replica: Replica, stats: Mapping[str, ReplicaStats]) -> tuple[float, str]:
    known = stats.get(replica.id)
    if known is None:
        return (0.0, replica.id)
    return ((known.requests_running + known.requests_waiting) / replica.kv_blocks, replica.id)
