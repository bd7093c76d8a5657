"""Whom to dial after a restart: the members as the records name them, kept in the state folder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn

import msgspec

from daemon.trust.state import Membership, StateFolder
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


async def keep_members(
    state: StateFolder, membership: Membership, members: Callable[[], list[MemberAddress]]
) -> NoReturn:
    """Write the membership whenever members changed, until cancelled."""
    saved = membership
    while True:
        await asyncio.sleep(KEEP_MEMBERS_S)
        now = members()
        if now != saved.members:
            maddrs = [maddr for member in now for maddr in member.dht_maddrs]
            saved = msgspec.structs.replace(saved, members=now, dht_initial_peers=maddrs)
            await asyncio.to_thread(state.save_membership, saved)
