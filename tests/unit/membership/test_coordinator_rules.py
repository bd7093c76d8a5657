"""Rules C3 to C9: holding hosts, merging, planning in two phases."""

from __future__ import annotations

import pytest

from hexmesh.membership.outputs import (
    BecameCoordinator,
    Committed,
    DropPrepared,
    HostJoined,
    HostLost,
    LeaveComplete,
    LostCoordinator,
    PersistTerm,
    PlanEnvelope,
    PlanImpossible,
    PlanWanted,
    StartPrepare,
)
from hexmesh.wire.control import Ack, Ask, Ballot, Beat, Complaint, Epoch, Grant, Prepare, Report, Yield
from tests.unit.membership.puppet import BOOT, BOOTS, ME, TIMERS, Puppet, ballot, cert, epoch, header, release


def wanted_plan(puppet: Puppet) -> PlanWanted:
    """The request, if it was just made, or what comes when the hosts have settled."""
    if not puppet.outputs(PlanWanted):
        puppet.wait(TIMERS.settle_max_s, *puppet.machine.held.keys() - {ME})
    return puppet.outputs(PlanWanted)[-1]


def preparing(*nodes: str) -> tuple[Puppet, Ballot, Epoch]:
    """`me` holds `nodes` and all load their first plan; `me` is ready."""
    puppet = Puppet()
    mine = puppet.hold(*nodes)
    puppet.plan(wanted_plan(puppet))
    (start,) = puppet.outputs(StartPrepare)
    puppet.ready(start.epoch)
    return puppet, mine, start.epoch


def decided(*nodes: str) -> tuple[Puppet, Ballot, Epoch]:
    """As above, and all hosts committed it."""
    puppet, mine, made = preparing(*nodes)
    for node in nodes:
        puppet.ack(node, mine, Report(prepared=made, is_ready=True))
    for node in nodes:
        puppet.ack(node, mine, Report(committed=cert(made)))
    assert puppet.machine.committed == made
    return puppet, mine, made


# --- C3, C4 ---


def test_a_granted_host_is_held_and_beaten() -> None:
    puppet = Puppet()
    mine = puppet.hold("a")
    assert puppet.outputs(HostJoined) == [HostJoined("a", BOOTS["a"])]
    puppet.wait(0.5, "a")
    assert puppet.sent(Beat, "a")[0].ballot == mine
    assert puppet.machine.held == {ME: BOOT, "a": BOOTS["a"]}


def test_a_silent_host_is_dropped_and_no_longer_beaten() -> None:
    puppet = Puppet()
    puppet.hold("a")
    puppet.wait(TIMERS.drop_s + 0.1)
    assert puppet.outputs(HostLost) == [HostLost("a", "not heard")]
    puppet.wait(1.0)
    assert puppet.sent(Beat) == []


def test_a_hello_that_names_the_coordinator_is_a_sign_of_life() -> None:
    puppet = Puppet()
    puppet.hold("a")
    puppet.wait(5.0, "a")
    assert puppet.outputs(HostLost) == []


def test_a_one_way_hello_is_none() -> None:
    puppet = Puppet()
    mine = puppet.hold("a")
    puppet.hello("a", promised=mine, header=header("a", hears=False))
    puppet.wait(3.0, "a")
    assert puppet.outputs(HostLost) == [HostLost("a", "not heard")]


@pytest.mark.parametrize("by", ["hello", "nack"])
def test_a_host_that_is_anothers_is_dropped_without_a_fight(by: str) -> None:
    puppet = Puppet()
    mine = puppet.hold("a")
    higher = ballot("b", term=9)
    if by == "hello":
        puppet.hello("a", promised=higher, is_free=False)
    else:
        puppet.nack("a", higher)
    assert puppet.outputs(HostLost) == [HostLost("a", "leased to b")]
    puppet.hello("a", promised=higher, is_free=False)
    puppet.wait(2.0, "a")
    assert puppet.machine.promised == mine


def test_another_boot_is_another_host() -> None:
    puppet = Puppet()
    puppet.hold("a")
    reborn = header("a")
    puppet.hello("a", header=type(reborn)(src="a", boot=99, to_boot=BOOT, hears=True))
    assert puppet.outputs(HostLost) == [HostLost("a", "restarted")]


