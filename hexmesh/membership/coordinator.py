"""The coordinator role of one reign: holds leases of hosts and brings them to one plan (rules C3 to C9).

It never fights for a host that is validly another's: it drops it and raises no term.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from hexmesh.membership.flaps import Flaps
from hexmesh.membership.host import Host
from hexmesh.membership.merge import Merge
from hexmesh.membership.notary import Notary
from hexmesh.membership.outputs import HostJoined, HostLost, Output, PlanEnvelope, Send
from hexmesh.membership.peers import Peer, Peers
from hexmesh.membership.planner import Counters, Decided, Planner, Preparing, Situation, lacks
from hexmesh.membership.quarantine import Quarantine
from hexmesh.membership.terms import Terms
from hexmesh.membership.timers import Timers
from hexmesh.wire.control import (
    Ack,
    Ask,
    Ballot,
    Beat,
    Grant,
    Hello,
    Nack,
    Prepare,
    Release,
    Report,
    Yield,
)

N_HEIRS = 3
N_OPENING_ASKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What both roles of one boot share. `Coordination` makes it."""

    node: str
    boot: int
    min_nodes: int
    timers: Timers
    host: Host
    peers: Peers
    notary: Notary
    terms: Terms
    counters: Counters
    quarantine: Quarantine
    flaps: Flaps
    outbox: list[Output]


@dataclass(slots=True)
class HeldHost:
    """Another host whose lease is ours, as far as we know."""

    node: str
    boot: int
    rank: int
    heard_s: float
    report: Report


