"""A mesh saved as a file is the same mesh again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.fleet import cluster_of, fleet_of, read_fleet, write_fleet

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"


def _again(cluster: Cluster) -> Cluster:
    return cluster_of(read_fleet(write_fleet(fleet_of(cluster, "float16"))), "float16")


@pytest.mark.parametrize("name", ["two-desks", "vendors", "hexgen-58", "helix-24-geo"])
def test_every_host_and_link_comes_back(name: str) -> None:
    fleet = read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8"))
    cluster = cluster_of(fleet, "float16")
    again = _again(cluster)
    assert again.nodes == cluster.nodes
    assert again.link_table() == cluster.link_table()


def _node(node_id: str, name: str) -> Node:
    device = Device(
        index=0,
        kind="cpu",
        name="EPYC (2 threads)",
        budget_bytes=2**31 + 7,
        flops_per_s=1.23456789e11,
        bytes_per_s=9.87e9,
    )
    return Node(id=node_id, name=name, site="Zürich lab", devices=(device,))


def _link(src: str, dst: str, rtt_s: float, bytes_per_s: float) -> Link:
    return Link(src=src, dst=dst, rtt_p50_s=rtt_s, rtt_p95_s=rtt_s, bytes_per_s=bytes_per_s, lower_bound=True)


def test_a_running_mesh_has_names_sites_and_measured_links() -> None:
    ids = ["a" * 40, "b" * 40, "c" * 40]
    cluster = Cluster(
        nodes=tuple(_node(node_id, name) for node_id, name in zip(ids, ["box", "box", "gpu 1"], strict=True)),
        links=(
            _link(ids[0], ids[1], 0.01, 1.1e8),
            _link(ids[1], ids[0], 0.03, 2.2e8),
            _link(ids[0], ids[2], 0.05, 3.3e8),
        ),
    )
    again = _again(cluster)
    assert [node.id for node in again.nodes] == ["box-aaaaaaaaaaaa", "box-bbbbbbbbbbbb", "gpu-1"]
    assert {node.site for node in again.nodes} == {"Z-rich-lab"}
    assert [node.devices for node in again.nodes] == [node.devices for node in cluster.nodes]
    there = again.link_table()["box-aaaaaaaaaaaa", "box-bbbbbbbbbbbb"]
    back = again.link_table()["box-bbbbbbbbbbbb", "box-aaaaaaaaaaaa"]
    assert (there.bytes_per_s, back.bytes_per_s) == (1.1e8, 2.2e8)
    assert there.rtt_p50_s == back.rtt_p50_s == pytest.approx(0.02)


def test_a_changed_file_is_a_changed_mesh() -> None:
    fleet = fleet_of(cluster_of(read_fleet((FLEETS / "two-desks.toml").read_text()), "float16"), "float16")
    faster = msgspec.structs.replace(
        fleet, pair=(msgspec.structs.replace(fleet.pair[0], rate=type(fleet.pair[0].rate)(5e9)),)
    )
    assert cluster_of(faster, "float16").link_table()["left", "right"].bytes_per_s == 5e9
