"""Rules H1 to H7: the host is the judge."""

from __future__ import annotations

import pytest

from hexmesh.membership.outputs import (
    Accepted,
    BecameCoordinator,
    Committed,
    CoordinatorChanged,
    DropPrepared,
    LostCoordinator,
    Refused,
    ReleaseDraining,
    Send,
    StartPrepare,
)
from hexmesh.wire.control import LEAST_BALLOT, Ack, Ask, CertMessage, Grant, Nack
from tests.unit.membership.puppet import BOOT, BOOTS, ME, TIMERS, Puppet, ballot, cert, epoch, header, release

A, B = ballot("a"), ballot("b")


def leased_to_a() -> Puppet:
    puppet = Puppet()
    puppet.ask(A)
    return puppet


# --- H1 ---


def test_a_free_host_grants_whom_it_hears_both_ways() -> None:
    puppet = Puppet()
    puppet.ask(A)
    (grant,) = puppet.sent(Grant, "a")
    assert grant.ballot == A
    assert puppet.outputs(CoordinatorChanged) == [CoordinatorChanged("a")]


def test_one_way_evidence_gets_no_lease() -> None:
    puppet = Puppet()
    puppet.ask(A, hears=False)
    assert puppet.sent(Grant) == []
    (nack,) = puppet.sent(Nack, "a")
    assert nack.promised == LEAST_BALLOT


def test_a_valid_lease_is_not_stolen_by_a_higher_term() -> None:
    puppet = leased_to_a()
    puppet.ask(ballot("b", term=9))
    assert puppet.sent(Grant) == []
    (nack,) = puppet.sent(Nack, "b")
    assert (nack.promised, nack.is_free) == (A, False)


def test_an_expired_lease_may_move() -> None:
    puppet = leased_to_a()
    puppet.now_s += TIMERS.lease_s
    puppet.ask(B)
    assert len(puppet.sent(Grant, "b")) == 1


def test_the_same_coordinator_may_raise_its_term() -> None:
    puppet = leased_to_a()
    puppet.ask(ballot("a", term=2))
    assert len(puppet.sent(Grant, "a")) == 1
    assert puppet.machine.promised == ballot("a", term=2)


def test_a_ballot_below_the_promised_one_gets_nothing_even_if_free() -> None:
    puppet = Puppet()
    puppet.ask(B)
    puppet.now_s += TIMERS.lease_s
    puppet.ask(A)
    assert puppet.sent(Grant) == []
    assert puppet.machine.promised == B


def test_a_release_by_the_holder_moves_a_valid_lease() -> None:
    puppet = leased_to_a()
    puppet.ask(ballot("b", term=2), release(A, "b"))
    assert len(puppet.sent(Grant, "b")) == 1


@pytest.mark.parametrize(("signed_by", "to"), [(ballot("c"), "b"), (A, "c"), (ballot("a", term=0), "b")])
def test_a_release_of_or_for_another_does_not(signed_by: object, to: str) -> None:
    puppet = leased_to_a()
    puppet.ask(ballot("b", term=2), release(signed_by, to))  # type: ignore[arg-type]
    assert puppet.sent(Grant) == []


def test_a_forged_release_does_not() -> None:
    puppet = leased_to_a()
    genuine = release(A, "b")
    forged = type(genuine)(ballot=A, to_node="b", to_boot=BOOTS["b"], signature=b"b" + genuine.signature[1:])
    puppet.ask(ballot("b", term=2), forged)
    assert puppet.sent(Grant) == []


def test_a_coordinator_that_grants_itself_away_steps_down() -> None:
    puppet = Puppet()
    mine = puppet.lead()
    puppet.ask(ballot("b", term=mine.term + 1), release(mine, "b"))
    assert puppet.outputs(LostCoordinator, CoordinatorChanged) == [
        LostCoordinator("leased to b"),
        CoordinatorChanged("b"),
    ]
    assert not puppet.machine.is_coordinator


def test_a_ballot_that_is_not_the_senders_is_ignored() -> None:
    puppet = Puppet()
    assert puppet.hear(Ask(header=header("b"), ballot=A, release=None)) == []


def test_a_message_for_another_boot_is_dropped() -> None:
    puppet = Puppet()
    assert puppet.hear(Ask(header=header("a", to_boot=BOOT + 1), ballot=A, release=None)) == []


# --- H2 ---


def test_a_beat_renews_the_lease_only_if_the_coordinator_hears_this_boot() -> None:
    deaf, hearing = leased_to_a(), leased_to_a()
    for puppet, hears in ((deaf, False), (hearing, True)):
        puppet.now_s += 1.5
        puppet.beat(A, hears=hears)
        puppet.tick(0.6)
    assert deaf.outputs(CoordinatorChanged) == [CoordinatorChanged(None)]
    assert hearing.outputs(CoordinatorChanged) == []


