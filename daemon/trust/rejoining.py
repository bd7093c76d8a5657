"""Coming back to a mesh with a stored membership: is its certificate still good, or can this node renew it itself?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import msgspec

from daemon.trust.attestor import Attestor
from daemon.trust.removals import refusal_of
from daemon.trust.state import Membership, StateFolder
from hexmesh.errors import Refused
from hexmesh.identity.certificates import read_member, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.revocations import Revocations

progress = logging.getLogger("hexmesh.progress")


async def come_back(
    state: StateFolder, known: Membership, key: NodeKey, join: Callable[[], Awaitable[Membership]] | None
) -> Membership:
    """The stored membership; where its certificate is good no more, `join`, which spends a token, brings a new one."""
    try:
        return await asyncio.to_thread(still_member, state, known, key, datetime.now(UTC))
    except Refused as refused:
        if join is None or refused.code == "removed":
            raise
        progress.info("joining anew: %s", refused.message, extra={"event": "joining_anew"})
    membership = await join()
    await asyncio.to_thread(state.save_membership, membership)
    return membership


def attestor_of(key: NodeKey, membership: Membership, revocations: Revocations) -> Attestor:
    """Signs as this member, and believes nobody who is revoked."""
    return Attestor(
        key,
        tuple(membership.certificates),
        membership.root_der,
        is_refused=lambda member: revocations.grounds(member) is not None,
    )


def still_member(state: StateFolder, known: Membership, key: NodeKey, now: datetime) -> Membership:
    """The membership with a certificate that others accept. Waits for the disk.

    An issuer renews its own here, however long it was away. Raises Refused: removed, or expired, grace included.
    """
    revocations = Revocations(known.root_der, state.revocations())
    identity = read_member(known.certificates[0])
    refusal = refusal_of(revocations, identity)
    if refusal is not None and refusal.code == "removed":
        raise Refused(refusal.message, code=refusal.code, next_step=refusal.next_step)
    if identity.node_id != key.node_id:
        raise Refused(
            "the stored certificate belongs to another key",
            code="bad_certificate",
            next_step="restore the state folder as a whole; never copy one node's folder to another",
        )
    issuer = state.issuer()
    if issuer is not None:
        if identity.is_issuer and identity.validity.standing(now) == "fresh":
            return known
        renewed = msgspec.structs.replace(known, certificates=[issuer.renew(identity, now), *issuer.chain])
        state.save_membership(renewed)
        return renewed
    if refusal is not None:
        raise Refused(refusal.message, code=refusal.code, next_step=refusal.next_step)
    verify_member(known.certificates, known.root_der, now)
    return known
