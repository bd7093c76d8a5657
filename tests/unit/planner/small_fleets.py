"""Seeded clusters of a few devices, and models small enough to try everything on them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

from hexmesh.cluster import Cluster, Device, Fabric, Link, Nic, Node, Role, SiteLink
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.planner.objective import Goodput, Objective, Throughput
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Problem
from hexmesh.workload import Slo, Workload

KINDS = {
    "fast": (900e12 * 0.5, 3.0e12),
    "middle": (300e12 * 0.5, 1.8e12),
    "slow": (180e12 * 0.5, 0.8e12),
    "old": (60e12 * 0.5, 0.9e12),
}
"""FLOP/s and bytes/s."""


def model(n_layers: int) -> ModelSpec:
    """Layers as in Llama-2-70B, a small vocabulary."""
    return model_spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 4000,
        }
    )


def cluster(rng: random.Random, n_devices: int, n_layers: int, *, slow: bool = False) -> Cluster:
    """One to three hosts, now and then at two sites; each device holds a quarter of the model up to all of it twice."""
    sizes = _sizes(rng, n_devices)
    two_sites = len(sizes) > 1 and rng.random() < 0.3
    nodes = [_node(rng, at, size, n_layers, slow, two_sites) for at, size in enumerate(sizes)]
    sites = {node.id: node.site for node in nodes}
    wan_s, wan_rate = rng.uniform(0.005, 0.05), rng.uniform(0.02e9, 1.25e9)
    return Cluster(
        nodes=tuple(nodes),
        links=tuple(
            _link(a, b, *((wan_s, wan_rate) if sites[a.id] != sites[b.id] else (1e-4, 1e12)))
            for a, b in permutations(nodes, 2)
        ),
        site_links=tuple(
            SiteLink(src=a, dst=b, rtt_s=wan_s, bytes_per_s=wan_rate * 1.5)
            for a, b in (("east", "west"), ("west", "east"))
            if two_sites
        ),
    )


def _sizes(rng: random.Random, n_devices: int) -> list[int]:
    n_hosts = rng.randint(1, min(3, n_devices))
    cuts = sorted(rng.sample(range(1, n_devices), n_hosts - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, n_devices], strict=True)]


def _node(rng: random.Random, at: int, size: int, n_layers: int, slow: bool, two_sites: bool) -> Node:
    rate = rng.choice([0.02e9, 0.06e9, 0.125e9] if slow else [0.125e9, 1.25e9, 3.1e9, 12.5e9])
    kinds = [rng.choice(sorted(KINDS)) for _ in range(rng.randint(1, 2))]
    rooms = {kind: int(rng.uniform(0.3, 1.5) * n_layers * 1.75e9 + 1.2e9) for kind in kinds}
    devices = []
    for index in range(size):
        kind = rng.choice(kinds)
        flops, memory = KINDS[kind]
        devices.append(
            Device(
                index=index,
                kind="cuda",
                name=kind,
                budget_bytes=rooms[kind],
                flops_per_s=flops,
                bytes_per_s=memory,
            )
        )
    return Node(
        id=f"n{at}",
        name=f"n{at}",
        site="west" if two_sites and at else "east",
        devices=tuple(devices),
        nic=Nic(out_bytes_per_s=rate, in_bytes_per_s=rate),
        fabric=Fabric(kind="any", bytes_per_s=rng.choice([20e9, 200e9]), step_s=1e-5),
        launch_s=rng.choice([1e-5, 4e-5]),
        step_s=rng.choice([0.0, 8e-4]),
        price_per_h=round(rng.uniform(0.5, 9.0), 2),
    )


def _link(src: Node, dst: Node, rtt_s: float, most: float) -> Link:
    assert src.nic is not None
    assert dst.nic is not None
    rate = min(most, src.nic.out_bytes_per_s, dst.nic.in_bytes_per_s)
    return Link(src=src.id, dst=dst.id, rtt_p50_s=rtt_s, rtt_p95_s=rtt_s, bytes_per_s=rate, lower_bound=False)


def problem(
    fleet: Cluster,
    n_layers: int,
    *,
    roles: frozenset[Role] = frozenset(ROLES),
    objective: Objective | None = None,
    slo: Slo | None = None,
    workload: Workload | None = None,
) -> Problem:
    """A model of so many layers on the cluster."""
    return Problem(
        cluster=fleet,
        spec=model(n_layers),
        dtype="float16",
        workload=workload or Workload(slo=slo or Slo()),
        objective=objective or (Throughput() if slo is None else Goodput()),
        roles=roles,
    )


def other_objective(given: Problem, objective: Objective) -> Problem:
    """The same, wanting something else."""
    return replace(given, objective=objective)