def test_the_term_is_raised_over_a_free_hosts_promise() -> None:
    puppet = Puppet()
    mine = puppet.lead()
    puppet.hello("a", is_free=True, promised=ballot("b", term=5))
    puppet.wait(0.4, "a")
    assert puppet.machine.promised == Ballot(term=6, rank=0, node=ME, boot=BOOT)
    assert puppet.sent(Ask, "a")[-1].ballot.term == 6 > mine.term
    assert PersistTerm(6) in puppet.outputs(PersistTerm)


# --- C5 ---


def rival(puppet: Puppet, node: str, n_held: int, term: int = 1) -> Ballot:
    theirs = ballot(node, term)
    puppet.hello(node, is_free=False, promised=theirs, is_coordinator=True, ballot=theirs, n_held=n_held)
    return theirs


def test_the_smaller_coordinator_yields_whatever_the_ballots() -> None:
    puppet = Puppet()
    puppet.lead()
    rival(puppet, "a", n_held=2, term=0)
    puppet.wait(1.0, "a")
    (offer, *_) = puppet.sent(Yield, "a")
    assert (offer.held, offer.release.to_node) == ({}, "a")
    assert puppet.outputs(PlanWanted) == []


def test_of_two_equals_the_higher_ballot_wins() -> None:
    puppet = Puppet()
    mine = puppet.lead()
    rival(puppet, "a", n_held=1, term=mine.term - 1)
    puppet.wait(1.0, "a")
    assert puppet.sent(Yield) == []
    rival(puppet, "a", n_held=1, term=mine.term + 1)
    puppet.wait(1.0, "a")
    assert puppet.sent(Yield, "a") != []


def test_the_winner_outbids_the_yielder_and_asks_its_hosts_with_the_release() -> None:
    puppet = Puppet()
    puppet.hold("c", "z")
    theirs = rival(puppet, "a", n_held=2, term=7)
    puppet.hello("b", promised=theirs, is_free=False)
    puppet.wait(1.0, "a", "b", "c", "z")
    puppet.offer(theirs, held=("b",))
    assert puppet.machine.promised.term == 8
    assert [ask.release for ask in puppet.sent(Ask, "b") + puppet.sent(Ask, "a")] == [release(theirs, ME)] * 2


def test_a_yielder_goes_on_beating_until_its_own_host_is_asked_away() -> None:
    puppet = Puppet()
    mine = puppet.hold("b")
    theirs = rival(puppet, "a", n_held=5, term=mine.term + 1)
    puppet.wait(1.0, "a", "b")
    assert puppet.sent(Beat, "b") != []
    puppet.ask(theirs, puppet.sent(Yield, "a")[-1].release)
    assert puppet.outputs(LostCoordinator) == [LostCoordinator("leased to a")]


def test_a_yielder_does_not_take_over_others() -> None:
    puppet = Puppet()
    puppet.lead()
    rival(puppet, "a", n_held=5)
    puppet.wait(0.5, "a")
    puppet.offer(rival(puppet, "b", n_held=1, term=0), held=("c",))
    assert puppet.sent(Ask) == []


# --- C6 ---


def test_the_first_plan_is_for_every_leased_host() -> None:
    puppet = Puppet()
    puppet.hold("a", "b")
    wanted = wanted_plan(puppet)
    assert (wanted.hosts, wanted.reason, wanted.excluded) == (
        {ME: BOOT, "a": BOOTS["a"], "b": BOOTS["b"]},
        "first plan",
        {},
    )


def test_no_first_plan_below_min_nodes() -> None:
    puppet = Puppet(min_nodes=3)
    puppet.hold("a")
    puppet.wait(6.0, "a")
    assert puppet.outputs(PlanWanted) == []
    puppet.join("b")
    assert len(wanted_plan(puppet).hosts) == 3


def test_every_new_plan_has_its_reason() -> None:
    puppet, _, _ = decided("a")
    puppet.join("b")
    wanted = wanted_plan(puppet)
    assert wanted.reason == "node b joined"
    puppet.last = puppet.machine.connection_refused("a", puppet.now_s)
    assert wanted_plan(puppet).reason == "node a failed: connection refused; node b joined"


