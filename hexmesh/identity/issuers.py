"""Who should be an issuer: the mesh's first nodes, so that no single host's loss closes the mesh."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId

ISSUERS = 3


def whom_to_appoint(
    up: Sequence[MemberIdentity], appointed: Collection[NodeId], revoked: Collection[NodeId]
) -> list[MemberIdentity]:
    """Members to send an issuer certificate to: those whose it did not reach, and new ones while there is room.

    An issuer that is down keeps its place: only a removal makes room for another.
    """
    fit = sorted((one for one in up if one.node_id not in revoked), key=lambda one: one.not_before)
    standing = {node for node in appointed if node not in revoked}
    taken = standing | {one.node_id for one in fit if one.is_issuer}
    again = [one for one in fit if one.node_id in standing and not one.is_issuer]
    new = [one for one in fit if one.node_id not in taken]
    return again + new[: max(0, ISSUERS - len(taken))]
