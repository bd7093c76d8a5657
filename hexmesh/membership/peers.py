"""The peers' table: whom this host hears, and who hears it.

Leases are asked for and renewed only on two-way evidence; a link that works in one direction is no link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hexmesh.wire.control import Header, Hello

NEVER_S = float("-inf")


@dataclass(slots=True)
class Peer:
    """What is known of one peer. Owned by `Peers`."""

    node: str
    boot: int | None = None
    last_heard_s: float = NEVER_S
    hears_me: bool = False
    view: Hello | None = None


class Peers:
    """Owner of the table; `hear_s` is how long a sign of life lasts."""

    def __init__(self, node: str, boot: int, hear_s: float) -> None:
        self._node = node
        self._boot = boot
        self._hear_s = hear_s
        self._peers: dict[str, Peer] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, node: str) -> Peer | None:
        return self._peers.get(node)

    def add(self, node: str) -> Peer:
        """The peer's entry, made if there is none."""
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = Peer(node)
        return peer

    def forget(self, node: str) -> None:
        self._peers.pop(node, None)

    def silence(self, node: str) -> None:
        """Stop counting the peer as heard until it speaks again."""
        peer = self._peers.get(node)
        if peer is not None:
            peer.last_heard_s = NEVER_S

    def hear(self, header: Header, now_s: float) -> bool:
        """Note a sign of life; True if the peer speaks with another boot than before."""
        peer = self.add(header.src)
        is_reborn = peer.boot is not None and peer.boot != header.boot
        if is_reborn:
            peer.view = None
        peer.boot = header.boot
        peer.last_heard_s = now_s
        peer.hears_me = header.hears and header.to_boot == self._boot
        return is_reborn

    def header_to(self, node: str, now_s: float) -> Header:
        peer = self._peers.get(node)
        if peer is None:
            return Header(src=self._node, boot=self._boot, to_boot=None, hears=False)
        hears = now_s - peer.last_heard_s <= self._hear_s
        return Header(src=self._node, boot=self._boot, to_boot=peer.boot, hears=hears)

    def is_heard(self, peer: Peer, now_s: float) -> bool:
        return now_s - peer.last_heard_s <= self._hear_s

    def is_two_way(self, node: str, now_s: float) -> bool:
        peer = self._peers.get(node)
        return peer is not None and peer.hears_me and now_s - peer.last_heard_s <= self._hear_s

    def two_way(self, now_s: float) -> list[Peer]:
        """Peers that are heard and that hear this boot."""
        horizon_s = now_s - self._hear_s
        return [peer for peer in self._peers.values() if peer.hears_me and peer.last_heard_s >= horizon_s]

    def heard(self, now_s: float) -> list[Peer]:
        horizon_s = now_s - self._hear_s
        return [peer for peer in self._peers.values() if peer.last_heard_s >= horizon_s]