def test_a_restarted_host_is_planned_anew() -> None:
    puppet, mine, _ = decided("a")
    reborn = header("a")
    reborn = type(reborn)(src="a", boot=99, to_boot=BOOT, hears=True)
    puppet.hello("a", header=reborn, promised=mine, is_free=False)
    puppet.hear(Grant(header=reborn, ballot=mine, rank=0, report=Report()))
    wanted = wanted_plan(puppet)
    assert (wanted.reason, wanted.hosts["a"]) == ("node a restarted", 99)


def test_an_unchanged_mesh_is_not_planned_again() -> None:
    puppet, _, _ = decided("a")
    puppet.wait(30.0, "a")
    assert puppet.outputs(PlanWanted) == []


def test_an_operator_may_force_a_plan() -> None:
    puppet, _, _ = decided("a")
    puppet.last = puppet.machine.replan("operator", puppet.now_s)
    assert puppet.outputs(PlanWanted)[-1].reason == "operator"


def test_a_host_may_complain_and_is_heeded_once() -> None:
    puppet, mine, made = decided("a")
    report = Report(committed=cert(made), complaint=Complaint(n=1, epoch=made, reason="stage 1 is gone"))
    puppet.ack("a", mine, report)
    (wanted,) = puppet.outputs(PlanWanted)
    assert wanted.reason == "node a: stage 1 is gone"
    puppet.last = puppet.machine.plan_ready(wanted.request_id, None, puppet.now_s)
    puppet.wait(2.0, "a")
    assert puppet.outputs(PlanWanted) == []


def test_a_coordinators_own_complaint_names_it_as_others_do() -> None:
    puppet, _, _ = decided("a")
    puppet.last = puppet.machine.complain("stage 1 is gone", puppet.now_s)
    assert puppet.outputs(PlanWanted)[-1].reason == f"node {puppet.machine.node}: stage 1 is gone"


def test_a_complaint_stands_in_every_report_until_the_next_commit() -> None:
    puppet = Puppet()
    puppet.serve(ballot("a"), epoch("a"))
    puppet.last = puppet.machine.complain("stage 1 is gone", puppet.now_s)
    complaint = Complaint(n=1, epoch=epoch("a"), reason="stage 1 is gone")
    assert [ack.report.complaint for ack in puppet.sent(Ack, "a")] == [complaint]
    puppet.prepare(ballot("a"), epoch("a", 2))
    puppet.ready(epoch("a", 2))
    puppet.beat(ballot("a"), cur=cert(epoch("a", 2)))
    assert puppet.sent(Ack, "a")[-1].report.complaint is None


def test_a_committed_epoch_that_fits_is_adopted() -> None:
    puppet = Puppet()
    theirs = ballot("a")
    puppet.serve(theirs, epoch("a"))
    puppet.prepare(theirs, epoch("a", 2), {ME: BOOT, "b": BOOTS["b"]})
    puppet.ready(epoch("a", 2))
    puppet.beat(theirs, cur=cert(epoch("a", 2)))
    puppet.hello("b", is_free=True, promised=theirs)
    puppet.machine.connection_refused("a", puppet.now_s)
    outputs = puppet.wait(3.0, "b")
    puppet.last = outputs
    mine = puppet.machine.promised
    assert puppet.machine.is_coordinator
    puppet.hello("b", is_free=False, promised=mine)
    puppet.grant("b", mine, Report(committed=cert(epoch("a", 2))))
    puppet.wait(3.0, "b")
    assert puppet.outputs(PlanWanted) == []
    assert puppet.machine.decided == epoch("a", 2)
    assert puppet.sent(Beat, "b")[-1].cur == cert(epoch("a", 2))


def test_a_host_that_follows_a_later_plan_makes_a_new_one() -> None:
    puppet, mine, _ = decided("a")
    puppet.ack("a", mine, Report(committed=cert(epoch("b", term=9))))
    assert wanted_plan(puppet).reason == "node a follows a later plan"


