"""The host role: judges every order by its own state (rules H1 to H7).

No safety property depends on a clock or on what a coordinator believes; timers only say when a lease is up.
"""

from __future__ import annotations

from hexmesh.membership.epochs import EpochSlots, NamedPlan
from hexmesh.membership.lease import Lease
from hexmesh.membership.notary import Notary
from hexmesh.membership.outputs import Accepted, Admission, Output, Refused, Send
from hexmesh.membership.peers import Peers
from hexmesh.wire.control import (
    Ack,
    Ask,
    Beat,
    Cert,
    CertMessage,
    Complaint,
    Epoch,
    Grant,
    Header,
    Nack,
    Prepare,
    Report,
)

SPREAD_TO_ALL = 32
"""Up to so many hosts everyone tells everyone of a commit; beyond, a chord of the sorted ring."""


class Host:
    """Owner of the lease's and the epochs' transitions."""

    def __init__(
        self,
        node: str,
        boot: int,
        *,
        rank: int,
        lease: Lease,
        slots: EpochSlots,
        peers: Peers,
        notary: Notary,
        outbox: list[Output],
    ) -> None:
        self._node = node
        self._boot = boot
        self._rank = rank
        self._peers = peers
        self._notary = notary
        self._outbox = outbox
        self._n_complaints = 0
        self.lease = lease
        self.slots = slots
        self.is_leaving = False
        self.is_superseded = False
        """Its coordinator decided a later plan that does without this host."""

    def report(self) -> Report:
        return self.slots.report(is_leaving=self.is_leaving)

    # --- H1: leases ---

    def on_ask(self, ask: Ask, now_s: float) -> None:
        if self._may_grant(ask, now_s):
            self.lease.grant(ask.ballot, now_s)
            header = self._peers.header_to(ask.header.src, now_s)
            grant = Grant(header=header, ballot=ask.ballot, rank=self._rank, report=self.report())
            self._outbox.append(Send(ask.header.src, grant))
        else:
            self._nack(ask.header.src, now_s)

    def _may_grant(self, ask: Ask, now_s: float) -> bool:
        if not self._peers.is_two_way(ask.header.src, now_s) or ask.ballot < self.lease.promised:
            return False
        if ask.ballot.owner == self.lease.promised.owner or self.lease.is_free(now_s):
            return True
        return ask.release is not None and self._notary.frees(
            ask.release, self.lease.promised, ask.ballot.owner
        )

    def _nack(self, to: str, now_s: float) -> None:
        header = self._peers.header_to(to, now_s)
        is_free = self.lease.is_free(now_s)
        self._outbox.append(Send(to, Nack(header=header, promised=self.lease.promised, is_free=is_free)))

    # --- H2, H3: orders ---

    def on_beat(self, beat: Beat, now_s: float) -> None:
        if self.lease.is_fenced(beat.ballot):
            self._nack(beat.header.src, now_s)
            return
        if self.lease.is_overtaken(beat.ballot.owner, beat.seq):
            return
        self.lease.note_seq(beat.ballot.owner, beat.seq)
        if self.hears_me(beat.header):
            self.lease.renew(now_s)
        self.lease.promised = beat.ballot
        self.lease.heirs = beat.heirs
        self.follow(beat.ballot.owner, beat.cur, beat.prep, now_s)
        self.ack(now_s)

    def hears_me(self, header: Header) -> bool:
        """Whether the sender heard this very boot lately; only then does a beat renew the lease."""
        return header.hears and header.to_boot == self._boot

    def follow(self, orderer: tuple[str, int], cur: Cert | None, prep: Epoch | None, now_s: float) -> None:
        """Make the wanted state so: commit what is ready, drop what is wanted no more."""
        if cur is not None and self.slots.can_commit(cur):
            self.commit(cur, now_s)
        self.slots.drop_unwanted(orderer, None if cur is None else cur.epoch, prep)
        committed = self.slots.committed_epoch
        self.is_superseded = cur is not None and committed is not None and cur.epoch > committed

    def on_prepare(self, prepare: Prepare, now_s: float) -> None:
        if self.lease.is_fenced(prepare.ballot):
            self._nack(prepare.header.src, now_s)
            return
        self.lease.note_seq(prepare.ballot.owner, prepare.seq)
        self.lease.promised = prepare.ballot
        named = NamedPlan(
            epoch=prepare.epoch,
            digest=prepare.digest,
            hosts=prepare.hosts,
            plan=prepare.plan,
            idle=frozenset(prepare.idle),
        )
        self.slots.prepare(named)

    def ack(self, now_s: float) -> None:
        """Tell the holder the actual state, unless it is this host or the lease expired."""
        holder = self.lease.holder(now_s)
        if holder is None or holder == self._node:
            return
        header = self._peers.header_to(holder, now_s)
        self._outbox.append(
            Send(holder, Ack(header=header, ballot=self.lease.promised, report=self.report()))
        )

    # --- H4: commits ---

    def obeys(self, cert: Cert) -> bool:
        """Whether a certificate alone may commit here: only while its coordinator is the promised one."""
        return self.lease.promised.owner == cert.epoch.ballot.owner

    def on_cert(self, cert: Cert, now_s: float) -> bool:
        """Commit by a certificate that a peer spread; True if that happened."""
        if not self.obeys(cert) or not self.slots.can_commit(cert):
            return False
        self.commit(cert, now_s)
        self.ack(now_s)
        return True

    def commit(self, cert: Cert, now_s: float) -> None:
        named = self.slots.commit(cert, now_s)
        for node in spread_to(self._node, sorted(named.hosts)):
            header = self._peers.header_to(node, now_s)
            self._outbox.append(Send(node, CertMessage(header=header, cert=cert)))

    # --- H6: data ---

    def admit(
        self, epoch: Epoch, *, known: Epoch | None, k: int, cert: Cert | None, now_s: float
    ) -> Admission:
        """Judge step `k` (1 opens) of a sequence that was opened here in epoch `known`, if at all."""
        if known is not None:
            if epoch == known and self.slots.serves(known):
                return Accepted()
            return Refused("the sequence belongs to another epoch", self.slots.cert)
        if k > 1:
            return Refused("the sequence is unknown here", self.slots.cert)
        if cert is not None and cert.epoch == epoch:
            self.on_cert(cert, now_s)
        if epoch == self.slots.committed_epoch:
            return Accepted()
        return Refused("the epoch is not committed here", self.slots.cert)

    # --- news from the driver ---

    def on_ready(self, epoch: Epoch, now_s: float) -> None:
        if self.slots.note_ready(epoch):
            self.ack(now_s)

    def on_failure(self, epoch: Epoch, reason: str, now_s: float) -> None:
        if self.slots.note_failure(epoch, reason):
            self.ack(now_s)

    def complain(self, reason: str, now_s: float) -> None:
        """Ask for a new plan; stands in every report until another epoch is committed."""
        epoch = self.slots.committed_epoch
        if epoch is not None:
            self._n_complaints += 1
            self.slots.complaint = Complaint(n=self._n_complaints, epoch=epoch, reason=reason)
            self.ack(now_s)


def spread_to(node: str, hosts: list[str]) -> list[str]:
    """Whom `node` tells of a commit: all; in a large plan those 1, 2, 4, ... places on in the sorted ring."""
    others = [host for host in hosts if host != node]
    if len(hosts) <= SPREAD_TO_ALL or node not in hosts:
        return others[:SPREAD_TO_ALL]
    place = hosts.index(node)
    return [hosts[(place + 2**i) % len(hosts)] for i in range((len(hosts) - 1).bit_length())]
