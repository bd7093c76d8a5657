"""Whom to ask for weights, the best first."""

from __future__ import annotations

from collections.abc import Iterable

from daemon.models.weight_fetch import WeightPeer
from hexmesh.ids import NodeId
from hexmesh.membership.records import NodeRecord


def weight_peers(records: Iterable[NodeRecord], node_id: str) -> list[WeightPeer]:
    """Other nodes by the measured rate of their link to this one; unmeasured ones last, whole models first."""
    others = [record for record in records if record.node != node_id and "left" not in record.roles]
    others.sort(key=lambda record: (-_rate(record, node_id), not record.has_all_weights, record.node))
    return [WeightPeer(NodeId(record.node), record.name) for record in others]


def _rate(record: NodeRecord, to: str) -> float:
    return max((facts.link.bytes_per_s for facts in record.links if facts.link.dst == to), default=0.0)