def test_an_impossible_plan_is_reported_and_tried_again_when_the_hosts_change() -> None:
    puppet = Puppet()
    puppet.hold("a")
    wanted = wanted_plan(puppet)
    puppet.last = puppet.machine.plan_ready(wanted.request_id, None, puppet.now_s)
    assert puppet.outputs(PlanImpossible) == [PlanImpossible(wanted.hosts, "first plan")]
    puppet.wait(10.0, "a")
    assert puppet.outputs(PlanWanted) == []
    puppet.join("b")
    assert len(wanted_plan(puppet).hosts) == 3


def test_an_answer_to_a_superseded_request_is_dropped() -> None:
    puppet = Puppet()
    puppet.hold("a")
    first = wanted_plan(puppet)
    puppet.join("b")
    second = wanted_plan(puppet)
    puppet.plan(first)
    assert puppet.last == []
    puppet.plan(second)
    assert len(puppet.outputs(StartPrepare)) == 1


def test_a_plan_for_other_hosts_is_an_error() -> None:
    puppet = Puppet()
    puppet.hold("a")
    wanted = wanted_plan(puppet)
    with pytest.raises(ValueError, match="wanted for"):
        puppet.machine.plan_ready(
            wanted.request_id, PlanEnvelope(plan=b"", digest="", hosts={ME: BOOT}), puppet.now_s
        )


# --- C7, C8 ---


def test_a_plan_is_sent_to_all_and_decided_when_all_are_ready() -> None:
    puppet, mine, made = preparing("a", "b")
    puppet.ack("a", mine, Report(prepared=made, is_ready=True))
    assert puppet.machine.decided is None
    puppet.ack("b", mine, Report(prepared=made, is_ready=True))
    assert puppet.machine.decided == made
    assert [beat.cur for beat in puppet.sent(Beat)] == [cert(made)] * 2
    assert len(puppet.outputs(Committed)) == 1


def test_a_lost_host_aborts_the_undecided_plan() -> None:
    puppet, mine, made = preparing("a", "b")
    puppet.ack("a", mine, Report(prepared=made, is_ready=True))
    puppet.last = puppet.machine.connection_refused("b", puppet.now_s)
    assert puppet.outputs(DropPrepared) == [DropPrepared(made)]
    assert puppet.sent(Beat, "a")[-1].prep is None
    assert puppet.sent(Prepare) == []


def test_hosts_that_are_not_ready_in_time_are_quarantined_for_a_while() -> None:
    puppet, mine, made = preparing("a", "b")
    puppet.ack("a", mine, Report(prepared=made, is_ready=True))
    puppet.wait(TIMERS.prep_timeout_s + 1, "a", "b")
    wanted = puppet.outputs(PlanWanted)[-1]
    assert wanted.hosts == {ME: BOOT, "a": BOOTS["a"]}
    assert wanted.excluded == {"b": "not ready in 8 s"}
    puppet.plan(wanted)
    puppet.wait(TIMERS.quarantine_s + 1, "a", "b")
    assert puppet.outputs(PlanWanted)[-1].hosts.keys() == {ME, "a", "b"}


def test_a_host_whose_fetch_goes_on_has_more_time_and_one_that_hangs_has_not() -> None:
    puppet, mine, made = preparing("a", "b")
    for n_bytes in (10, 20, 30):
        puppet.wait(TIMERS.prep_timeout_s - 2, "a", "b")
        puppet.ack("a", mine, Report(prepared=made, fetched_bytes=n_bytes))
        if n_bytes == 10:
            puppet.ack("b", mine, Report(prepared=made, is_ready=True))
        assert puppet.outputs(PlanWanted) == []
        assert puppet.machine.next_wakeup_s(puppet.now_s) > puppet.now_s
    puppet.wait(TIMERS.prep_timeout_s - 1, "a", "b")
    assert puppet.outputs(PlanWanted) == []
    puppet.wait(2, "a", "b")
    (wanted,) = puppet.outputs(PlanWanted)
    assert wanted.excluded == {"a": "not ready in 26 s"}


