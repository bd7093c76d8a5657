"""The three places a host has for plans: one committed, one prepared, one draining epoch (I7).

Fencing by ballot is the host role's part; here is what depends on the epochs alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hexmesh.membership.notary import Notary
from hexmesh.membership.outputs import (
    Committed,
    DropPrepared,
    Output,
    ReleaseDraining,
    StartPrepare,
)
from hexmesh.wire.control import Cert, Complaint, Epoch, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPlan:
    """An encoded plan with its name; one epoch id means one of these everywhere (I4)."""

    epoch: Epoch
    digest: str
    hosts: dict[str, int]
    plan: bytes
    idle: frozenset[str] = frozenset()

    def suits(self, hosts: Mapping[str, int]) -> bool:
        """Whether the plan is right for `hosts`: all are in it, and none that has a part is missing."""
        if any(self.hosts.get(node) != boot for node, boot in hosts.items()):
            return False
        return self.hosts.keys() - hosts.keys() <= self.idle


@dataclass(slots=True)
class Prepared:
    """The plan being loaded here. Ready is a vote: see `EpochSlots.drop_unwanted`."""

    named: NamedPlan
    is_ready: bool = False
    failure: str | None = None
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CommittedPlan:
    named: NamedPlan
    cert: Cert


@dataclass(frozen=True, slots=True)
class Draining:
    epoch: Epoch
    until_s: float


class EpochSlots:
    """Owner of the slots; every change is also an output."""

    def __init__(self, node: str, boot: int, *, drain_s: float, notary: Notary, outbox: list[Output]) -> None:
        self._node = node
        self._boot = boot
        self._drain_s = drain_s
        self._notary = notary
        self._outbox = outbox
        self.committed: CommittedPlan | None = None
        self.prepared: Prepared | None = None
        self.draining: Draining | None = None
        self.complaint: Complaint | None = None

    @property
    def cert(self) -> Cert | None:
        return None if self.committed is None else self.committed.cert

    @property
    def committed_epoch(self) -> Epoch | None:
        return None if self.committed is None else self.committed.named.epoch

    @property
    def prepared_epoch(self) -> Epoch | None:
        return None if self.prepared is None else self.prepared.named.epoch

    def find(self, epoch: Epoch) -> NamedPlan | None:
        """The plan of that name, if it is committed or prepared here."""
        if self.committed is not None and self.committed.named.epoch == epoch:
            return self.committed.named
        if self.prepared is not None and self.prepared.named.epoch == epoch:
            return self.prepared.named
        return None

    def prepare(self, named: NamedPlan) -> bool:
        """H3 without its fence: take the plan into the prepared slot if it is newer than all here."""
        if named.hosts.get(self._node) != self._boot:
            return False
        if self.committed is not None and named.epoch <= self.committed.named.epoch:
            return False
        if self.prepared is not None:
            if named.epoch <= self.prepared.named.epoch:
                return False
            self._drop_prepared()
        self.prepared = Prepared(named)
        self._outbox.append(StartPrepare(named.epoch, named.plan))
        return True

    def note_ready(self, epoch: Epoch) -> bool:
        if self.prepared is None or self.prepared.named.epoch != epoch or self.prepared.is_ready:
            return False
        self.prepared.is_ready = True
        self.prepared.failure = None
        return True

    def note_fetched(self, n_bytes: int) -> None:
        if self.prepared is not None:
            self.prepared.fetched_bytes = n_bytes

    def note_failure(self, epoch: Epoch, reason: str) -> bool:
        if self.prepared is None or self.prepared.named.epoch != epoch or self.prepared.is_ready:
            return False
        self.prepared.failure = reason
        return True

    def drop_unwanted(self, orderer: tuple[str, int], cur: Epoch | None, prep: Epoch | None) -> None:
        """In-order abort: the coordinator wants neither as `cur` nor as `prep` what is prepared here.

        A predecessor's epoch is kept until the coordinator has a plan of its own (it may yet adopt it).
        """
        if self.prepared is None:
            return
        epoch = self.prepared.named.epoch
        is_orderers = epoch.ballot.owner == orderer
        if epoch not in (cur, prep) and (is_orderers or cur is not None):
            self._drop_prepared()

    def _drop_prepared(self) -> None:
        assert self.prepared is not None
        self._outbox.append(DropPrepared(self.prepared.named.epoch))
        self.prepared = None

    def can_commit(self, cert: Cert) -> bool:
        """H4 without its fence."""
        prepared = self.prepared
        if prepared is None or not prepared.is_ready or prepared.named.epoch != cert.epoch:
            return False
        if self.committed is not None and cert.epoch <= self.committed.named.epoch:
            return False
        return prepared.named.digest == cert.digest and self._notary.is_genuine(cert)

    def commit(self, cert: Cert, now_s: float) -> NamedPlan:
        """Move prepared to committed and committed to draining; what was draining is released by force."""
        assert self.prepared is not None
        named = self.prepared.named
        if self.draining is not None:
            self._release(is_forced=True)
        if self.committed is not None:
            self.draining = Draining(self.committed.named.epoch, now_s + self._drain_s)
        self.committed = CommittedPlan(named, cert)
        self.prepared = None
        self.complaint = None
        old = None if self.draining is None else self.draining.epoch
        self._outbox.append(Committed(named.epoch, cert, old))
        return named

    def note_drained(self, epoch: Epoch) -> None:
        if self.draining is not None and self.draining.epoch == epoch:
            self._release(is_forced=False)

    def release_overdue(self, now_s: float) -> None:
        """H7: a drain that takes too long ends by force."""
        if self.draining is not None and now_s >= self.draining.until_s:
            self._release(is_forced=True)

    def _release(self, *, is_forced: bool) -> None:
        assert self.draining is not None
        self._outbox.append(ReleaseDraining(self.draining.epoch, is_forced))
        self.draining = None

    def serves(self, epoch: Epoch) -> bool:
        """Whether a sequence that was opened in `epoch` may go on here."""
        return epoch == self.committed_epoch or (self.draining is not None and epoch == self.draining.epoch)

    def report(self, *, is_leaving: bool) -> Report:
        prepared = self.prepared
        return Report(
            committed=self.cert,
            prepared=None if prepared is None else prepared.named.epoch,
            is_ready=prepared is not None and prepared.is_ready,
            failure=None if prepared is None else prepared.failure,
            fetched_bytes=0 if prepared is None else prepared.fetched_bytes,
            draining=None if self.draining is None else self.draining.epoch,
            complaint=self.complaint,
            is_leaving=is_leaving,
        )
