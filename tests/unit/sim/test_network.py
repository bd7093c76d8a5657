"""What ways share, and that nothing of what is sent is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.cluster import Cluster, Device, Link, Nic, Node, SiteLink
from hexmesh.errors import InvalidInput
from hexmesh.sim.events import Events
from hexmesh.sim.network import Network, Resource, fair_rates

RATE = 100.0
NAMES = ("a", "b", "c")


def _cluster(out: float = RATE, into: float = RATE, line: float | None = None) -> Cluster:
    """Three nodes, each pair linked at 1000 bytes/s; c is at another site if there is a line."""
    device = Device(index=0, kind="cuda", name="", budget_bytes=1, flops_per_s=1.0, bytes_per_s=1.0)
    nodes = tuple(
        Node(
            id=name,
            name=name,
            site="there" if name == "c" and line else "here",
            devices=(device,),
            nic=Nic(out_bytes_per_s=out, in_bytes_per_s=into),
        )
        for name in NAMES
    )
    links = tuple(
        Link(src=a, dst=b, rtt_p50_s=2.0, rtt_p95_s=2.0, bytes_per_s=1000.0, lower_bound=False)
        for a in NAMES
        for b in NAMES
        if a != b
    )
    lines = () if line is None else (SiteLink(src="here", dst="there", rtt_s=2.0, bytes_per_s=line),)
    return Cluster(nodes=nodes, links=links, site_links=lines)


def _arrivals(cluster: Cluster, sends: list[tuple[float, str, str, float]]) -> dict[int, float]:
    """When each piece of KV (at a time, from, to, bytes) has arrived."""
    events, arrived = Events(), dict[int, float]()
    network = Network(cluster, events)
    for n, (at_s, src, dst, n_bytes) in enumerate(sends):

        def on_sent(n: int = n) -> None:
            arrived[n] = events.now_s

        events.at(at_s, network.send_bulk, (src, dst), n_bytes, on_sent)
    events.run_while(lambda: True)
    return arrived


def test_one_alone_goes_at_the_rate_of_the_tightest_part() -> None:
    assert _arrivals(_cluster(), [(0.0, "a", "b", 500.0)]) == {0: 5.0 + 1.0}
    assert _arrivals(_cluster(line=50.0), [(0.0, "a", "c", 500.0)]) == {0: 10.0 + 1.0}


def test_two_to_one_host_share_its_nic() -> None:
    assert _arrivals(_cluster(), [(0.0, "a", "c", 500.0), (0.0, "b", "c", 1000.0)]) == {0: 11.0, 1: 16.0}


def test_on_one_way_they_go_one_after_the_other() -> None:
    assert _arrivals(_cluster(), [(0.0, "a", "b", 500.0), (1.0, "a", "b", 500.0)]) == {0: 6.0, 1: 11.0}


def test_who_comes_later_slows_down_who_is_under_way() -> None:
    assert _arrivals(_cluster(), [(0.0, "a", "c", 500.0), (2.0, "b", "c", 100.0)]) == {0: 7.0, 1: 5.0}


def test_opposite_ways_do_not_share() -> None:
    assert _arrivals(_cluster(), [(0.0, "a", "b", 500.0), (0.0, "b", "a", 500.0)]) == {0: 6.0, 1: 6.0}


def test_hidden_states_queue_and_kv_takes_its_share_of_their_rate() -> None:
    events = Events()
    network = Network(_cluster(), events)
    assert network.send(("a", "b"), 100.0) == 1.0 + 1.0
    assert network.send(("a", "c"), 100.0) == 2.0 + 1.0  # behind the first in a's NIC
    assert network.send(("c", "b"), 100.0) == 2.0 + 1.0  # and in b's
    events = Events()
    network = Network(_cluster(), events)
    network.send_bulk(("a", "b"), 1e6, lambda: None)
    assert network.send(("a", "b"), 100.0) == 2.0 + 1.0


def test_kv_leaves_room_for_the_hidden_states_of_late() -> None:
    events, arrived = Events(), list[float]()
    network = Network(_cluster(), events)
    for at in range(10):
        events.at(at / 10, network.send, ("a", "b"), 5.0)
    events.at(1.0, network.send_bulk, ("a", "b"), 500.0, lambda: arrived.append(events.now_s))
    events.run_while(lambda: True)
    assert arrived == [pytest.approx(1.0 + 500.0 / 50.0 + 1.0)]


def test_a_way_without_a_link_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no link from a to x"):
        Network(_cluster(), Events()).send(("a", "x"), 1.0)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 20.0), st.sampled_from(NAMES), st.sampled_from(NAMES), st.floats(1.0, 1e4)
        ).filter(lambda send: send[1] != send[2]),
        max_size=20,
    )
)
def test_every_byte_is_counted_once_and_no_nic_is_faster_than_it_is(
    sends: list[tuple[float, str, str, float]],
) -> None:
    events = Events()
    network = Network(_cluster(line=80.0), events)
    n_arrived = []
    for at_s, src, dst, n_bytes in sends:
        events.at(at_s, network.send_bulk, (src, dst), n_bytes, lambda: n_arrived.append(1))
    events.run_while(lambda: True)
    assert len(n_arrived) == len(sends)
    for resource, _, kv_bytes in network.resources():
        if resource.kind == "nic_out":
            assert kv_bytes == pytest.approx(sum(n for _, src, _, n in sends if src == resource.name))
        if resource.kind == "nic_in":
            assert kv_bytes == pytest.approx(sum(n for _, _, dst, n in sends if dst == resource.name))
        first_s = min(at_s for at_s, *_ in sends)
        assert kv_bytes <= resource.bytes_per_s * (events.now_s - first_s) * (1 + 1e-9)


def test_shares_are_max_min_fair() -> None:
    wide, narrow = Resource("nic_in", "wide", 90.0), Resource("nic_out", "narrow", 20.0)
    ways = {("a", "x"): (narrow, wide), ("b", "x"): (wide,), ("c", "x"): (wide,)}
    rates = fair_rates(ways, {wide: 90.0, narrow: 20.0})
    assert rates == {("a", "x"): 20.0, ("b", "x"): 35.0, ("c", "x"): 35.0}
