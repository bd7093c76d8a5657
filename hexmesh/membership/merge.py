"""Merging by consent (rule C5): the smaller coordinator signs its hosts away, the larger asks them.

Size goes first, so that a lone host coming back does not take the mesh from the others. The same way a
leaving coordinator, or one whose planner hangs (C9), hands over to an heir.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexmesh.membership.peers import Peer, Peers
from hexmesh.wire.control import Ballot, Release, Yield


@dataclass(frozen=True, slots=True)
class Token:
    """A host's release by its holder, good for asking until `until_s`."""

    release: Release
    until_s: float


class Merge:
    """Owner of the tokens received and of whom this coordinator yields to, for one reign."""

    def __init__(self, peers: Peers, token_s: float) -> None:
        self._peers = peers
        self._token_s = token_s
        self._tokens: dict[str, Token] = {}
        self._n_sent = 0
        self.yielding_to: str | None = None
        self.is_handing_over = False
        """Yield to whoever can take over, however small."""

    def choose(self, n_held: int, ballot: Ballot, heirs: tuple[str, ...], now_s: float) -> None:
        """Set `yielding_to`: a greater coordinator, or when handing over any other or an heir."""
        rivals = [peer for peer in self._peers.two_way(now_s) if is_rival(peer)]
        best = max(rivals, key=_size, default=None)
        if best is not None and (self.is_handing_over or _size(best) > (n_held, ballot)):
            self.yielding_to = best.node
        elif self.is_handing_over:
            self.yielding_to = self._next_heir(heirs, now_s)
        else:
            self.yielding_to = None

    def _next_heir(self, heirs: tuple[str, ...], now_s: float) -> str | None:
        """The first heir; every third yield without success, the next."""
        alive = [node for node in heirs if self._peers.is_two_way(node, now_s)]
        return alive[self._n_sent // 3 % len(alive)] if alive else None

    def note_sent(self) -> None:
        self._n_sent += 1

    def accepts(self, offer: Yield, ballot: Ballot) -> bool:
        """Whether to take the sender's hosts; of two that yield to each other the higher ballot does."""
        if self.is_handing_over:
            return False
        return self.yielding_to is None or (self.yielding_to == offer.header.src and ballot > offer.ballot)

    def take(self, offer: Yield, now_s: float) -> None:
        token = Token(offer.release, now_s + self._token_s)
        self._tokens.update(dict.fromkeys([*offer.held, offer.header.src], token))

    def release_of(self, node: str, now_s: float) -> Release | None:
        token = self._tokens.get(node)
        return None if token is None or now_s >= token.until_s else token.release


def is_rival(peer: Peer) -> bool:
    """Whether the peer coordinates and means to go on."""
    return peer.view is not None and peer.view.is_coordinator and not peer.view.is_leaving


def _size(peer: Peer) -> tuple[int, Ballot]:
    assert peer.view is not None
    return (peer.view.n_held, peer.view.ballot)
