"""The highest term seen: a hint that saves a round of outbidding. Losing it is safe."""

from __future__ import annotations

from hexmesh.wire.control import Ballot

MAX_TERM = 2**62
MAX_LEAP = 2**32


class Terms:
    """Shared by the roles of one boot; it only grows."""

    def __init__(self, highest: int) -> None:
        self.highest = highest

    def see(self, ballot: Ballot) -> None:
        if ballot.term > self.highest:
            self.highest = ballot.term

    def is_leap(self, ballot: Ballot) -> bool:
        """Whether no honest history gives such a term: counting on from it would use the numbers up.

        The first contact with a mesh may be with any term that leaves room to count.
        """
        limit = MAX_TERM if self.highest == 0 else min(MAX_TERM, self.highest + MAX_LEAP)
        return not 0 <= ballot.term <= limit

    def next(self) -> int:
        """A term above all seen."""
        self.highest += 1
        return self.highest
