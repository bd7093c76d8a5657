"""Which node is meant by what a person typed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hexmesh.errors import InvalidInput
from hexmesh.ids import short
from hexmesh.wire.peering import MemberAddress

_LEAST_DIGITS = 6
_WHOLE_ID = re.compile(r"[0-9a-f]{40}")


def find_member(members: Sequence[MemberAddress], name_or_id: str) -> MemberAddress:
    """The one node with that name or with an id that begins so. Raises InvalidInput.

    A whole id is taken at its word: the node may have been gone for long.
    """
    by_name = [one for one in members if one.name == name_or_id]
    is_id = len(name_or_id) >= _LEAST_DIGITS
    by_id = [one for one in members if is_id and one.node_id.startswith(name_or_id)]
    found = {one.node_id: one for one in by_name + by_id}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        ids = ", ".join(short(node) for node in found)
        raise InvalidInput(
            f"{name_or_id!r} may mean {ids}", code="ambiguous_node", next_step="give one of these ids"
        )
    if _WHOLE_ID.fullmatch(name_or_id):
        return MemberAddress(node_id=name_or_id, name=short(name_or_id), address="")
    raise InvalidInput(
        f"no node {name_or_id!r} is known here",
        code="unknown_node",
        next_step="`hexmesh members` shows names and ids",
    )
