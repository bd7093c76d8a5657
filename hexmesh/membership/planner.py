"""The coordinator's plan: when a new one is due, who must be ready for it, and when it is decided (C6 to C9).

Three stages, each at most one: `request` (asked of the driver's planner), `prep` (hosts are loading), `cur`
(decided or adopted). A decision is taken once, in this process, before anything is sent, and never undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hexmesh.membership.epochs import EpochSlots, NamedPlan
from hexmesh.membership.notary import Notary
from hexmesh.membership.outputs import Output, PlanEnvelope, PlanImpossible, PlanWanted
from hexmesh.membership.quarantine import Quarantine
from hexmesh.membership.settle import Settle
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import Ballot, Cert, Epoch, Report


@dataclass(slots=True)
class Counters:
    """Counts of one boot; they outlive a reign, so that no name is ever used twice."""

    n_plans: int = 0
    n_requests: int = 0
    seq: int = 0

    def next_plan(self) -> int:
        self.n_plans += 1
        return self.n_plans

    def next_request(self) -> int:
        self.n_requests += 1
        return self.n_requests

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the coordinator holds at the moment of a step."""

    hosts: dict[str, int]
    """The target set: leased hosts that a plan may use."""
    reports: Mapping[str, Report]
    excluded: dict[str, str]
    is_waiting: bool
    why_lost: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Decided:
    named: NamedPlan
    cert: Cert


