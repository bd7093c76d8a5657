"""Which node is meant by what a person typed."""

from __future__ import annotations

from collections.abc import Mapping

from hexmesh.errors import InvalidInput
from hexmesh.ids import short

LEAST_ID_DIGITS = 6


def find_node(names: Mapping[str, str], text: str) -> str:
    """The id of the one node that is called so or whose id begins so; `names` are by id. Raises InvalidInput."""
    is_id = len(text) >= LEAST_ID_DIGITS
    found = [node for node, name in names.items() if text == name or (is_id and node.startswith(text))]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(short(node) for node in found)
        raise InvalidInput(
            f"{text!r} may mean {ids}", code="ambiguous_node", next_step="give one of these ids"
        )
    raise InvalidInput(
        f"no node {text!r} is known here",
        code="unknown_node",
        next_step="`hexmesh members` shows names and ids",
    )
