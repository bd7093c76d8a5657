"""The one lease on a host: whom it is promised to, until when, and which orders are out of date.

A host is coordinator exactly while its lease is its own; that lease needs no renewal.
"""

from __future__ import annotations

from hexmesh.wire.control import LEAST_BALLOT, Ballot


class Lease:
    """Owned by the host role. `promised` never goes back within one boot (I1)."""

    def __init__(self, node: str, boot: int, lease_s: float, now_s: float) -> None:
        self._owner = (node, boot)
        self._lease_s = lease_s
        self._seen = (("", 0), 0)
        self._is_ending = False
        self.promised: Ballot = LEAST_BALLOT
        self.until_s: float = now_s
        self.heirs: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        return self.promised.owner == self._owner

    def is_free(self, now_s: float) -> bool:
        return now_s >= self.until_s and not self.is_own

    def holder(self, now_s: float) -> str | None:
        """The node this host is leased to, itself included; None once the lease expired."""
        return None if self.is_free(now_s) else self.promised.node

    def is_fenced(self, ballot: Ballot) -> bool:
        """Whether orders under `ballot` must not be obeyed."""
        return ballot < self.promised or ballot.owner != self.promised.owner

    def grant(self, ballot: Ballot, now_s: float) -> None:
        if ballot.owner != self.promised.owner:
            self.heirs = ()
        self.promised = ballot
        self.until_s = now_s + self._lease_s
        self._is_ending = False

    def renew(self, now_s: float) -> None:
        if not self._is_ending:
            self.until_s = now_s + self._lease_s

    def end_within(self, left_s: float, now_s: float) -> None:
        """Evidence that the holder is gone: shorten the lease, and let no late beat renew it.

        If the evidence was wrong, the holder asks again and is granted the host anew.
        """
        self._is_ending = True
        self.until_s = min(self.until_s, now_s + left_s)

    def is_overtaken(self, owner: tuple[str, int], seq: int) -> bool:
        """Whether an order at least as new was seen from that coordinator. Terms fence what `seq` forgets."""
        seen_owner, seen_seq = self._seen
        return owner == seen_owner and seq <= seen_seq

    def note_seq(self, owner: tuple[str, int], seq: int) -> None:
        if not self.is_overtaken(owner, seq):
            self._seen = (owner, seq)
