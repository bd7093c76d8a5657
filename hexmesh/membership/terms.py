"""The highest term seen: a hint that saves a round of outbidding. Losing it is safe."""

from __future__ import annotations

from hexmesh.wire.control import Ballot


class Terms:
    """Shared by the roles of one boot; it only grows."""

    def __init__(self, highest: int) -> None:
        self.highest = highest

    def see(self, ballot: Ballot) -> None:
        if ballot.term > self.highest:
            self.highest = ballot.term

    def next(self) -> int:
        """A term above all seen."""
        self.highest += 1
        return self.highest