@dataclass(frozen=True, slots=True)
class Preparing:
    named: NamedPlan
    reason: str
    since_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a host has fetched for `prep`, and when that grew last."""

    n_bytes: int
    grew_at_s: float


@dataclass(frozen=True, slots=True)
class Request:
    request_id: int
    hosts: dict[str, int]
    reason: str


def is_prepared(report: Report, epoch: Epoch) -> bool:
    """Whether the host may be counted on for `epoch`: ready for it, or past it."""
    return (report.prepared == epoch and report.is_ready) or has_committed(report, epoch)


def has_committed(report: Report, epoch: Epoch) -> bool:
    return report.committed is not None and report.committed.epoch == epoch


def lacks(report: Report, epoch: Epoch) -> bool:
    """Whether the host must be sent the plan (again)."""
    return report.prepared != epoch and not has_committed(report, epoch)


class Planner:
    """Owner of `cur`, `prep` and `request` for one reign."""

    def __init__(
        self,
        *,
        owner: tuple[str, int],
        timers: Timers,
        min_nodes: int,
        counters: Counters,
        slots: EpochSlots,
        quarantine: Quarantine,
        notary: Notary,
        outbox: list[Output],
        now_s: float,
    ) -> None:
        self._owner = owner
        self._timers = timers
        self._min_nodes = min_nodes
        self._counters = counters
        self._slots = slots
        self._quarantine = quarantine
        self._notary = notary
        self._outbox = outbox
        self._settle = Settle(timers, now_s)
        self._request: Request | None = None
        self._unanswered_since_s: float | None = None
        self._impossible: dict[str, int] | None = None
        self._last_impossible: dict[str, int] | None = None
        self._forced: str | None = None
        self._complaints: dict[tuple[str, Epoch], int] = {}
        self._fetches: dict[str, Fetch] = {}
        self._prep_due_s = float("inf")
        self.cur: Decided | None = None
        self.prep: Preparing | None = None
        self.reason: str | None = None
        """Why `prep`, else `cur`, was planned."""

    @property
    def cur_cert(self) -> Cert | None:
        return None if self.cur is None else self.cur.cert

    @property
    def prep_epoch(self) -> Epoch | None:
        return None if self.prep is None else self.prep.named.epoch

    def wanted_by(self, node: str) -> NamedPlan | None:
        """The plan that `node` should have: the one in preparation, else the decided one (C8)."""
        if self.prep is not None and node in self.prep.named.hosts:
            return self.prep.named
        if self.cur is not None and node in self.cur.named.hosts:
            return self.cur.named
        return None

    def is_known_impossible(self, hosts: dict[str, int]) -> bool:
        """Whether these were the last hosts for which the driver found no plan, even if there is one for others."""
        return self._last_impossible == hosts

    @property
    def is_at_rest(self) -> bool:
        """Nothing is asked for, planned or prepared."""
        return self._forced is None and self._request is None and self.prep is None

    def is_overdue(self, now_s: float) -> bool:
        """C9: the driver's planner made no progress for its deadline."""
        since_s = self._unanswered_since_s
        return since_s is not None and now_s - since_s >= self._timers.plan_deadline_s

    def next_wakeup_s(self, now_s: float) -> float:
        """When time alone may change something."""
        wakeup_s = float("inf") if self.prep is None else self._prep_due_s
        if self._unanswered_since_s is not None:
            wakeup_s = min(wakeup_s, self._unanswered_since_s + self._timers.plan_deadline_s)
        return min(wakeup_s, self._settle.next_wakeup_s(now_s))

    def force(self, reason: str) -> None:
        """Plan anew although the set of hosts is the same."""
        self._forced = reason
        self._impossible = self._last_impossible = None

    def step(self, now: Situation, now_s: float) -> bool:
        """Bring `prep` to its end, and ask for a plan when one is due and the hosts have settled.

        True: a host went into quarantine, so step again with what is left.
        """
        self._settle.observe(now.hosts, now_s)
        if self._quarantine_failed(now, now_s) or self._advance_prep(now, now_s):
            return True
        self._heed_complaints(now)
        if not self._is_due(now, now_s):
            self._settle.answered()
        elif self._settle.is_settled(now_s, is_waiting=now.is_waiting):
            self._answer_need(now, now_s)
        return False

    def _answer_need(self, now: Situation, now_s: float) -> None:
        if not self._adopt(now):
            if self._is_too_few(now):
                return
            self._ask_for_plan(now, now_s)
        self._settle.answered()

    # --- prep: abort, decide (C7) ---

    def _advance_prep(self, now: Situation, now_s: float) -> bool:
        """Abort, decide or time out; True if hosts were quarantined for being late."""
        prep = self.prep
        if prep is None:
            return False
        named = prep.named
        here = {node for node, boot in named.hosts.items() if now.hosts.get(node) == boot}
        if not named.hosts.keys() - here <= named.idle:
            self.prep = None
            return False
        unready = [node for node in sorted(here) if not is_prepared(now.reports[node], named.epoch)]
        if not unready:
            self.cur = Decided(named, self._notary.certify(named.epoch, named.digest))
            self.prep = None
            return False
        deadlines = {node: self._deadline_s(node, now.reports[node], prep, now_s) for node in unready}
        self._prep_due_s = min(deadlines.values())
        late = [node for node, deadline_s in deadlines.items() if now_s >= deadline_s]
        if not late:
            return False
        for node in late:
            reason = f"not ready in {now_s - prep.since_s:.0f} s"
            self._quarantine.put(node, named.hosts[node], reason, now_s)
        self.prep = None
        return True

    def _deadline_s(self, node: str, report: Report, prep: Preparing, now_s: float) -> float:
        """When an unready host is late: a fetch of weights that goes on, however slowly, puts it off."""
        fetch = self._fetches.get(node, Fetch(0, -float("inf")))
        if report.prepared == prep.named.epoch and report.fetched_bytes > fetch.n_bytes:
            fetch = self._fetches[node] = Fetch(report.fetched_bytes, now_s)
        return max(prep.until_s, fetch.grew_at_s + self._timers.prep_timeout_s)

    def _quarantine_failed(self, now: Situation, now_s: float) -> bool:
        """Hosts that cannot load the plan they should have; True if there are any."""
        failed = {}
        for node in now.hosts:
            report, wanted = now.reports[node], self.wanted_by(node)
            if report.failure is not None and wanted is not None and report.prepared == wanted.epoch:
                failed[node] = report.failure
        for node, failure in failed.items():
            self._quarantine.put(node, now.hosts[node], failure, now_s)
        return bool(failed)

    def _heed_complaints(self, now: Situation) -> None:
        """A host calls its committed epoch broken: plan anew, once per complaint."""
        if self.cur is None:
            return
        for node in now.hosts:
            complaint = now.reports[node].complaint
            if complaint is None or complaint.epoch != self.cur.named.epoch:
                continue
            if self._complaints.get((node, complaint.epoch), 0) < complaint.n:
                self._complaints[node, complaint.epoch] = complaint.n
                self.force(f"node {node}: {complaint.reason}")

    # --- when a plan is due (C6) ---

    def _is_due(self, now: Situation, now_s: float) -> bool:
        if not now.hosts:
            return False
        if self._forced is not None:
            return True
        if self._request is not None:
            return now.hosts != self._request.hosts
        if self.prep is not None:
            is_young = now_s - self.prep.since_s < self._timers.prep_restart_s
            return is_young and not self.prep.named.suits(now.hosts)
        if self._impossible == now.hosts:
            return False
        return self.cur is None or not self.cur.named.suits(now.hosts) or self._who_is_ahead(now) is not None

    def _who_is_ahead(self, now: Situation) -> str | None:
        """A host that can never commit `cur`, because it obeyed another coordinator's later plan."""
        assert self.cur is not None
        epoch = self.cur.named.epoch
        for node in now.hosts:
            report = now.reports[node]
            if report.committed is not None and report.committed.epoch > epoch:
                return node
            if (
                report.prepared is not None
                and report.prepared > epoch
                and not has_committed(report, epoch)
                and not self._is_own(report.prepared)
            ):
                return node
        return None

    def _is_own(self, epoch: Epoch) -> bool:
        return self._owner == epoch.ballot.owner

    def _is_too_few(self, now: Situation) -> bool:
        """No first plan before `min_nodes` are held; later plans take what there is."""
        is_first = self.cur is None and not any(report.committed for report in now.reports.values())
        return is_first and len(now.hosts) < self._min_nodes

    def _adopt(self, now: Situation) -> bool:
        """Take over the highest committed epoch if it fits the hosts and all have it: no new epoch then."""
        if self._forced is not None:
            return False
        certs = [report.committed for report in now.reports.values() if report.committed is not None]
        if not certs:
            return False
        cert = max(certs, key=lambda cert: cert.epoch)
        named = self._slots.find(cert.epoch)
        if named is None or not named.suits(now.hosts) or named.digest != cert.digest:
            return False
        if not all(is_prepared(now.reports[node], cert.epoch) for node in now.hosts):
            return False
        if self.cur is not None and self.cur.named.epoch >= cert.epoch:
            return False
        if not self._notary.is_genuine(cert):
            return False
        self.cur, self.prep, self._request, self._unanswered_since_s = Decided(named, cert), None, None, None
        self.reason = "adopted"
        return True

    # --- asking the driver (C6, C9) ---

    def _ask_for_plan(self, now: Situation, now_s: float) -> None:
        reason = self._forced or self._why(now)
        self._request = Request(self._counters.next_request(), dict(now.hosts), reason)
        self._forced = None
        if self._unanswered_since_s is None:
            self._unanswered_since_s = now_s
        self._outbox.append(
            PlanWanted(
                request_id=self._request.request_id,
                hosts=dict(now.hosts),
                reason=reason,
                excluded=now.excluded,
            )
        )

    def _why(self, now: Situation) -> str:
        base = self._base_hosts()
        if base is None:
            return "first plan"
        parts = [self._why_gone(node, now) for node in base if node not in now.hosts]
        parts += [f"node {node} joined" for node in now.hosts if node not in base]
        parts += [
            f"node {node} restarted" for node, boot in now.hosts.items() if base.get(node, boot) != boot
        ]
        if not parts and self.cur is not None:
            ahead = self._who_is_ahead(now)
            parts = [] if ahead is None else [f"node {ahead} follows a later plan"]
        return "; ".join(parts) or "hosts hold different plans"

    def _base_hosts(self) -> dict[str, int] | None:
        if self.cur is not None:
            return self.cur.named.hosts
        return None if self._slots.committed is None else self._slots.committed.named.hosts

    def _why_gone(self, node: str, now: Situation) -> str:
        if node in now.excluded:
            return f"node {node} excluded: {now.excluded[node]}"
        return f"node {node} failed: {now.why_lost.get(node, 'not heard')}"

    def answer(self, request_id: int, plan: PlanEnvelope | None, ballot: Ballot, now_s: float) -> None:
        """The driver's planner is done; an answer to a superseded request is dropped."""
        request = self._request
        if request is None or request.request_id != request_id:
            return
        self._request, self._unanswered_since_s = None, None
        if plan is None:
            self._impossible = self._last_impossible = request.hosts
            self._outbox.append(PlanImpossible(request.hosts, request.reason))
            return
        if plan.hosts != request.hosts:
            raise ValueError(f"plan for {sorted(plan.hosts)}, wanted for {sorted(request.hosts)}")
        self._impossible = None
        epoch = Epoch(ballot=ballot, n=self._counters.next_plan())
        named = NamedPlan(epoch=epoch, digest=plan.digest, hosts=plan.hosts, plan=plan.plan, idle=plan.idle)
        limit_s = self._timers.prep_limit_s(plan.load_estimate_s)
        self.prep = Preparing(named, request.reason, now_s, now_s + limit_s)
        self._fetches, self._prep_due_s = {}, now_s + limit_s
        self.reason = request.reason

    def void_request(self) -> None:
        """Forget what was asked of the driver, e.g. because another coordinator takes over."""
        self._request, self._unanswered_since_s = None, None
