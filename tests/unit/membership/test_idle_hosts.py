"""A plan stays good when hosts go that had no part in it; every other loss calls for a new one."""

from __future__ import annotations

import msgspec

from hexmesh.membership.outputs import DropPrepared, LeaveComplete, PlanWanted
from hexmesh.wire.control import Ballot, Beat, Cert, Epoch, Grant, Prepare, Report
from tests.unit.membership.puppet import BOOT, BOOTS, ME, TIMERS, Puppet, ballot, cert, epoch, header
from tests.unit.membership.test_coordinator_rules import wanted_plan

LONG_S = 3 * TIMERS.settle_max_s


def preparing_with_idle_b() -> tuple[Puppet, Ballot, Epoch]:
    """`me` holds `a` and `b`, all load a plan in which `b` has no part, and `me` is ready."""
    puppet = Puppet()
    mine = puppet.hold("a", "b")
    puppet.plan(wanted_plan(puppet), idle="b")
    made = puppet.sent(Prepare, "b")[0].epoch
    puppet.ready(made)
    return puppet, mine, made


def decided_with_idle_b() -> tuple[Puppet, Ballot, Epoch]:
    puppet, mine, made = preparing_with_idle_b()
    for node in ("a", "b"):
        puppet.ack(node, mine, Report(prepared=made, is_ready=True))
    for node in ("a", "b"):
        puppet.ack(node, mine, Report(committed=cert(made)))
    assert puppet.machine.decided == made
    return puppet, mine, made


def test_losing_an_idle_host_calls_for_no_plan() -> None:
    puppet, _, made = decided_with_idle_b()
    puppet.wait(LONG_S, "a")
    assert puppet.machine.held == {ME: BOOT, "a": BOOTS["a"]}
    assert puppet.outputs(PlanWanted) == []
    assert puppet.machine.decided == made


def test_losing_a_host_with_a_part_calls_for_one() -> None:
    puppet, _, _ = decided_with_idle_b()
    puppet.wait(LONG_S, "b")
    (wanted, *_) = puppet.outputs(PlanWanted)
    assert (wanted.hosts.keys(), wanted.reason) == ({ME, "b"}, "node a failed: not heard")


def test_an_idle_host_that_comes_back_gets_the_plan_again() -> None:
    puppet, _, made = decided_with_idle_b()
    puppet.wait(LONG_S, "a")
    puppet.join("b")
    puppet.wait(TIMERS.beat_s + 0.1, "a", "b")
    assert puppet.outputs(PlanWanted) == []
    (prepare, *_) = puppet.sent(Prepare, "b")
    assert (prepare.epoch, prepare.idle) == (made, ("b",))


def test_an_idle_host_that_restarted_needs_a_plan_of_its_own() -> None:
    puppet, mine, _ = decided_with_idle_b()
    puppet.wait(LONG_S, "a")
    reborn = msgspec.structs.replace(header("b"), boot=99)
    puppet.hello("b", promised=mine, is_free=False, header=reborn)
    puppet.hear(Grant(header=reborn, ballot=mine, rank=0, report=Report()))
    assert wanted_plan(puppet).hosts == {ME: BOOT, "a": BOOTS["a"], "b": 99}


def test_an_idle_host_that_goes_does_not_hold_up_a_plan_under_way() -> None:
    puppet, mine, made = preparing_with_idle_b()
    puppet.last = puppet.machine.connection_refused("b", puppet.now_s)
    assert puppet.outputs(DropPrepared) == []
    puppet.ack("a", mine, Report(prepared=made, is_ready=True))
    assert puppet.machine.decided == made


def test_the_next_coordinator_adopts_a_plan_whose_idle_host_has_gone() -> None:
    puppet = Puppet()
    theirs, made = ballot("a"), epoch("a")
    hosts = {ME: BOOT, "a": BOOTS["a"]}
    puppet.hello("a", promised=theirs, is_free=False, is_coordinator=True, ballot=theirs, n_held=1)
    puppet.ask(theirs)
    puppet.prepare(theirs, made, hosts, idle=("a",))
    puppet.ready(made)
    puppet.beat(theirs, cur=cert(made))
    puppet.wait(10.0)
    assert puppet.machine.is_coordinator
    assert puppet.machine.decided == made
    assert puppet.outputs(PlanWanted) == []


def test_a_host_without_a_part_may_leave_at_once() -> None:
    puppet = Puppet()
    theirs, made = ballot("a"), epoch("a")
    puppet.hello("a", promised=theirs, is_free=False, is_coordinator=True, ballot=theirs, n_held=1)
    puppet.ask(theirs)
    puppet.prepare(theirs, made, idle=(ME,))
    puppet.ready(made)
    puppet.beat(theirs, cur=cert(made))
    puppet.last = puppet.machine.leave(puppet.now_s)
    assert puppet.outputs(LeaveComplete) == [LeaveComplete("the plan has no part for this host")]


def test_a_leaving_idle_host_costs_no_plan() -> None:
    puppet, mine, made = decided_with_idle_b()
    puppet.ack("b", mine, Report(committed=cert(made), is_leaving=True))
    puppet.wait(LONG_S, "a", "b")
    assert puppet.outputs(PlanWanted) == []
    curs: set[Cert | None] = {beat.cur for beat in puppet.sent(Beat, "a")}
    assert curs == {cert(made)}
