"""Whom to dial after a restart: the members as the records name them, kept in the state folder."""

from __future__ import annotations

from hexmesh.membership.records import Directory
from hexmesh.wire.peering import MemberAddress

KEEP_MEMBERS_S = 2.0


def member_addresses(directory: Directory) -> list[MemberAddress]:
    """Every node that has a record."""
    return [
        MemberAddress(
            node_id=record.node,
            name=record.name,
            address=record.peer_address,
            dht_maddrs=list(record.dht_maddrs),
        )
        for record in directory.records()
    ]
