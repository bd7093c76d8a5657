"""A rate that no plan over a cluster can beat: layers spread over devices like a fluid.

A replica of rate X puts X l / L of its work on a stage of l of the L layers, and a stage's devices are busy for at most
all of the time. So a device of a group of t contributes at most its density, the best over t of

    decode    b / (t o L a(b)) with b = min(what memory lets be resident, cap)      prefill    1 / (t L a)

a being the quickest layer's time there (and l = 1, which leaves most room for KV). The busy shares of both phases sum
to one at most. What a host prefills beyond what it decodes must leave through its NIC, and likewise for sites and their
lines. A linear program over hosts maximises the rate. Optimistic: one micro-batch owns all of the memory, pipelines
have no bubble and no hops, nothing but the layers takes memory, limits of time are ignored.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from msgspec.structs import replace
from scipy.optimize import linprog

from hexmesh.cluster import Cluster, Device, Fabric, Node
from hexmesh.plan import DTYPE_BYTES
from hexmesh.roofline import Group
from hexmesh.score.capacity import BATCH_CAP, Capacities
from hexmesh.score.pipeline import launch_s


@dataclass(frozen=True, slots=True)
class Density:
    """Requests per second of one device, if it did nothing but one phase."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class _Pool:
    """Like devices of one host."""

    node: int
    n_devices: int
    density: Density


def fluid_bound(cluster: Cluster, capacities: Capacities) -> float:
    """Requests per second that no plan over the cluster exceeds, by this score."""
    pools = _pools(cluster, capacities)
    if not pools:
        return 0.0
    n = len(pools)
    kv_bytes = capacities.model.kv_bytes(capacities.workload.prompt_tokens)
    rows, most = [], []
    for at, pool in enumerate(pools):
        row = np.zeros(2 * n)
        row[at] = 1 / (pool.n_devices * pool.density.prefill) if pool.density.prefill else 0.0
        row[n + at] = 1 / (pool.n_devices * pool.density.decode) if pool.density.decode else 0.0
        rows.append(row)
        most.append(1.0)
    for members, out, into in _borders(cluster, pools):
        row = np.zeros(2 * n)
        row[members], row[[n + at for at in members]] = 1.0, -1.0
        rows += [row, -row]
        most += [out / kv_bytes, into / kv_bytes]
    kept = [at for at, limit in enumerate(most) if np.isfinite(limit)]
    balance = np.concatenate([np.ones(n), -np.ones(n)])
    found = linprog(
        -np.concatenate([np.ones(n), np.zeros(n)]),
        A_ub=np.array(rows)[kept],
        b_ub=np.array(most)[kept],
        A_eq=balance[None, :],
        b_eq=[0.0],
        bounds=[(0, None if pool.density.prefill else 0) for pool in pools]
        + [(0, None if pool.density.decode else 0) for pool in pools],
        method="highs",
    )
    assert found.success, found.message
    return float(-found.fun)


def densities(cluster: Cluster, capacities: Capacities) -> list[tuple[int, Density]]:
    """Of like devices of a host: how many, and what each of them gives at most."""
    return [(pool.n_devices, pool.density) for pool in _pools(cluster, capacities)]


def _pools(cluster: Cluster, capacities: Capacities) -> list[_Pool]:
    def figures(device: Device) -> Device:
        return replace(device, index=0, name="", kind="cuda")

    @cache
    def density(
        device: Device,
        fabric: Fabric | None,
        per_launch_s: float,
        degrees: tuple[int, ...],
        roles: frozenset[str],
    ) -> Density:
        groups = [Group(device=device, fabric=fabric, tp=tp, launch_s=per_launch_s) for tp in degrees]
        can_prefill, can_decode = roles != {"decode"}, roles != {"prefill"}
        return Density(
            max((_prefill(group, capacities) for group in groups), default=0.0) if can_prefill else 0.0,
            max((_decode(group, capacities) for group in groups), default=0.0) if can_decode else 0.0,
        )

    found = []
    for at, node in enumerate(cluster.nodes):
        roles = frozenset(node.roles or ("mixed", "prefill", "decode"))
        for device, n_devices in Counter(map(figures, node.devices)).items():
            found.append(
                _Pool(
                    at,
                    n_devices,
                    density(device, node.fabric, launch_s(node), _degrees(node, capacities), roles),
                )
            )
    return found


def _degrees(node: Node, capacities: Capacities) -> tuple[int, ...]:
    """TP degrees that some stage on the host may have."""
    most = len(node.devices) if node.fabric is not None else 1
    allowed = node.tp_degrees or range(1, most + 1)
    return tuple(tp for tp in allowed if tp <= most and capacities.costs.spec.splits_into(tp))


def _prefill(group: Group, capacities: Capacities) -> float:
    prompt, layers = capacities.workload.prompt_tokens, set(capacities.costs.spec.layers)
    quickest = min(capacities.model.prefill_layer_s(group, layer, prompt) for layer in layers)
    return 1 / (group.tp * capacities.costs.spec.n_layers * quickest)


def _decode(group: Group, capacities: Capacities) -> float:
    spec, workload, itemsize = capacities.costs.spec, capacities.workload, DTYPE_BYTES[capacities.costs.dtype]
    layers = set(spec.layers)
    weights = min(layer.params for layer in layers) * itemsize / group.tp
    kv = workload.mean_context * spec.kv_values_per_rank(group.tp) * itemsize

    batch = min((group.device.budget_bytes - weights) / kv, BATCH_CAP)
    if batch <= 0:
        return 0.0
    quickest = min(
        capacities.model.decode_layer_s(group, layer, batch, workload.mean_context) for layer in layers
    )
    return batch / (group.tp * workload.output_tokens * spec.n_layers * quickest)


def _borders(cluster: Cluster, pools: Iterable[_Pool]) -> list[tuple[list[int], float, float]]:
    """(pools inside, bytes/s out, bytes/s in) of every host and every site whose border is known."""
    by_node, by_site = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for at, pool in enumerate(pools):
        node = cluster.nodes[pool.node]
        by_node[node.id].append(at)
        by_site[node.site].append(at)
    hosts = [
        (by_node[node.id], node.nic.out_bytes_per_s, node.nic.in_bytes_per_s)
        for node in cluster.nodes
        if node.nic is not None
    ]
    lines: Mapping[str, tuple[float, float]] = {
        site: (
            sum(line.bytes_per_s for line in cluster.site_links if line.src == site),
            sum(line.bytes_per_s for line in cluster.site_links if line.dst == site),
        )
        for site in by_site
        if cluster.site_links
    }
    return hosts + [(by_site[site], out, into) for site, (out, into) in lines.items()]
