"""Who can dial whom: the way a peer is reached, when to look for a better one, and what others say of this node."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import combinations
from typing import Literal

from hexmesh.membership.records import NodeRecord

FIRST_CHECK_S = 2.0
LONGEST_CHECK_S = 300.0
NEWS_S = 2.0
NEVER_S = float("-inf")

RELAY_ROLE = "relay"
"""In a node's record: it joins circuits for members that cannot dial each other."""

Way = Literal["direct", "accepted", "call_back", "circuit"]


def choose_way(
    *, is_dialable: bool, has_accepted: bool, is_heard: bool, has_relay: bool, failed: Way | None
) -> Way:
    """How to get a connection for one channel to a peer.

    `has_accepted`: the peer has dialled this node for the same channel, and connections carry both ways.
    `is_heard`: it has itself dialled this node for control, so it can be asked to dial for another channel.
    With nothing of that, circuits and dials take turns, `failed` being what was tried last in vain: a peer that
    is down comes back either way.
    """
    if is_dialable:
        return "direct"
    if has_accepted:
        return "accepted"
    if is_heard:
        return "call_back"
    return "circuit" if has_relay and failed != "circuit" else "direct"


class DirectWay:
    """Whether a peer can be dialled, as far as is known. While it cannot, `is_due` says when to try again."""

    def __init__(self) -> None:
        self.is_open = True
        self.reason = ""
        """Why it is closed."""
        self._has_worked = False
        self._closed_at_s = NEVER_S
        self._delay_s = FIRST_CHECK_S
        self._next_check_s = NEVER_S

    def worked(self) -> None:
        self.is_open = self._has_worked = True
        self.reason = ""
        self._delay_s = FIRST_CHECK_S

    def failed(self, reason: str, now_s: float) -> None:
        """A dial or a check came to nothing."""
        if self.is_open:
            self._closed_at_s = now_s
        else:
            self._delay_s = min(LONGEST_CHECK_S, 2 * self._delay_s)
        self.is_open = False
        self.reason = reason
        self._next_check_s = now_s + self._delay_s

    def presume_closed(self, reason: str) -> None:
        """Others cannot dial it: do not wait for a dial of our own to fail, but check."""
        if not self._has_worked and self.is_open:
            self.is_open = False
            self.reason = reason
            self._closed_at_s = self._next_check_s = NEVER_S

    def look_again(self) -> None:
        """Something changed: its address, or others reach it now."""
        self._delay_s = FIRST_CHECK_S
        self._next_check_s = NEVER_S

    def closed_s(self, now_s: float) -> float | None:
        """For how long it is closed, infinite if it was never thought open; None while it is open."""
        return None if self.is_open else now_s - self._closed_at_s

    def was_closed_before(self, now_s: float) -> bool:
        """Whether it is closed for so long that a refusal says nothing new about the peer's process."""
        return not self.is_open and now_s - self._closed_at_s > NEWS_S

    def is_due(self, now_s: float) -> bool:
        return not self.is_open and now_s >= self._next_check_s


class OwnReach:
    """What other members' connections, and their complaints, say of how this node is reached."""

    def __init__(self) -> None:
        self._reached_by: set[str] = set()
        self._missed_by: dict[str, str] = {}

    @property
    def is_dialable(self) -> bool:
        """Whether at least as many members dial this node as say that they cannot."""
        return len(self._missed_by) <= len(self._reached_by)

    @property
    def missed_by(self) -> dict[str, str]:
        """Members that cannot dial this node, and why not."""
        return dict(self._missed_by)

    def reached(self, node: str) -> None:
        """`node` dialled this node itself."""
        self._reached_by.add(node)
        self._missed_by.pop(node, None)

    def missed(self, node: str, reason: str) -> None:
        """`node` says that it cannot."""
        self._missed_by[node] = reason
        self._reached_by.discard(node)

    def forget(self, node: str) -> None:
        """`node` is no member any more; that a connection ended says nothing."""
        self._reached_by.discard(node)
        self._missed_by.pop(node, None)


def unlinked_pairs(
    records: Iterable[NodeRecord], alive: Collection[str]
) -> list[tuple[NodeRecord, NodeRecord]]:
    """Pairs of living nodes with devices that nobody can dial and between which nothing was measured."""
    hidden = [record for record in records if record.node in alive and record.devices and not record.dialable]
    return [
        (one, other)
        for one, other in combinations(hidden, 2)
        if not _has_link(one, other.node) or not _has_link(other, one.node)
    ]


def _has_link(record: NodeRecord, to: str) -> bool:
    return any(facts.link.dst == to for facts in record.links)