def test_a_beat_of_another_or_under_the_promise_is_refused() -> None:
    puppet = leased_to_a()
    for stranger in (B, ballot("b", term=9)):
        puppet.beat(stranger)
        assert puppet.sent(Ack) == []
        (nack,) = puppet.sent(Nack, "b")
        assert nack.promised == A
    puppet.ask(ballot("a", term=5))
    puppet.beat(A)
    assert len(puppet.sent(Nack, "a")) == 1


def test_a_beat_takes_the_ballot_and_the_heirs_and_is_acked() -> None:
    puppet = leased_to_a()
    puppet.beat(ballot("a", term=3), heirs=("b", ME))
    (ack,) = puppet.sent(Ack, "a")
    assert ack.ballot == ballot("a", term=3)


def test_an_overtaken_beat_does_not_abort_a_ready_epoch() -> None:
    """Row 5: the beat (prep none) left before the Prepare and comes after it."""
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"), seq=6)
    puppet.ready(epoch("a"))
    puppet.beat(A, seq=5)
    assert puppet.last == []
    assert puppet.machine.prepared == epoch("a")


def test_an_in_order_abort_drops_what_is_prepared() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"), seq=6)
    puppet.ready(epoch("a"))
    puppet.beat(A, seq=7)
    assert puppet.outputs(DropPrepared) == [DropPrepared(epoch("a"))]


def test_a_predecessors_epoch_is_kept_until_the_next_coordinator_has_a_plan() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"))
    puppet.now_s += TIMERS.lease_s
    puppet.ask(B)
    puppet.beat(B)
    assert puppet.machine.prepared == epoch("a")
    puppet.beat(B, cur=cert(epoch("b")))
    assert puppet.outputs(DropPrepared) == [DropPrepared(epoch("a"))]


# --- H3 ---


def test_prepare_starts_loading_and_ready_is_told_at_once() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"))
    assert puppet.outputs(StartPrepare) == [StartPrepare(epoch("a"), b"plan")]
    puppet.ready(epoch("a"))
    (ack,) = puppet.sent(Ack, "a")
    assert (ack.report.prepared, ack.report.is_ready) == (epoch("a"), True)


def test_prepare_is_obeyed_from_the_promised_coordinator_alone() -> None:
    puppet = leased_to_a()
    puppet.prepare(ballot("b", term=5), epoch("b", term=5))
    assert puppet.outputs(StartPrepare) == []
    assert len(puppet.sent(Nack, "b")) == 1


def test_prepare_for_another_boot_is_not_obeyed() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"), {ME: BOOT + 1, "a": BOOTS["a"]})
    assert puppet.last == []


def test_a_newer_prepare_replaces_and_an_older_does_not() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a", 2))
    puppet.prepare(A, epoch("a", 3))
    assert puppet.outputs(DropPrepared, StartPrepare) == [
        DropPrepared(epoch("a", 2)),
        StartPrepare(epoch("a", 3), b"plan"),
    ]
    puppet.prepare(A, epoch("a", 2))
    assert puppet.last == []


def test_a_failure_to_load_is_told_at_once() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"))
    puppet.last = puppet.machine.prepare_failed(epoch("a"), "needs 3 bytes, 2 free", puppet.now_s)
    (ack,) = puppet.sent(Ack, "a")
    assert (ack.report.is_ready, ack.report.failure) == (False, "needs 3 bytes, 2 free")


# --- H4 ---


def ready_for_a(n: int = 1) -> Puppet:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a", n))
    puppet.ready(epoch("a", n))
    return puppet


def test_commit_by_beat_spreads_the_certificate() -> None:
    puppet = ready_for_a()
    puppet.beat(A, cur=cert(epoch("a")))
    assert puppet.outputs(Committed) == [Committed(epoch("a"), cert(epoch("a")), None)]
    assert [output.to for output in puppet.outputs(Send) if isinstance(output.message, CertMessage)] == ["a"]


def test_commit_by_a_peers_certificate_is_told_to_the_holder() -> None:
    puppet = ready_for_a()
    puppet.certificate("b", epoch("a"))
    assert len(puppet.outputs(Committed)) == 1
    (ack,) = puppet.sent(Ack, "a")
    assert ack.report.committed == cert(epoch("a"))


def test_what_is_not_ready_or_not_genuine_is_not_committed() -> None:
    puppet = leased_to_a()
    puppet.prepare(A, epoch("a"))
    puppet.certificate("b", epoch("a"))
    assert puppet.machine.committed is None
    puppet.ready(epoch("a"))
    puppet.beat(A, cur=cert(epoch("a"), "another plan"), prep=epoch("a"))
    assert puppet.machine.committed is None
    genuine = cert(epoch("a"))
    puppet.beat(A, cur=type(genuine)(epoch=genuine.epoch, digest=genuine.digest, signature=b"a:no"))
    assert puppet.machine.committed is None


