"""From a file's tables to hosts, links and lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from hexmesh.catalogue import device_named, efficiency_of
from hexmesh.cluster import Cluster, Fabric, Nic, SiteLink
from hexmesh.cost import CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Plan
from hexmesh.schedule.check import check_plan
from hexmesh.schedule.layout import lay_out
from hexmesh.score import Capacities, score_replicas
from hexmesh.workload import Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"


def _example(name: str) -> Cluster:
    return cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8")), "float16")


def _cluster(text: str) -> Cluster:
    return cluster_of(read_fleet(text), "float16")


@pytest.mark.parametrize(
    ("name", "n_devices", "n_hosts", "n_sites", "price_per_h"),
    [
        ("hexgen-58", 58, 9, 4, 65.02),
        ("hexgen-30", 30, 5, 3, 29.59),
        ("hexgen-16-a100", 16, 2, 1, 65.54),
        ("hexgen-8-mixed", 8, 3, 1, None),
        ("hexgen2-h100", 8, 1, 1, 29.52),
        ("hexgen2-1", 20, 4, 1, 28.76),
        ("hexgen2-2", 12, 3, 1, 26.28),
        ("hexgen2-3", 22, 4, 1, 27.60),
        ("hexgen2-4", 20, 3, 1, 26.92),
        ("hexgen2-5", 17, 4, 1, 20.62),
        ("helix-24", 24, 24, 1, None),
        ("helix-24-geo", 24, 24, 3, None),
        ("helix-42", 64, 42, 1, None),
        ("mixed-24", 24, 6, 1, 31.80),
        ("mixed-24-10g", 24, 6, 1, 31.80),
        ("mixed-64", 64, 10, 1, 117.28),
        ("mixed-320", 320, 52, 3, 572.0),
        ("mixed-1024", 1024, 100, 4, 1703.68),
        ("vendors", 39, 7, 2, None),
        ("two-desks", 3, 2, 1, 0.35),
    ],
)
def test_examples_are_the_fleets_they_are_called(
    name: str, n_devices: int, n_hosts: int, n_sites: int, price_per_h: float | None
) -> None:
    cluster = _example(name)
    prices = [node.price_per_h for node in cluster.nodes]
    known = [price for price in prices if price is not None]
    assert sum(len(node.devices) for node in cluster.nodes) == n_devices
    assert len(cluster.nodes) == n_hosts
    assert len({node.site for node in cluster.nodes}) == n_sites
    assert (round(sum(known), 2) if len(known) == len(prices) else None) == price_per_h
    assert len(cluster.links) == n_hosts * (n_hosts - 1)


def test_every_example_is_tested() -> None:
    assert len(list(FLEETS.glob("*.toml"))) == 20


def test_hexgens_fleet_is_the_one_of_its_optimiser() -> None:
    nodes = _example("hexgen-58").nodes
    by_site = {node.site: 0 for node in nodes}
    for node in nodes:
        by_site[node.site] += len(node.devices)
    assert by_site == {"illinois": 28, "iceland": 16, "norway": 6, "nevada": 8}


def test_a_device_has_its_catalogue_figures_times_the_factors() -> None:
    device = _example("helix-24").node("t4-3").devices[0]
    entry = device_named("T4")
    row = efficiency_of(entry)
    assert device.flops_per_s == pytest.approx(65e12 * row.prefill)
    assert device.bytes_per_s == pytest.approx(320e9 * row.decode)
    assert device.budget_bytes == int(16 * 2**30 * 0.92)
    assert _example("helix-24").node("t4-3").launch_s == row.launch_s


def test_measured_figures_are_used_as_they_are() -> None:
    left, right = _example("two-desks").nodes
    assert left.devices[1].bytes_per_s == 790e9
    assert left.devices[1].flops_per_s == pytest.approx(71e12 * efficiency_of(device_named("3090")).prefill)
    assert (right.devices[0].flops_per_s, right.devices[0].kind) == (60e12, "rocm")
    assert right.fabric is None


def test_a_dtype_that_a_device_lacks_is_refused_by_name() -> None:
    fleet = read_fleet('[[host]]\nname = "a"\ndevices = [{ type = "V100" }]')
    with pytest.raises(InvalidInput, match="V100-SXM-32GB does not compute in bfloat16"):
        cluster_of(fleet, "bfloat16")
    own = '[[host]]\nname = "a"\ndevices = [{ name = "d", memory = 1e9, flops = {float16 = 1e12}, bandwidth = 1e11 }]'
    with pytest.raises(InvalidInput, match="device 'd' has no flops for float32") as refusal:
        cluster_of(read_fleet(own), "float32")
    assert refusal.value.next_step == "add float32 to its flops, or plan for float16"


TWO_SITES = """
[defaults]
nic = "10Gbit/s"
[[site]]
name = "a"
rtt = "1ms"
rate = "4Gbit/s"
[[host]]
name = "x"
site = "a"
count = 2
devices = [{ type = "T4", count = 2 }]
[[host]]
name = "y"
site = "b"
nic = "100Mbit/s"
nic_in = "20Gbit/s"
devices = [{ type = "H100", count = 8 }, { type = "T4" }]
fabric_rate = "200GB/s"
fabric_step = "2us"
tp = [1, 2]
roles = ["decode"]
[[wan]]
between = ["a", "b"]
rate = "2Gbit/s"
rate_back = "1Gbit/s"
rtt = "30ms"
"""


def test_a_link_is_the_least_of_its_nics_and_the_line() -> None:
    links = _cluster(TWO_SITES).link_table()
    assert {ends: (link.bytes_per_s * 8, link.rtt_p50_s) for ends, link in links.items()} == {
        ("x-0", "x-1"): (4e9, 0.001),
        ("x-1", "x-0"): (4e9, 0.001),
        ("x-0", "y"): (2e9, 0.03),
        ("x-1", "y"): (2e9, 0.03),
        ("y", "x-0"): (1e8, 0.03),
        ("y", "x-1"): (1e8, 0.03),
    }


def test_lines_between_sites_stand_apart_both_ways() -> None:
    assert _cluster(TWO_SITES).site_links == (
        SiteLink(src="a", dst="b", rtt_s=0.03, bytes_per_s=250e6),
        SiteLink(src="b", dst="a", rtt_s=0.03, bytes_per_s=125e6),
    )


def test_a_host_says_what_it_has_and_may() -> None:
    node = _cluster(TWO_SITES).node("y")
    assert node.nic == Nic(out_bytes_per_s=12.5e6, in_bytes_per_s=2.5e9)
    assert node.fabric == Fabric(kind="nvlink4", bytes_per_s=200e9, step_s=2e-6)
    assert (node.tp_degrees, node.roles) == ((1, 2), ("decode",))
    assert [device.index for device in node.devices] == list(range(9))
    assert node.price_per_h is None


def test_a_pair_replaces_nics_and_lines_for_all_hosts_of_its_tables() -> None:
    pair = '[[pair]]\nbetween = ["x", "y"]\nrate = "5Gbit/s"\nrate_back = "50Mbit/s"\nrtt = "7ms"\n'
    links = _cluster(TWO_SITES + pair).link_table()
    assert (links["x-1", "y"].bytes_per_s * 8, links["x-1", "y"].rtt_p50_s) == (5e9, 0.007)
    assert links["y", "x-0"].bytes_per_s * 8 == 5e7
    one = _cluster(TWO_SITES + pair.replace('"x"', '"x-0"').replace('rtt = "7ms"\n', "")).link_table()
    assert (one["x-0", "y"].bytes_per_s * 8, one["x-0", "y"].rtt_p50_s) == (5e9, 0.03)
    assert one["x-1", "y"].bytes_per_s * 8 == 2e9


def test_sites_without_a_line_are_not_connected_unless_the_defaults_say_so() -> None:
    text = TWO_SITES[: TWO_SITES.index("[[wan]]")]
    assert {link.src for link in _cluster(text).links} == {"x-0", "x-1"}
    assert _cluster(text).site_links == ()
    everywhere = _cluster(text.replace("[defaults]", '[defaults]\nwan_rate = "1Gbit/s"'))
    assert len(everywhere.links) == 6
    assert everywhere.link_table()["x-0", "y"].rtt_p50_s == 0.04


def test_the_planner_of_running_meshes_plans_over_a_file_too() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
    }
    spec, cluster = model_spec_from_config(config), _example("two-desks")
    hosts = {node.id: 1 for node in cluster.nodes}
    plan = lay_out(
        cluster,
        spec,
        "float16",
        Workload(),
        model_id="m",
        model_name="m",
        hosts=hosts,
        max_model_tokens=4096,
    )
    assert isinstance(plan, Plan)
    assert check_plan(plan, cluster, spec) == []
    capacities = Capacities(CostModel(spec, "float16", 16, StepLimits()), Workload())
    assert score_replicas(plan.replicas, cluster, capacities).requests_per_s > 0
