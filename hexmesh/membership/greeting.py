"""Hellos: the state that every peer should know, told at intervals and at once when it changes."""

from __future__ import annotations

from hexmesh.membership.host import Host
from hexmesh.membership.outputs import Output, Send
from hexmesh.membership.peers import Peers
from hexmesh.wire.control import Hello

TO_ALL = 32
"""Up to so many peers Hellos go to all; beyond, to a moving sample, the holder and the heirs."""
SAMPLE = 8


class Greeter:
    """Owner of the rhythm: `due_s` is when the next round of Hellos is to be said."""

    def __init__(
        self, *, rank: int, host: Host, peers: Peers, outbox: list[Output], hello_s: float, due_s: float
    ) -> None:
        self._rank = rank
        self._host = host
        self._peers = peers
        self._outbox = outbox
        self._hello_s = hello_s
        self._n_rounds = 0
        self.due_s = due_s
        self.n_held: int | None = None
        """Hosts under this coordinator; None while this host does not coordinate."""

    def greet_all(self, now_s: float) -> None:
        self.due_s = now_s + self._hello_s
        self._n_rounds += 1
        for node in self._targets():
            self.greet(node, now_s)

    def greet(self, node: str, now_s: float) -> None:
        lease = self._host.lease
        hello = Hello(
            header=self._peers.header_to(node, now_s),
            rank=self._rank,
            is_free=lease.is_free(now_s),
            is_leaving=self._host.is_leaving,
            promised=lease.promised,
            is_coordinator=self.n_held is not None,
            ballot=lease.promised,
            n_held=self.n_held or 0,
            cert=self._host.slots.cert,
        )
        self._outbox.append(Send(node, hello))

    def _targets(self) -> list[str]:
        nodes = [peer.node for peer in self._peers]
        if len(nodes) <= TO_ALL or self.n_held is not None:
            return nodes
        start = self._n_rounds * SAMPLE % len(nodes)
        sample = dict.fromkeys((nodes + nodes)[start : start + SAMPLE])
        lease = self._host.lease
        kin = (lease.promised.node, *lease.heirs)
        sample.update(dict.fromkeys(node for node in kin if self._peers.get(node) is not None))
        return list(sample)
