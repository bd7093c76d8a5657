"""HexGen's search: its regions, its bound on replicas, and plans that colocate."""

from __future__ import annotations

import random
from pathlib import Path

from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.papers.hexgen_layout import REPLICA_BYTES, max_replicas
from hexmesh.planner.algorithms.genetic import Groups, Partition, delay_matrix, evolve, regions
from hexmesh.planner.pools import Team

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
GIB = 2**30
MACHINES = [
    [(8, 48), (8, 48), (8, 24), (4, 48)],
    [(8, 24), (8, 24)],
    [(3, 24), (3, 24)],
    [(8, 24)],
]
"""HexGen's regions: GPUs of a machine and GiB of each."""


def test_regions_of_hexgens_fleet_are_the_four_it_found() -> None:
    cluster = cluster_of(read_fleet((FLEETS / "hexgen-58.toml").read_text(encoding="utf-8")), "float16")
    found = regions(delay_matrix(cluster, 512 * 8192 * 2), random.Random(3))
    by_region: dict[int, set[str]] = {}
    for node, region in zip(cluster.nodes, found, strict=True):
        by_region.setdefault(region, set()).add(node.site)
    assert sorted(by_region.values(), key=sorted) == [{"iceland"}, {"illinois"}, {"nevada"}, {"norway"}]


def test_no_more_replicas_than_the_released_rule_has_room_for() -> None:
    machines = [machine for region in MACHINES for machine in region]
    region_of = [at for at, region in enumerate(MACHINES) for _ in region]
    first: Partition = tuple(
        tuple((pool, machines[pool][0]) for pool in range(len(machines)) if region_of[pool] == region)
        for region in range(len(MACHINES))
    )

    def holds_model(team: Team) -> bool:
        return sum(n * machines[pool][1] for pool, n in team) * GIB >= REPLICA_BYTES

    groups = Groups(region_of, holds_model, leaves_region=0.0)
    found = [
        len(partition)
        for partition in evolve(
            first, groups, lambda one: (len(one), 0.0, 0.0), random.Random(3), patience=300
        )
    ]
    most = max_replicas([sum(n * gib * GIB for n, gib in region) for region in MACHINES])
    assert found[0] == 4
    # Twelve need every group of Illinois to have 144 GiB exactly.
    assert 11 <= max(found) <= most == 12