class Coordinator:
    """Owner of the held hosts and of the plan, from standing until this host's lease is another's."""

    def __init__(self, tools: Tools, ballot: Ballot, now_s: float) -> None:
        self._tools = tools
        self._outbox = tools.outbox
        self._peers = tools.peers
        self._timers = tools.timers
        self._owner = (tools.node, tools.boot)
        self._first_ballot = ballot
        self._beat_s = now_s
        self._ask_s = now_s
        self._yield_s = now_s
        self._n_opening = N_OPENING_ASKS
        self._why_lost: dict[str, str] = {}
        self._release: Release | None = None
        self.ballot = ballot
        self.held: dict[str, HeldHost] = {}
        self.merge = Merge(tools.peers, tools.timers.token_s)
        self.planner = Planner(
            owner=self._owner,
            timers=tools.timers,
            min_nodes=tools.min_nodes,
            counters=tools.counters,
            slots=tools.host.slots,
            quarantine=tools.quarantine,
            notary=tools.notary,
            outbox=tools.outbox,
            now_s=now_s,
        )

    @property
    def n_held(self) -> int:
        """Hosts under this coordinator, its own included."""
        return len(self.held) + 1

    def tick(self, now_s: float) -> None:
        self._drop_silent(now_s)
        self._hand_over_if_hung(now_s)
        self.merge.choose(self.n_held, self.ballot, self.heirs(), now_s)
        self._advance_plan(now_s)
        if now_s >= self._ask_s:
            self._ask_s = now_s + self._timers.ask_s
            self._ask_candidates(now_s)
        if now_s >= self._beat_s:
            self._beat_all(now_s)
        if self.merge.yielding_to is not None and now_s >= self._yield_s:
            self._send_yield(self.merge.yielding_to, now_s)

    def next_wakeup_s(self, now_s: float) -> float:
        wakeup_s = min(self._beat_s, self._ask_s, self.planner.next_wakeup_s(now_s))
        wakeup_s = min(wakeup_s, self._tools.quarantine.next_end_s(now_s))
        if self.merge.yielding_to is not None:
            wakeup_s = min(wakeup_s, self._yield_s)
        if self.held:
            oldest_s = min(held.heard_s for held in self.held.values())
            wakeup_s = min(wakeup_s, oldest_s + self._timers.drop_s)
        return wakeup_s

    # --- holding hosts (C3, C4) ---

    def on_grant(self, grant: Grant, now_s: float) -> None:
        if grant.ballot.owner != self._owner or grant.ballot < self._first_ballot:
            return
        src = grant.header.src
        if src not in self.held:
            self._outbox.append(HostJoined(src, grant.header.boot))
        self._why_lost.pop(src, None)
        self.held[src] = HeldHost(src, grant.header.boot, grant.rank, now_s, grant.report)
        self._advance_plan(now_s)

    def on_ack(self, ack: Ack, now_s: float) -> None:
        held = self.held.get(ack.header.src)
        if held is None or ack.ballot.owner != self._owner:
            return
        held.heard_s = now_s
        if ack.report != held.report:
            held.report = ack.report
            self._advance_plan(now_s)

    def on_nack(self, nack: Nack, now_s: float) -> None:
        src = nack.header.src
        if self._is_anothers(nack.promised):
            self.drop(src, f"leased to {nack.promised.node}", now_s)
        peer = self._peers.get(src)
        if peer is not None and peer.view is not None:
            peer.view = msgspec.structs.replace(peer.view, promised=nack.promised, is_free=nack.is_free)

    def on_hello(self, hello: Hello, now_s: float) -> None:
        held = self.held.get(hello.header.src)
        if held is None:
            return
        if hello.promised.owner == self._owner:
            if self._peers.is_two_way(held.node, now_s):
                held.heard_s = now_s
        elif self._is_anothers(hello.promised):
            self.drop(held.node, f"leased to {hello.promised.node}", now_s)

    def _is_anothers(self, promised: Ballot) -> bool:
        return promised > self.ballot and promised.owner != self._owner

    def drop(self, node: str, reason: str, now_s: float) -> None:
        """Stop counting on the host; it is no longer beaten, so its lease runs out even if it hears us."""
        lost = self.held.pop(node, None)
        if lost is not None:
            if not lost.report.is_leaving:
                self._tools.flaps.note_loss(node, lost.boot, now_s)
            why_out = self._tools.flaps.reason(node, lost.boot, now_s)
            self._why_lost[node] = reason if why_out is None else f"{reason}, {why_out}"
            self._outbox.append(HostLost(node, self._why_lost[node]))
            self._advance_plan(now_s)

    def _drop_silent(self, now_s: float) -> None:
        horizon_s = now_s - self._timers.drop_s
        for node in [held.node for held in self.held.values() if held.heard_s <= horizon_s]:
            self.drop(node, "not heard", now_s)

    def heirs(self) -> tuple[str, ...]:
        """Who stands first when this coordinator is gone: the operator's ranks, then ids."""
        able = [held for held in self.held.values() if not held.report.is_leaving]
        able.sort(key=lambda held: (-held.rank, held.node))
        return tuple(held.node for held in able[:N_HEIRS])

    def _ask_candidates(self, now_s: float) -> None:
        candidates = [peer for peer in self._peers.two_way(now_s) if self._is_candidate(peer, now_s)]
        self._n_opening = max(0, self._n_opening - 1)
        self._raise_over(candidates, now_s)
        for peer in candidates:
            release = self.merge.release_of(peer.node, now_s)
            header = self._peers.header_to(peer.node, now_s)
            self._outbox.append(Send(peer.node, Ask(header=header, ballot=self.ballot, release=release)))

    def _is_candidate(self, peer: Peer, now_s: float) -> bool:
        if peer.node in self.held:
            return False
        if self.merge.release_of(peer.node, now_s) is not None:
            return True
        if peer.view is None or peer.view.is_leaving or self.merge.is_handing_over:
            return False
        return self._n_opening > 0 or peer.view.is_free or peer.view.promised.owner == self._owner

    def _raise_over(self, candidates: list[Peer], now_s: float) -> None:
        """C4: outbid only what a free or released host promised; held hosts follow with the next beat."""
        promised = [
            peer.view.promised
            for peer in candidates
            if peer.view is not None
            and (peer.view.is_free or self.merge.release_of(peer.node, now_s) is not None)
        ]
        self._raise(max(promised, default=self.ballot), now_s)

    def _raise(self, over: Ballot, now_s: float) -> None:
        if over > self.ballot:
            self._tools.terms.see(over)
            self.ballot = msgspec.structs.replace(self.ballot, term=self._tools.terms.next())
            self._tools.host.lease.grant(self.ballot, now_s)

    # --- beats ---

    def _beat_all(self, now_s: float) -> None:
        self._beat_s = now_s + self._timers.beat_s
        heirs = self.heirs()
        for held in self.held.values():
            self._send_plan_if_lacking(held, now_s)
            beat = Beat(
                header=self._peers.header_to(held.node, now_s),
                ballot=self.ballot,
                seq=self._tools.counters.next_seq(),
                cur=self.planner.cur_cert,
                prep=self.planner.prep_epoch,
                heirs=heirs,
            )
            self._outbox.append(Send(held.node, beat))

    def _send_plan_if_lacking(self, held: HeldHost, now_s: float) -> None:
        named = self.planner.wanted_by(held.node)
        if named is None or named.hosts[held.node] != held.boot or not lacks(held.report, named.epoch):
            return
        prepare = Prepare(
            header=self._peers.header_to(held.node, now_s),
            ballot=self.ballot,
            seq=self._tools.counters.next_seq(),
            epoch=named.epoch,
            digest=named.digest,
            hosts=named.hosts,
            plan=named.plan,
            idle=tuple(sorted(named.idle)),
        )
        self._outbox.append(Send(held.node, prepare))

    def _align_own_host(self, now_s: float) -> None:
        """This host gets its orders like any other, only without a message."""
        host, planner = self._tools.host, self.planner
        named = planner.wanted_by(self._tools.node)
        if named is not None and lacks(host.report(), named.epoch):
            host.slots.prepare(named)
        host.follow(self._owner, planner.cur_cert, planner.prep_epoch, now_s)

    # --- planning (C6 to C9) ---

    def _advance_plan(self, now_s: float) -> None:
        """Step the plan; when the wanted state changed, tell everyone at once."""
        if self.merge.yielding_to is not None:
            self.planner.void_request()
            return
        before = self._wanted()
        while self.planner.step(self.situation(now_s), now_s):
            pass
        self._announce_unless(before, now_s)

    def answer(self, request_id: int, plan: PlanEnvelope | None, now_s: float) -> None:
        before = self._wanted()
        self.planner.answer(request_id, plan, self.ballot, now_s)
        self._announce_unless(before, now_s)
        self._advance_plan(now_s)

    def _wanted(self) -> tuple[Decided | None, Preparing | None]:
        return (self.planner.cur, self.planner.prep)

    def _announce_unless(self, before: tuple[Decided | None, Preparing | None], now_s: float) -> None:
        if self._wanted() != before:
            self._align_own_host(now_s)
            self._beat_all(now_s)

    def force(self, reason: str, now_s: float) -> None:
        self.planner.force(reason)
        self._advance_plan(now_s)

    def own_report_changed(self, now_s: float) -> None:
        """This host got ready, failed, complained or leaves."""
        self._advance_plan(now_s)

    def situation(self, now_s: float) -> Situation:
        reports = {node: held.report for node, held in self.held.items()}
        reports[self._tools.node] = self._tools.host.report()
        boots = {node: held.boot for node, held in self.held.items()}
        boots[self._tools.node] = self._tools.boot
        excluded = self._excluded(boots, reports, now_s)
        return Situation(
            hosts={node: boots[node] for node in sorted(boots) if node not in excluded},
            reports=reports,
            excluded=excluded,
            is_waiting=self._is_waiting(now_s),
            why_lost=self._why_lost,
        )

    def _excluded(self, boots: dict[str, int], reports: Mapping[str, Report], now_s: float) -> dict[str, str]:
        """Held hosts that no plan may use, and why."""
        unfit = {
            node: why for node in boots if (why := self._why_unfit(node, boots[node], reports[node], now_s))
        }
        fit = {node: boot for node, boot in boots.items() if node not in unfit}
        return unfit | self._flapping(fit, now_s)

    def _flapping(self, boots: dict[str, int], now_s: float) -> dict[str, str]:
        """Those that come and go; none where most do (it is this host's link then) or where nothing fits without."""
        why_out = {node: why for node in boots if (why := self._tools.flaps.reason(node, boots[node], now_s))}
        steady = {node: boot for node, boot in boots.items() if node not in why_out}
        if len(why_out) > max(1, len(self.held) / 2) or self.planner.is_known_impossible(steady):
            return {}
        return why_out

    def _why_unfit(self, node: str, boot: int, report: Report, now_s: float) -> str | None:
        if report.is_leaving:
            return "leaving"
        return self._tools.quarantine.reason(node, boot, now_s)

    def _is_waiting(self, now_s: float) -> bool:
        """Whether a heard host may yet be won."""
        return any(peer.node not in self.held for peer in self._peers.heard(now_s))

    def _hand_over_if_hung(self, now_s: float) -> None:
        """C9: a live heartbeat must not shield a hung planner."""
        if self.planner.is_overdue(now_s):
            self.planner.void_request()
            self.merge.is_handing_over = bool(self.heirs())

    # --- merging (C5) ---

    def on_yield(self, offer: Yield, now_s: float) -> None:
        if not self._peers.is_two_way(offer.header.src, now_s):
            return
        if self._tools.notary.frees(offer.release, offer.ballot, self._owner) and self.merge.accepts(
            offer, self.ballot
        ):
            self.take_over(offer, now_s)

    def take_over(self, offer: Yield, now_s: float) -> None:
        """Ask the yielder and its hosts at once, with its release."""
        self._raise(offer.ballot, now_s)
        self.merge.take(offer, now_s)
        self._ask_s = now_s + self._timers.ask_s
        self._ask_candidates(now_s)

    def hand_over(self, now_s: float) -> None:
        """Leave gracefully: yield to another coordinator, else to the first heir."""
        self.merge.is_handing_over = True
        self._advance_plan(now_s)

    def _send_yield(self, to: str, now_s: float) -> None:
        peer = self._peers.get(to)
        if peer is None or peer.boot is None:
            return
        self._yield_s = now_s + self._timers.yield_s
        self.merge.note_sent()
        offer = Yield(
            header=self._peers.header_to(to, now_s),
            ballot=self.ballot,
            held={held.node: held.boot for held in self.held.values()},
            release=self._release_to(to, peer.boot),
        )
        self._outbox.append(Send(to, offer))

    def _release_to(self, node: str, boot: int) -> Release:
        old = self._release
        if old is None or (old.ballot, old.to_node, old.to_boot) != (self.ballot, node, boot):
            self._release = self._tools.notary.release(self.ballot, node, boot)
        assert self._release is not None
        return self._release