def test_a_fetch_elsewhere_gives_a_silent_host_no_time() -> None:
    puppet, mine, made = preparing("a", "b")
    puppet.wait(TIMERS.prep_timeout_s - 1, "a", "b")
    puppet.ack("a", mine, Report(prepared=made, fetched_bytes=10))
    puppet.wait(2, "a", "b")
    (wanted,) = puppet.outputs(PlanWanted)
    assert wanted.excluded == {"b": "not ready in 8 s"}


def test_the_coordinators_own_fetch_is_waited_for_too() -> None:
    puppet = Puppet()
    mine = puppet.hold("a")
    puppet.plan(wanted_plan(puppet))
    (start,) = puppet.outputs(StartPrepare)
    puppet.ack("a", mine, Report(prepared=start.epoch, is_ready=True))
    puppet.wait(TIMERS.prep_timeout_s - 1, "a")
    puppet.machine.prepare_fetched(10)
    puppet.wait(TIMERS.prep_timeout_s - 1, "a")
    assert puppet.outputs(PlanWanted) == []
    puppet.ready(start.epoch)
    assert puppet.machine.committed == start.epoch


def test_a_host_that_cannot_load_is_quarantined_at_once() -> None:
    puppet, mine, made = preparing("a")
    puppet.ack("a", mine, Report(prepared=made, failure="needs 3 bytes, 2 free"))
    wanted = wanted_plan(puppet)
    assert (wanted.hosts, wanted.excluded) == ({ME: BOOT}, {"a": "needs 3 bytes, 2 free"})


def flap(puppet: Puppet) -> PlanWanted:
    """Host "a" goes silent until it is lost and planned without, and comes back with the boot that it had."""
    puppet.wait(TIMERS.drop_s + 0.5)
    assert puppet.machine.held.keys() == {ME}
    wanted = puppet.outputs(PlanWanted)[-1]
    assert wanted.hosts == {ME: BOOT}
    puppet.join("a")
    return wanted


def test_a_host_that_comes_and_goes_is_left_out_for_a_while_and_the_reason_says_so() -> None:
    puppet, _, _ = decided("a")
    assert "check the link" not in flap(puppet).reason
    assert puppet.machine.members(puppet.now_s)["a"].why_excluded is None
    assert wanted_plan(puppet).hosts.keys() == {ME, "a"}
    wanted = flap(puppet)
    assert "lost 2 times within 60 s" in wanted.reason
    assert "check the link" in (puppet.machine.members(puppet.now_s)["a"].why_excluded or "")
    puppet.plan(wanted)
    puppet.wait(TIMERS.flap_s - 1.0, "a")
    assert puppet.outputs(PlanWanted) == []
    puppet.wait(3.0, "a")
    assert puppet.outputs(PlanWanted)[-1].hosts.keys() == {ME, "a"}


def test_where_most_hosts_come_and_go_none_is_left_out() -> None:
    """It is the coordinator's own link then."""
    puppet, _, _ = decided("a", "b", "c")
    for _ in range(2):
        flap(puppet)
        puppet.join("b")
    puppet.wait(3.0, "a", "b")
    assert puppet.machine.held.keys() == {ME, "a", "b"}
    assert puppet.outputs(PlanWanted)[-1].hosts.keys() == {ME, "a", "b"}


def test_a_host_that_comes_and_goes_is_used_where_nothing_fits_without_it() -> None:
    """Host "b" is gone for good, so the plan in use is no answer."""
    puppet, _, _ = decided("a", "b")
    flap(puppet)
    wanted_plan(puppet)
    wanted = flap(puppet)
    puppet.last = puppet.machine.plan_ready(wanted.request_id, None, puppet.now_s)
    assert wanted_plan(puppet).hosts.keys() == {ME, "a"}


def test_a_load_estimate_lengthens_the_time_to_get_ready() -> None:
    puppet = Puppet()
    puppet.hold("a")
    wanted = wanted_plan(puppet)
    slow = PlanEnvelope(plan=b"plan", digest="digest 1", hosts=wanted.hosts, load_estimate_s=10.0)
    puppet.last = puppet.machine.plan_ready(wanted.request_id, slow, puppet.now_s)
    puppet.wait(29.0, "a")
    assert puppet.outputs(DropPrepared) == []
    puppet.wait(1.5, "a")
    assert len(puppet.outputs(DropPrepared)) == 1


