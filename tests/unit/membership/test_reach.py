"""Which way to a peer is taken, when the direct one is tried again, and what a node learns of its own reach."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hexmesh.cluster import Device, Link
from hexmesh.membership.reach import (
    FIRST_CHECK_S,
    LONGEST_CHECK_S,
    NEWS_S,
    DirectWay,
    OwnReach,
    Way,
    choose_way,
    unlinked_pairs,
)
from hexmesh.membership.records import DeviceFacts, LinkFacts, NodeRecord
from tests.node_records import node_record


@pytest.mark.parametrize(
    ("is_dialable", "has_accepted", "is_heard", "has_relay", "failed", "way"),
    [
        (True, True, True, True, None, "direct"),
        (False, True, True, True, None, "accepted"),
        (False, False, True, True, None, "call_back"),
        (False, False, False, True, None, "circuit"),
        (False, False, False, True, "direct", "circuit"),
        (False, False, False, True, "circuit", "direct"),
        (False, False, False, False, "direct", "direct"),
    ],
)
def test_the_cheapest_way_that_works(
    is_dialable: bool, has_accepted: bool, is_heard: bool, has_relay: bool, failed: Way | None, way: Way
) -> None:
    chosen = choose_way(
        is_dialable=is_dialable,
        has_accepted=has_accepted,
        is_heard=is_heard,
        has_relay=has_relay,
        failed=failed,
    )
    assert chosen == way


def test_a_closed_way_is_checked_ever_more_seldom() -> None:
    way = DirectWay()
    now_s, checks_s = 100.0, []
    way.failed("timed out", now_s)
    while now_s < 2000.0:
        now_s += 1.0
        if way.is_due(now_s):
            checks_s.append(now_s)
            way.failed("timed out", now_s)
    pauses_s = [later - earlier for earlier, later in pairwise(checks_s)]
    assert checks_s[0] == 100.0 + FIRST_CHECK_S
    assert pauses_s[:8] == [4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, LONGEST_CHECK_S]
    assert set(pauses_s[7:]) == {LONGEST_CHECK_S}


def test_news_and_success_begin_anew() -> None:
    way = DirectWay()
    for now_s in (0.0, 20.0, 60.0):
        way.failed("timed out", now_s)
    way.look_again()
    assert way.is_due(60.1)
    way.worked()
    assert (way.is_open, way.is_due(1e9), way.reason, way.closed_s(1e9)) == (True, False, "", None)
    way.failed("refused", 100.0)
    assert not way.is_due(100.0 + FIRST_CHECK_S - 0.1)
    assert way.is_due(100.0 + FIRST_CHECK_S)


def test_what_others_say_is_believed_only_of_a_way_that_never_worked() -> None:
    new, proven = DirectWay(), DirectWay()
    proven.worked()
    for way in (new, proven):
        way.presume_closed("others cannot dial it")
    assert (new.is_open, new.is_due(0.0)) == (False, True)
    assert proven.is_open


def test_a_refusal_is_evidence_of_a_death_only_where_the_way_was_open_a_moment_ago() -> None:
    way = DirectWay()
    assert not way.was_closed_before(10.0)
    way.failed("refused", 10.0)
    assert not way.was_closed_before(10.0 + NEWS_S)
    assert way.was_closed_before(10.1 + NEWS_S)


def test_a_node_is_dialable_unless_more_fail_than_succeed() -> None:
    reach = OwnReach()
    assert reach.is_dialable
    reach.missed("b", "timed out")
    assert not reach.is_dialable
    reach.reached("c")
    assert reach.is_dialable
    reach.missed("d", "timed out")
    assert (reach.is_dialable, reach.missed_by) == (False, {"b": "timed out", "d": "timed out"})
    reach.forget("d")
    assert reach.is_dialable
    reach.missed("c", "refused")
    assert not reach.is_dialable
    reach.reached("b")
    reach.forget("c")
    assert (reach.is_dialable, reach.missed_by) == (True, {})


def record(node: str, *linked: str, dialable: bool = False, has_devices: bool = True) -> NodeRecord:
    device = Device(index=0, kind="cpu", name="c", budget_bytes=1, flops_per_s=1.0, bytes_per_s=1.0)
    facts = DeviceFacts(device=device, n_threads=1, flops_spread=0, bytes_spread=0, measured_at_unix_s=0)
    return node_record(
        node,
        name=node,
        peer_address="10.0.0.1:7701",
        devices=(facts,) if has_devices else (),
        links=tuple(
            LinkFacts(
                link=Link(
                    src=node, dst=other, rtt_p50_s=0.1, rtt_p95_s=0.1, bytes_per_s=1.0, lower_bound=False
                ),
                measured_at_unix_s=0.0,
            )
            for other in linked
        ),
        dialable=dialable,
    )


def test_only_living_hidden_nodes_without_a_link_both_ways_are_apart() -> None:
    a, b, c = record("a", "b"), record("b"), record("c", "a", "b", dialable=True)
    dead, bare = record("dead"), record("bare", has_devices=False)
    alive = {"a", "b", "c", "bare"}
    assert unlinked_pairs([a, b, c, dead, bare], alive) == [(a, b)]
    assert unlinked_pairs([a, record("b", "a"), c], alive) == []