def test_a_certificate_is_not_obeyed_once_the_host_is_anothers() -> None:
    """Row 7; the new coordinator may endorse the epoch by naming it in its beat."""
    puppet = ready_for_a()
    puppet.now_s += TIMERS.lease_s
    puppet.ask(B)
    puppet.certificate("c", epoch("a"))
    assert puppet.outputs(Committed) == []
    puppet.beat(B, cur=cert(epoch("a")))
    assert puppet.outputs(Committed) == [Committed(epoch("a"), cert(epoch("a")), None)]


def test_an_expired_lease_still_obeys_its_coordinators_certificate() -> None:
    puppet = ready_for_a()
    puppet.now_s += TIMERS.lease_s
    puppet.certificate("c", epoch("a"))
    assert len(puppet.outputs(Committed)) == 1


def test_one_slot_each_with_forced_release() -> None:
    """Row 8."""
    puppet = Puppet()
    puppet.serve(A, epoch("a", 1))
    for n in (2, 3):
        puppet.prepare(A, epoch("a", n))
        puppet.ready(epoch("a", n))
        puppet.beat(A, cur=cert(epoch("a", n)))
    assert puppet.outputs(ReleaseDraining, Committed) == [
        ReleaseDraining(epoch("a", 1), is_forced=True),
        Committed(epoch("a", 3), cert(epoch("a", 3)), epoch("a", 2)),
    ]


# --- H5, H6 ---


def test_an_expired_lease_serves_on() -> None:
    puppet = Puppet()
    puppet.serve(A, epoch("a"))
    puppet.now_s += 60
    verdict = puppet.machine.admit_epoch(
        epoch("a"), known_epoch=None, k=1, cert=cert(epoch("a")), now_s=puppet.now_s
    )
    assert isinstance(verdict, Accepted)


def replanned() -> Puppet:
    """Serves n=2 and drains n=1."""
    puppet = Puppet()
    puppet.serve(A, epoch("a", 1))
    puppet.prepare(A, epoch("a", 2))
    puppet.ready(epoch("a", 2))
    puppet.beat(A, cur=cert(epoch("a", 2)))
    return puppet


@pytest.mark.parametrize(
    ("n", "known_n", "k", "is_accepted"),
    [
        (2, None, 1, True),
        (2, 2, 5, True),
        (1, 1, 5, True),
        (1, None, 1, False),
        (2, None, 2, False),
        (2, 1, 2, False),
        (1, 2, 2, False),
        (3, None, 1, False),
    ],
)
def test_which_steps_a_host_takes(n: int, known_n: int | None, k: int, is_accepted: bool) -> None:
    puppet = replanned()
    known = None if known_n is None else epoch("a", known_n)
    verdict = puppet.machine.admit_epoch(
        epoch("a", n), known_epoch=known, k=k, cert=cert(epoch("a", n)), now_s=puppet.now_s
    )
    if is_accepted:
        assert isinstance(verdict, Accepted)
    else:
        assert isinstance(verdict, Refused)
        assert verdict.cert == cert(epoch("a", 2))


def test_an_open_with_a_certificate_commits_the_prepared_epoch_first() -> None:
    puppet = ready_for_a()
    verdict = puppet.machine.admit_epoch(
        epoch("a"), known_epoch=None, k=1, cert=cert(epoch("a")), now_s=puppet.now_s
    )
    assert isinstance(verdict, Accepted)
    assert Committed(epoch("a"), cert(epoch("a")), None) in verdict.outputs


def test_an_open_without_a_certificate_does_not() -> None:
    puppet = ready_for_a()
    verdict = puppet.machine.admit_epoch(epoch("a"), known_epoch=None, k=1, cert=None, now_s=puppet.now_s)
    assert verdict == Refused("the epoch is not committed here", None)


def test_a_refused_driver_commits_what_it_learns() -> None:
    puppet = ready_for_a()
    puppet.last = puppet.machine.learn_cert(cert(epoch("a")), puppet.now_s)
    assert len(puppet.outputs(Committed)) == 1


# --- H7 ---


def test_draining_ends_with_its_sequences() -> None:
    puppet = replanned()
    puppet.last = puppet.machine.drained(epoch("a", 1), puppet.now_s)
    assert puppet.outputs(ReleaseDraining) == [ReleaseDraining(epoch("a", 1), is_forced=False)]
    assert puppet.machine.draining is None


def test_draining_ends_by_force_at_its_deadline() -> None:
    puppet = replanned()
    puppet.tick(TIMERS.drain_s)
    assert puppet.outputs(ReleaseDraining) == [ReleaseDraining(epoch("a", 1), is_forced=True)]


def test_a_restarted_daemon_starts_with_nothing() -> None:
    puppet = Puppet(highest_term_seen=8)
    assert (puppet.machine.committed, puppet.machine.prepared, puppet.machine.promised) == (
        None,
        None,
        LEAST_BALLOT,
    )
    puppet.wait(3)
    (became,) = puppet.outputs(BecameCoordinator)
    assert became.ballot.term == 9