def test_a_newcomer_restarts_a_young_prepare_and_waits_for_an_old_one() -> None:
    puppet, mine, _ = preparing("a")
    puppet.join("b")
    assert "b" in wanted_plan(puppet).hosts
    puppet, mine, made = preparing("a")
    puppet.wait(TIMERS.prep_restart_s + 0.1, "a")
    puppet.join("b")
    puppet.wait(1.5, "a", "b")
    assert puppet.outputs(PlanWanted) == []
    puppet.ack("a", mine, Report(prepared=made, is_ready=True))
    assert "b" in wanted_plan(puppet).hosts


def test_a_host_that_lacks_the_decided_plan_is_sent_it_again() -> None:
    puppet, mine, made = decided("a")
    puppet.ack("a", mine, Report())
    puppet.wait(0.5, "a")
    assert puppet.sent(Prepare, "a")[-1].epoch == made


# --- C9, leaving ---


def test_a_hung_planner_hands_over_to_the_first_heir() -> None:
    puppet = Puppet()
    mine = puppet.hold("a", "b")
    wanted_plan(puppet)
    puppet.wait(TIMERS.plan_deadline_s, "a", "b")
    (offer, *_) = puppet.sent(Yield)
    assert offer.release == release(mine, "a")


def test_an_heir_takes_over_from_its_own_holder() -> None:
    puppet = Puppet()
    theirs = ballot("a", term=4)
    puppet.serve(theirs, epoch("a", term=4))
    puppet.hello("b", is_free=False, promised=theirs)
    puppet.offer(theirs, held=(ME, "b"))
    (became,) = puppet.outputs(BecameCoordinator)
    assert (became.ballot.term, became.why) == (5, "node a handed over")
    assert {ask.release for ask in puppet.sent(Ask, "a")} == {None, release(theirs, ME)}
    assert puppet.sent(Ask, "b")[-1].release == release(theirs, ME)


def test_a_stranger_cannot_hand_over_what_it_does_not_hold() -> None:
    puppet = Puppet()
    puppet.serve(ballot("a"), epoch("a"))
    puppet.hello("b")
    puppet.offer(ballot("b", term=4))
    assert puppet.outputs(BecameCoordinator) == []


def test_a_leaving_host_is_left_out_of_the_next_plan() -> None:
    puppet, mine, made = decided("a", "b")
    puppet.ack("b", mine, Report(committed=cert(made), is_leaving=True))
    wanted = wanted_plan(puppet)
    assert (wanted.hosts.keys(), wanted.excluded, wanted.reason) == (
        {ME, "a"},
        {"b": "leaving"},
        "node b excluded: leaving",
    )


def test_a_leaving_host_is_done_when_a_later_plan_does_without_it() -> None:
    puppet = Puppet()
    puppet.serve(ballot("a"), epoch("a"))
    puppet.last = puppet.machine.leave(puppet.now_s)
    assert puppet.outputs(LeaveComplete) == []
    puppet.beat(ballot("a"), cur=cert(epoch("a", 2)))
    assert puppet.outputs(LeaveComplete) == [LeaveComplete("a later plan does without this host")]


def test_a_leaving_coordinator_yields_to_its_first_heir_at_once() -> None:
    puppet, mine, _ = decided("a", "b")
    puppet.last = puppet.machine.leave(puppet.now_s)
    (offer,) = puppet.sent(Yield, "a")
    assert offer.release == release(mine, "a")


def test_a_lone_coordinator_may_leave_at_once() -> None:
    puppet = Puppet()
    puppet.lead()
    puppet.last = puppet.machine.leave(puppet.now_s)
    assert puppet.outputs(LeaveComplete) == [LeaveComplete("no other host is held")]


def test_when_a_host_was_heard_is_unknown_once_it_refuses_connections() -> None:
    puppet, _, _ = decided("a")
    assert puppet.machine.members(puppet.now_s)["a"].last_heard_s is not None
    puppet.machine.connection_refused("a", puppet.now_s)
    assert puppet.machine.members(puppet.now_s)["a"].last_heard_s is None
