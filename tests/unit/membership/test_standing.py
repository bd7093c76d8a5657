"""Rules C1 and C2: when a free host stands, and what a refused connection is worth."""

from __future__ import annotations

from hexmesh.membership.outputs import BecameCoordinator, CoordinatorChanged, HostLost, Output, Send
from hexmesh.wire.control import Ask, Hello
from tests.unit.membership.puppet import ME, TIMERS, Puppet, ballot

A = ballot("a")


def stood_after_s(puppet: Puppet, *alive: str) -> float:
    """Waits until `me` stands."""
    start_s = puppet.now_s
    for _ in range(200):
        if any(isinstance(output, BecameCoordinator) for output in puppet.wait(0.05, *alive)):
            return puppet.now_s - start_s
    raise AssertionError("never stood")


def freed(heirs: tuple[str, ...]) -> Puppet:
    """A host that served `a` with those heirs, a moment after `a` was found gone."""
    puppet = Puppet()
    puppet.hello("b", is_free=False)
    puppet.hello("a", is_free=False, promised=A, is_coordinator=True, ballot=A, n_held=2)
    puppet.ask(A)
    puppet.beat(A, heirs=heirs)
    puppet.machine.connection_refused("a", puppet.now_s)
    puppet.wait(TIMERS.refused_lease_s)
    return puppet


def test_a_fresh_daemon_listens_first() -> None:
    assert 0.6 * TIMERS.hear_s <= stood_after_s(Puppet()) <= 1.2


def test_the_place_among_heard_peers_decides_who_is_first() -> None:
    first, second = Puppet(), Puppet()
    first.hello("z")
    second.hello("a")
    assert stood_after_s(first, "z") < stood_after_s(second, "a")


def test_the_operators_rank_goes_first() -> None:
    puppet = Puppet(rank=5)
    puppet.hello("a")
    outranked = Puppet()
    outranked.hello("z", rank=5)
    assert stood_after_s(puppet, "a") < stood_after_s(outranked, "z")


def test_heirs_stand_in_turn_and_others_after_them() -> None:
    first, third, other = freed((ME, "b")), freed(("b", "c", ME)), freed(("b",))
    times_s = [stood_after_s(puppet) for puppet in (first, third, other)]
    assert times_s[0] <= 0.2
    assert times_s[0] < times_s[1] < times_s[2]


def test_a_host_that_hears_a_coordinator_is_patient() -> None:
    alone, courted = Puppet(), Puppet()
    courted.hello("z", is_coordinator=True, ballot=ballot("z"), n_held=1, is_free=False)
    assert stood_after_s(courted, "z") - stood_after_s(alone) > TIMERS.patience_s - 0.3


def test_a_new_coordinator_raises_the_term_and_asks_all_it_hears() -> None:
    puppet = Puppet()
    puppet.hello("a", is_free=False, promised=ballot("b", term=6))
    outputs = puppet.wait(4.0, "a")
    (became,) = puppet.outputs(BecameCoordinator)
    assert became.ballot.term == 7
    puppet.last = outputs
    assert len(puppet.sent(Ask, "a")) == 3


def test_a_change_of_holder_is_told_at_once() -> None:
    puppet = Puppet()
    puppet.hello("b")
    puppet.ask(A)
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged("a")]
    (hello,) = puppet.sent(Hello, "b")
    assert (hello.is_free, hello.promised) == (False, A)


def test_a_refused_connection_to_the_holder_shortens_the_lease() -> None:
    puppet = Puppet()
    puppet.ask(A)
    puppet.machine.connection_refused("a", puppet.now_s)
    puppet.tick(TIMERS.refused_lease_s + 0.01)
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged(None)]


def test_a_holder_that_was_removed_from_the_mesh_loses_the_lease() -> None:
    puppet = Puppet()
    puppet.hello("a")
    puppet.ask(A)
    puppet.machine.peer_forgotten("a", puppet.now_s)
    puppet.tick(TIMERS.refused_lease_s + 0.01)
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged(None)]
    assert "a" not in puppet.machine.members(puppet.now_s)


def test_a_late_beat_does_not_renew_a_lease_that_ends() -> None:
    puppet = Puppet()
    puppet.ask(A)
    puppet.machine.connection_refused("a", puppet.now_s)
    puppet.beat(A)
    puppet.tick(TIMERS.refused_lease_s + 0.01)
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged(None)]
    puppet.ask(A)
    puppet.beat(A)
    puppet.tick(TIMERS.lease_s - 0.01)
    assert puppet.outputs(CoordinatorChanged) == []


def test_a_refused_connection_to_another_does_not() -> None:
    puppet = Puppet()
    puppet.ask(A)
    puppet.machine.connection_refused("b", puppet.now_s)
    puppet.tick(TIMERS.refused_lease_s + 0.01)
    assert puppet.outputs(CoordinatorChanged) == []


def test_a_coordinator_drops_a_host_that_refuses_connections() -> None:
    puppet = Puppet()
    puppet.hold("a")
    outputs: list[Output] = puppet.machine.connection_refused("a", puppet.now_s)
    assert HostLost("a", "connection refused") in outputs


def test_a_coordinator_drops_a_host_that_was_removed_from_the_mesh() -> None:
    puppet = Puppet()
    puppet.hold("a")
    outputs: list[Output] = puppet.machine.peer_forgotten("a", puppet.now_s)
    assert HostLost("a", "no longer a peer") in outputs


def test_a_holder_that_says_it_stepped_down_is_believed() -> None:
    puppet = Puppet()
    puppet.ask(A)
    puppet.hello("a", is_free=False, promised=ballot("b", term=4))
    puppet.tick(TIMERS.refused_lease_s + 0.01)
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged(None)]


def test_a_host_that_does_not_take_part_yet_listens_and_greets_but_is_not_leased() -> None:
    puppet = Puppet(takes_part=False)
    puppet.hello("a", is_free=False, promised=A, is_coordinator=True, ballot=A, n_held=1)
    puppet.ask(A)
    outputs = [output for _ in range(60) for output in puppet.wait(0.05, "a")]
    assert puppet.machine.coordinator is None
    assert not any(isinstance(output, BecameCoordinator) for output in outputs)
    assert sent_messages(outputs, Hello)
    puppet.machine.take_part(puppet.now_s)
    puppet.ask(A)
    assert puppet.machine.coordinator == "a"


def sent_messages(outputs: list[Output], kind: type[Hello]) -> list[Hello]:
    return [
        output.message for output in outputs if isinstance(output, Send) and isinstance(output.message, kind)
    ]
