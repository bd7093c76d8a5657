"""One daemon boot's part in coordination: the host that obeys, and the coordinator that it may be.

Contract: every input method takes `now_s` (monotonic seconds of this host, never going back) and returns
the outputs to carry out, in order. Call `tick` at `next_wakeup_s(now_s)` at the latest, asked again after
every input; more often does no harm. Nothing here reads a clock, a socket or the environment. One instance
serves one boot; a restart makes a new one with a fresh random boot, which starts with nothing committed.

    coordination = Coordination(
        node, boot, rank=0, timers=Timers(), sign=sign, verify=verify, highest_term_seen=0,
        rng=random.Random(), now_s=loop.time(), min_nodes=1,
    )
    coordination.peer_reachable(other, now_s)          # an address is known: Hellos flow
    coordination.receive(message, now_s)               # a ControlMessage came in
    coordination.tick(now_s)
    coordination.plan_ready(request_id, plan, now_s)   # the answer to PlanWanted
    coordination.prepared_locally(epoch, now_s)        # the answer to StartPrepare
    coordination.drained(epoch, now_s)                 # sequences of a draining epoch ended

A host is coordinator exactly while its own lease is its own: it stands by granting itself, and steps down by
granting itself away.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import assert_never

from hexmesh.membership.coordinator import Coordinator, Tools
from hexmesh.membership.epochs import EpochSlots
from hexmesh.membership.flaps import Flaps
from hexmesh.membership.greeting import Greeter
from hexmesh.membership.host import Host
from hexmesh.membership.lease import Lease
from hexmesh.membership.members import MemberView, view_peer, view_self
from hexmesh.membership.notary import Notary, Sign, Verify
from hexmesh.membership.outputs import (
    Accepted,
    Admission,
    BecameCoordinator,
    CoordinatorChanged,
    LeaveComplete,
    LostCoordinator,
    Output,
    PersistTerm,
    PlanEnvelope,
)
from hexmesh.membership.peers import Peers
from hexmesh.membership.planner import Counters
from hexmesh.membership.quarantine import Quarantine
from hexmesh.membership.standing import Standing
from hexmesh.membership.terms import Terms
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import (
    Ack,
    Ask,
    Ballot,
    Beat,
    Cert,
    CertMessage,
    ControlMessage,
    Epoch,
    Grant,
    Hello,
    Nack,
    Prepare,
    Yield,
)

FREE_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Announced:
    """What peers and the driver were last told."""

    holder: str | None
    is_coordinator: bool
    is_leaving: bool


class Coordination:
    """Owner of all coordination state of one boot. See the module's contract."""

    def __init__(
        self,
        node: str,
        boot: int,
        *,
        rank: int,
        timers: Timers,
        sign: Sign,
        verify: Verify,
        highest_term_seen: int,
        rng: random.Random,
        now_s: float,
        min_nodes: int = 1,
        takes_part: bool = True,
    ) -> None:
        """`takes_part` False: greet and listen only, until `take_part`."""
        if not 0 < boot < 2**63:
            raise ValueError(f"boot must be a positive 63 bit number, got {boot}")
        self.node = node
        self.boot = boot
        self.rank = rank
        self._timers = timers
        self._outbox: list[Output] = []
        self._peers = Peers(node, boot, timers.hear_s)
        self._notary = Notary(sign, verify)
        self._terms = Terms(highest_term_seen)
        self._persisted_term = highest_term_seen
        self._lease = Lease(node, boot, timers.lease_s, now_s)
        slots = EpochSlots(node, boot, drain_s=timers.drain_s, notary=self._notary, outbox=self._outbox)
        self._host = Host(
            node,
            boot,
            rank=rank,
            lease=self._lease,
            slots=slots,
            peers=self._peers,
            notary=self._notary,
            outbox=self._outbox,
        )
        self._tools = Tools(
            node=node,
            boot=boot,
            min_nodes=min_nodes,
            timers=timers,
            host=self._host,
            peers=self._peers,
            notary=self._notary,
            terms=self._terms,
            counters=Counters(),
            quarantine=Quarantine(timers.quarantine_s),
            flaps=Flaps(window_s=timers.flap_window_s, first_s=timers.flap_s, longest_s=timers.flap_max_s),
            outbox=self._outbox,
        )
        self._coordinator: Coordinator | None = None
        self._standing = Standing.at_start(node, rank, timers, rng, now_s)
        self._announced = _Announced(None, False, False)
        self._was_free = True
        self._greeter = Greeter(
            rank=rank,
            host=self._host,
            peers=self._peers,
            outbox=self._outbox,
            hello_s=timers.hello_s,
            due_s=now_s + rng.random() * timers.hello_s,
        )
        self._has_left = False
        self._takes_part = takes_part

    # --- inputs ---

    def take_part(self, now_s: float) -> list[Output]:
        """From now on this host may stand and be leased. What it heard before counts as having listened."""
        self._takes_part = True
        self._standing.restart(now_s)
        return self.tick(now_s)

    def receive(self, message: ControlMessage, now_s: float) -> list[Output]:
        """Take in a message of a peer; one that was meant for another boot of this host is dropped."""
        header = message.header
        if header.src == self.node or not _is_own_claim(message):
            return []
        is_misaddressed = header.to_boot not in (None, self.boot)
        if is_misaddressed and not isinstance(message, Hello):
            return []
        if any(self._terms.is_leap(ballot) for ballot in _ballots_in(message)):
            return []
        self._note_terms(message)
        if self._peers.hear(header, now_s):
            self._note_rebirth(header.src, now_s)
        self._dispatch(message, now_s)
        return self._finish(now_s)

    def tick(self, now_s: float) -> list[Output]:
        """Let time do its work."""
        self._note_freedom(now_s)
        self._host.slots.release_overdue(now_s)
        if self._coordinator is not None:
            self._coordinator.tick(now_s)
        elif self._may_stand(now_s):
            self._stand("no coordinator", now_s)
        if now_s >= self._greeter.due_s:
            self._greet_all(now_s)
        return self._finish(now_s)

    def peer_reachable(self, node: str, now_s: float) -> list[Output]:
        """An address of `node` is known: greet it from now on."""
        if node != self.node and self._peers.get(node) is None:
            self._peers.add(node)
            self._greet(node, now_s)
        return self._finish(now_s)

    def peer_forgotten(self, node: str, now_s: float) -> list[Output]:
        """`node` is no longer a peer: its address is gone for good, or its membership was revoked."""
        self._peers.forget(node)
        self._note_gone(node, "no longer a peer", now_s)
        return self._finish(now_s)

    def connection_refused(self, node: str, now_s: float) -> list[Output]:
        """C2: the connection to `node` was reset and dialling it again was refused: do not wait for it."""
        self._peers.silence(node)
        self._note_gone(node, "connection refused", now_s)
        return self._finish(now_s)

    def plan_ready(self, request_id: int, plan: PlanEnvelope | None, now_s: float) -> list[Output]:
        """The answer to a PlanWanted; None: no plan is possible for those hosts.

        Raises ValueError if the plan is for other hosts than were asked for.
        """
        if self._coordinator is not None:
            self._coordinator.answer(request_id, plan, now_s)
        return self._finish(now_s)

    def prepared_locally(self, epoch: Epoch, now_s: float) -> list[Output]:
        """All that `epoch` needs is loaded here."""
        self._host.on_ready(epoch, now_s)
        return self._finish_own_report(now_s)

    def prepare_failed(self, epoch: Epoch, reason: str, now_s: float) -> list[Output]:
        """`epoch` cannot be loaded here; the coordinator plans without this host for a while."""
        self._host.on_failure(epoch, reason, now_s)
        return self._finish_own_report(now_s)

    def prepare_fetched(self, n_bytes: int) -> None:
        """So many bytes of weights came for what is being prepared; the next ack tells it."""
        self._host.slots.note_fetched(n_bytes)

    def drained(self, epoch: Epoch, now_s: float) -> list[Output]:
        """The last sequence of a draining epoch ended."""
        self._host.slots.note_drained(epoch)
        return self._finish(now_s)

    def replan(self, reason: str, now_s: float) -> list[Output]:
        """Ask for a new plan for the same hosts; from a host that does not coordinate it travels in acks."""
        if self._coordinator is not None:
            self._coordinator.force(reason, now_s)
        else:
            self._host.complain(reason, now_s)
        return self._finish(now_s)

    def complain(self, reason: str, now_s: float) -> list[Output]:
        """Ask for a new plan because something of this host's broke; the plan's reason names the host."""
        return self.replan(reason if self._coordinator is None else f"node {self.node}: {reason}", now_s)

    def leave(self, now_s: float) -> list[Output]:
        """Leave gracefully: no plan uses this host any more; LeaveComplete says when to stop serving."""
        self._host.is_leaving = True
        self._host.ack(now_s)
        if self._coordinator is not None:
            self._coordinator.hand_over(now_s)
            self._coordinator.tick(now_s)
        return self._finish(now_s)

    def admit_epoch(
        self, epoch: Epoch, *, known_epoch: Epoch | None, k: int, cert: Cert | None, now_s: float
    ) -> Admission:
        """H6: judge step `k` (1 opens) of an attempt that was opened here in `known_epoch`, if at all.

        An Open that carries the certificate of the prepared epoch commits it first; carry out `outputs` then.
        """
        verdict = self._host.admit(epoch, known=known_epoch, k=k, cert=cert, now_s=now_s)
        outputs = self._finish_own_report(now_s)
        if not outputs:
            return verdict
        if isinstance(verdict, Accepted):
            return Accepted(outputs)
        return type(verdict)(verdict.reason, verdict.cert, outputs)

    def serves(self, epoch: Epoch) -> bool:
        """Whether steps of `epoch` run here. Changes nothing: it is asked for every step."""
        return self._host.slots.serves(epoch)

    def learn_cert(self, cert: Cert, now_s: float) -> list[Output]:
        """A certificate that came with a Refuse: commit it if that may be done here (H4)."""
        if self._terms.is_leap(cert.epoch.ballot):
            return []
        self._terms.see(cert.epoch.ballot)
        self._host.on_cert(cert, now_s)
        return self._finish_own_report(now_s)

    # --- snapshots ---

    @property
    def is_coordinator(self) -> bool:
        return self._coordinator is not None

    @property
    def coordinator(self) -> str | None:
        """Whom this host is leased to, as last announced; None while its lease has expired."""
        return self._announced.holder

    @property
    def promised(self) -> Ballot:
        return self._lease.promised

    @property
    def term(self) -> int:
        return self._lease.promised.term

    @property
    def committed(self) -> Epoch | None:
        return self._host.slots.committed_epoch

    @property
    def cert(self) -> Cert | None:
        return self._host.slots.cert

    @property
    def committed_plan(self) -> bytes | None:
        committed = self._host.slots.committed
        return None if committed is None else committed.named.plan

    @property
    def committed_hosts(self) -> dict[str, int]:
        committed = self._host.slots.committed
        return {} if committed is None else dict(committed.named.hosts)

    @property
    def prepared(self) -> Epoch | None:
        return self._host.slots.prepared_epoch

    @property
    def draining(self) -> Epoch | None:
        draining = self._host.slots.draining
        return None if draining is None else draining.epoch

    @property
    def draining_until_s(self) -> float | None:
        """When what still runs in the draining epoch is released by force."""
        draining = self._host.slots.draining
        return None if draining is None else draining.until_s

    @property
    def held(self) -> dict[str, int]:
        """Hosts under this coordinator with their boots, its own included; empty on other hosts."""
        if self._coordinator is None:
            return {}
        held = {host.node: host.boot for host in self._coordinator.held.values()}
        return {**held, self.node: self.boot}

    @property
    def decided(self) -> Epoch | None:
        """The coordinator's decided or adopted epoch; None on other hosts."""
        cert = None if self._coordinator is None else self._coordinator.planner.cur_cert
        return None if cert is None else cert.epoch

    @property
    def plan_reason(self) -> str | None:
        """Why the coordinator made its newest plan; None on other hosts."""
        return None if self._coordinator is None else self._coordinator.planner.reason

    @property
    def is_at_rest(self) -> bool:
        """Whether this host coordinates and no other plan than the decided one is on its way."""
        return self._coordinator is not None and self._coordinator.planner.is_at_rest

    @property
    def is_leaving(self) -> bool:
        return self._host.is_leaving

    def hears(self, node: str, now_s: float) -> bool:
        """Whether `node` was heard lately and said that it hears this boot; always so of this node itself."""
        return node == self.node or self._peers.is_two_way(node, now_s)

    def members(self, now_s: float) -> dict[str, MemberView]:
        """Every known node, this one included, as seen from here."""
        held = self.held
        views = {
            peer.node: view_peer(
                peer,
                self._peers,
                self._tools.quarantine,
                self._tools.flaps,
                is_held=peer.node in held,
                now_s=now_s,
            )
            for peer in self._peers
        }
        return {**views, self.node: view_self(self.boot, now_s)}

    def next_wakeup_s(self, now_s: float) -> float:
        """When to call `tick` at the latest."""
        wakeup_s = self._greeter.due_s
        draining = self._host.slots.draining
        if draining is not None:
            wakeup_s = min(wakeup_s, draining.until_s)
        if self._coordinator is not None:
            return min(wakeup_s, self._coordinator.next_wakeup_s(now_s))
        if self._lease.is_free(now_s):
            due_s = self._standing.due_s(self._lease, self._peers, now_s)
            return min(wakeup_s, max(due_s, now_s + FREE_POLL_S))
        return min(wakeup_s, self._lease.until_s)

    # --- messages ---

    def _dispatch(self, message: ControlMessage, now_s: float) -> None:
        match message:
            case Hello():
                self._on_hello(message, now_s)
            case Ask():
                if self._takes_part:
                    self._host.on_ask(message, now_s)
            case Beat():
                self._host.on_beat(message, now_s)
            case Prepare():
                self._host.on_prepare(message, now_s)
            case CertMessage():
                self._on_cert(message.cert, now_s)
            case Yield():
                self._on_yield(message, now_s)
            case Grant():
                if self._coordinator is not None:
                    self._coordinator.on_grant(message, now_s)
            case Ack():
                if self._coordinator is not None:
                    self._coordinator.on_ack(message, now_s)
            case Nack():
                if self._coordinator is not None:
                    self._coordinator.on_nack(message, now_s)
            case _:
                assert_never(message)

    def _on_hello(self, hello: Hello, now_s: float) -> None:
        peer = self._peers.add(hello.header.src)
        is_new = peer.view is None
        peer.view = hello
        if is_new or hello.header.to_boot != self.boot:
            self._greet(peer.node, now_s)
        if self._coordinator is not None:
            self._coordinator.on_hello(hello, now_s)
        elif self._has_stepped_down(hello):
            self._lease.end_within(self._timers.refused_lease_s, now_s)
        if hello.cert is not None:
            self._on_cert(hello.cert, now_s)

    def _has_stepped_down(self, hello: Hello) -> bool:
        """Whether this host's holder says itself that it is leased to another since."""
        promised = self._lease.promised
        return promised.owner == (hello.header.src, hello.header.boot) and (
            hello.promised > promised and hello.promised.owner != promised.owner
        )

    def _on_cert(self, cert: Cert, now_s: float) -> None:
        if self._host.on_cert(cert, now_s) and self._coordinator is not None:
            self._coordinator.own_report_changed(now_s)

    def _on_yield(self, offer: Yield, now_s: float) -> None:
        if self._coordinator is not None:
            self._coordinator.on_yield(offer, now_s)
        elif self._may_inherit(offer, now_s):
            self._stand(f"node {offer.header.src} handed over", now_s).take_over(offer, now_s)

    def _may_inherit(self, offer: Yield, now_s: float) -> bool:
        """Whether this host's own holder hands over to it."""
        return (
            not self.is_leaving
            and self._peers.is_two_way(offer.header.src, now_s)
            and self._notary.frees(offer.release, self._lease.promised, (self.node, self.boot))
        )

    # --- the lease's ends ---

    def _may_stand(self, now_s: float) -> bool:
        if not self._takes_part or self.is_leaving or not self._lease.is_free(now_s):
            return False
        return now_s >= self._standing.due_s(self._lease, self._peers, now_s)

    def _stand(self, why: str, now_s: float) -> Coordinator:
        """Grant this host to itself: from now on it coordinates at least itself."""
        ballot = Ballot(term=self._terms.next(), rank=self.rank, node=self.node, boot=self.boot)
        self._lease.grant(ballot, now_s)
        self._outbox.append(BecameCoordinator(ballot, why))
        self._coordinator = Coordinator(self._tools, ballot, now_s)
        self._coordinator.tick(now_s)
        return self._coordinator

    def _step_down_if_granted_away(self) -> None:
        if self._coordinator is not None and not self._lease.is_own:
            self._coordinator = None
            self._outbox.append(LostCoordinator(f"leased to {self._lease.promised.node}"))

    def _note_rebirth(self, node: str, now_s: float) -> None:
        """Another boot of a peer speaks: the boot that we knew is gone."""
        self._note_gone(node, "restarted", now_s)

    def _note_gone(self, node: str, reason: str, now_s: float) -> None:
        if self._coordinator is not None:
            self._coordinator.drop(node, reason, now_s)
        elif self._lease.promised.node == node:
            self._lease.end_within(self._timers.refused_lease_s, now_s)

    def _note_terms(self, message: ControlMessage) -> None:
        match message:
            case Hello() | Nack():
                self._terms.see(message.promised)
            case Ask() | Beat() | Prepare() | Yield():
                self._terms.see(message.ballot)
            case CertMessage():
                self._terms.see(message.cert.epoch.ballot)
            case Grant() | Ack():
                pass
            case _:
                assert_never(message)

    # --- after every input ---

    def _finish_own_report(self, now_s: float) -> list[Output]:
        if self._coordinator is not None:
            self._coordinator.own_report_changed(now_s)
        return self._finish(now_s)

    def _finish(self, now_s: float) -> list[Output]:
        """Notice what changed, tell it, and hand out what is to be done."""
        self._step_down_if_granted_away()
        self._note_freedom(now_s)
        self._announce(now_s)
        self._complete_leave()
        if self._terms.highest > self._persisted_term:
            self._persisted_term = self._terms.highest
            self._outbox.append(PersistTerm(self._persisted_term))
        outputs = self._outbox[:]
        self._outbox.clear()
        return outputs

    def _note_freedom(self, now_s: float) -> None:
        is_free = self._lease.is_free(now_s)
        if is_free and not self._was_free:
            self._standing.restart(now_s)
        self._was_free = is_free

    def _announce(self, now_s: float) -> None:
        """A change of holder is told at once: polled views make stand-ups collide."""
        now = _Announced(self._lease.holder(now_s), self._coordinator is not None, self.is_leaving)
        if now == self._announced:
            return
        if now.holder != self._announced.holder:
            self._outbox.append(CoordinatorChanged(now.holder))
        self._announced = now
        self._greet_all(now_s)

    def _greet_all(self, now_s: float) -> None:
        self._greeter.n_held = None if self._coordinator is None else self._coordinator.n_held
        self._greeter.greet_all(now_s)

    def _greet(self, node: str, now_s: float) -> None:
        self._greeter.n_held = None if self._coordinator is None else self._coordinator.n_held
        self._greeter.greet(node, now_s)

    def _complete_leave(self) -> None:
        if not self.is_leaving or self._has_left:
            return
        reason = self._why_left()
        if reason is not None:
            self._has_left = True
            self._outbox.append(LeaveComplete(reason))

    def _why_left(self) -> str | None:
        if self._host.slots.committed is None and self._coordinator is None:
            return "serves nothing"
        if self._coordinator is not None and not self._coordinator.held:
            return "no other host is held"
        if self._host.is_superseded:
            return "a later plan does without this host"
        committed = self._host.slots.committed
        if self._coordinator is None and committed is not None and self.node in committed.named.idle:
            return "the plan has no part for this host"
        return None


def _ballots_in(message: ControlMessage) -> tuple[Ballot, ...]:
    """Every ballot that the receiver would count on from, or keep."""
    match message:
        case Hello():
            cert = () if message.cert is None else (message.cert.epoch.ballot,)
            return (message.promised, message.ballot, *cert)
        case Nack():
            return (message.promised,)
        case Prepare():
            return (message.ballot, message.epoch.ballot)
        case CertMessage():
            return (message.cert.epoch.ballot,)
        case Ask() | Beat() | Yield() | Grant() | Ack():
            return (message.ballot,)
        case _:
            assert_never(message)


def _is_own_claim(message: ControlMessage) -> bool:
    """Whether orders are given under the sender's own ballot."""
    match message:
        case Ask() | Beat() | Prepare() | Yield():
            return message.ballot.owner == (message.header.src, message.header.boot)
        case _:
            return True
