"""What-if: changes in words move exactly what they name."""

from __future__ import annotations

import pytest

from hexmesh.errors import InvalidInput
from hexmesh.fleet import Scenario, read_fleet, what_if
from hexmesh.workload import named_workload

TEXT = """
name = "three"
[defaults]
nic = "10Gbit/s"
[[host]]
name = "a100"
count = 2
devices = [{ type = "A100-SXM-80GB", count = 4 }]
price_per_h = 8
[[host]]
name = "t4"
site = "there"
devices = [{ type = "T4", count = 2 }]
[[wan]]
between = ["here", "there"]
rate = "1Gbit/s"
rtt = "20ms"
[[pair]]
between = ["a100", "t4"]
rate = "500Mbit/s"
"""


@pytest.fixture
def scenario() -> Scenario:
    return Scenario(read_fleet(TEXT), named_workload("HPLD@2/s"), "float16")


def test_nothing_else_moves_when_tables_are_spread(scenario: Scenario) -> None:
    same = what_if(scenario, ["price t4=x1"])
    assert {node.id: node.devices for node in same.cluster.nodes} == {
        node.id: node.devices for node in scenario.cluster.nodes
    }
    assert set(same.cluster.links) == set(scenario.cluster.links)
    assert same.cluster.site_links == scenario.cluster.site_links


def test_a_host_is_added_and_reached_through_its_nic(scenario: Scenario) -> None:
    after = what_if(
        scenario, ["add host=new type=h100-sxm count=8 site=there nic=100Gbit/s price=20"]
    ).cluster
    new = after.node("new")
    assert (len(new.devices), new.devices[0].name, new.site, new.price_per_h) == (8, "H100-SXM", "there", 20)
    assert after.link_table()["new", "t4"].bytes_per_s == 10e9 / 8
    assert after.link_table()["new", "a100-0"].bytes_per_s == 1e9 / 8


def test_devices_are_added_to_a_host_and_taken_from_it(scenario: Scenario) -> None:
    after = what_if(scenario, ["add host=t4 type=L4 count=2", "remove a100-1 devices=3"]).cluster
    assert [device.name for device in after.node("t4").devices] == ["T4", "T4", "L4", "L4"]
    assert len(after.node("a100-1").devices) == 1
    assert len(after.node("a100-0").devices) == 4


def test_a_table_of_hosts_or_one_of_them_is_removed(scenario: Scenario) -> None:
    assert [node.id for node in what_if(scenario, ["remove a100-0"]).cluster.nodes] == ["a100-1", "t4"]
    after = what_if(scenario, ["remove a100"]).cluster
    assert [node.id for node in after.nodes] == ["t4"]
    assert after.links == ()


def test_links_lines_and_nics_move_what_goes_over_them(scenario: Scenario) -> None:
    links = what_if(scenario, ["link a100-0 t4 rate=2Gbit/s rtt=1ms"]).cluster.link_table()
    assert (links["a100-0", "t4"].bytes_per_s, links["t4", "a100-0"].rtt_p50_s) == (2e9 / 8, 1e-3)
    assert links["a100-1", "t4"].bytes_per_s == 5e8 / 8
    lines = what_if(scenario, ["link here there rate=x3"]).cluster.site_links
    assert [(line.bytes_per_s, line.rtt_s) for line in lines] == [(3e9 / 8, 0.02)] * 2
    after = what_if(scenario, ["nic a100=x0.5"]).cluster
    assert after.link_table()["a100-0", "a100-1"].bytes_per_s == 5e9 / 8
    assert after.node("t4").nic == scenario.cluster.node("t4").nic


def test_figures_of_devices_are_set_or_multiplied_by_host_or_type(scenario: Scenario) -> None:
    before, after = (
        scenario.cluster,
        what_if(scenario, ["memory T4=x2 a100-0=40GiB", "flops t4=x1.5"]).cluster,
    )
    assert after.node("t4").devices[1].budget_bytes == 2 * before.node("t4").devices[1].budget_bytes
    assert after.node("a100-0").devices[3].budget_bytes == int(0.92 * 40 * 2**30)
    assert after.node("a100-1").devices == before.node("a100-1").devices
    assert after.node("t4").devices[0].flops_per_s == 1.5 * before.node("t4").devices[0].flops_per_s
    bandwidth = what_if(scenario, ["bandwidth all=1GB/s"]).cluster
    assert {device.bytes_per_s for node in bandwidth.nodes for device in node.devices} == {1e9}


def test_price_fabric_and_rate(scenario: Scenario) -> None:
    after = what_if(scenario, ["price a100-1=3.2", "fabric a100=100GB/s", "rate x5"])
    assert [node.price_per_h for node in after.cluster.nodes[:2]] == [8, 3.2]
    fabric = after.cluster.node("a100-0").fabric
    assert fabric is not None
    assert fabric.bytes_per_s == 100e9
    assert after.workload.requests_per_s == 10
    assert after.workload.lengths == scenario.workload.lengths


def test_delays_and_limits(scenario: Scenario) -> None:
    before = scenario.cluster.link_table()["a100-0", "a100-1"]
    after = what_if(scenario, ["link here here rtt=x0.5", "launch t4=9us", "ttft 2s", "tpot 80ms", "ttft x2"])
    assert after.cluster.link_table()["a100-0", "a100-1"].rtt_p50_s == before.rtt_p50_s / 2
    assert after.cluster.node("t4").launch_s == 9e-6
    assert (after.workload.slo.ttft_s, after.workload.slo.tpot_s) == (4.0, 0.08)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no change is called ''; one of add, remove"),
        ("paint a100=red", "no change is called 'paint'"),
        ("remove x", "no host is called 'x'; name one of a100-0, a100-1, t4"),
        ("remove all", "no host would be left"),
        ("remove t4 devices=2", "has not so many to spare; write `remove t4`"),
        ("add type=T4", "host= is missing"),
        ("add host=new type=T5", "T5"),
        ("add host=t4 type=T4 price=1", "t4 is there already"),
        ("nic t4", "it takes NAME=VALUE"),
        ("nic t4=fast", "'fast' is not a rate"),
        ("link a100 t4 rate=1Gbit/s", "a100 is several hosts"),
        ("link a100-0 t4 rate=0Gbit/s", "a line of no rate"),
        ("memory H100=x2", "no host or device type is called 'H100'"),
        ("rate 0", "is no rate"),
        ("tpot x2", "it takes one duration"),
        ("link away away rtt=1ms", "no host is in site 'away'"),
        ("price t4=-1", "'-1' is no number"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(scenario: Scenario, text: str, said: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        what_if(scenario, [text])
    line = caught.value.one_line()
    assert line.startswith(f"what-if {text!r}: ")
    assert said in line
    assert "\n" not in line
