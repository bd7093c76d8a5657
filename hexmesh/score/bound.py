"""A price, and a time, that no plan over a cluster can beat; and what one device gives at most.

A replica of rate X puts X l / L of its work on a stage of l of the L layers, and a stage's devices are busy for at most
all of the time. So a device of a group of t contributes at most its density, the best over t of

    decode    b / (t o L a(b)) with b = min(what memory lets be resident, cap)      prefill    1 / (t L a)

a being the quickest layer's time there (and l = 1, which leaves most room for KV). The busy shares of both phases sum
to one at most. What a host prefills beyond what it decodes must leave through its NIC, and likewise for sites and their
lines. An integer program over hosts, each paid for in whole, minimises the price. Optimistic: one micro-batch owns all
of the memory, pipelines have no bubble and no hops, nothing but the layers takes memory, limits of time are ignored.
The most that a cluster serves is bounded more tightly (`fluid`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Node, Role
from hexmesh.plan import DTYPE_BYTES
from hexmesh.roofline import Group
from hexmesh.score.capacity import BATCH_CAP, Capacities
from hexmesh.score.pipeline import launch_s
from hexmesh.score.program import Program

ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")
LEAST_BYTES_PER_S = 1.0
"""A border that is closed counts as this."""
_GAP = 1e-3
_MAX_NODES = 300
_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Density:
    """Requests per second of one device, if it did nothing but one phase."""

    prefill: float
    decode: float

    def worth(self, prompt: float, output: float) -> float:
        """At most, when a prompt and an output are worth so much."""
        return max(prompt * self.prefill, output * self.decode, 0.0)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Like devices of one host."""

    node: int
    n_devices: int
    density: Density


def price_bound(
    cluster: Cluster, capacities: Capacities, requests_per_s: float, roles: Set[Role] = frozenset(ROLES)
) -> float:
    """Price per hour that any plan for the rate costs at least; infinite where none reaches it.

    A host is paid for in whole if anything of it is used; one without a known price is free.
    """
    program = Program()
    gates = {
        node.id: program.variable(-(node.price_per_h or 0.0), 1.0, is_integer=True) for node in cluster.nodes
    }
    for x in _fill(program, cluster, capacities, roles, gates):
        program.demand("rate", x, 1 / requests_per_s)
    if program.solve() is None:
        return math.inf
    return max(0.0, -program.most_of_integers(gap=_GAP, max_nodes=_MAX_NODES, limit_s=_LIMIT_S))


def latency_bound(cluster: Cluster, capacities: Capacities) -> float:
    """Seconds that any request takes at least: its layers on the quickest devices, as many as those have room for."""
    spec, total_s = capacities.costs.spec, 0.0
    left = float(spec.n_layers)
    least_bytes = min(layer.params for layer in set(spec.layers)) * DTYPE_BYTES[capacities.costs.dtype]
    quickest = sorted(
        (_request_layer_s(node, device, capacities), device.budget_bytes)
        for node in cluster.nodes
        for device in node.devices
        if device.flops_per_s > 0 and device.bytes_per_s > 0
    )
    for layer_s, budget_bytes in quickest:
        taken = min(left, budget_bytes / least_bytes)
        left, total_s = left - taken, total_s + taken * layer_s
    return total_s if left <= 1e-9 else math.inf


def _request_layer_s(node: Node, device: Device, capacities: Capacities) -> float:
    """A prompt and the tokens after the first of one request alone, through one layer."""
    workload, model, layers = capacities.workload, capacities.model, set(capacities.costs.spec.layers)
    groups = _groups(node, device, degrees_of(node, capacities))
    prefill_s = min(
        model.prefill_layer_s(group, layer, workload.prompt_tokens) for group in groups for layer in layers
    )
    decode_s = min(
        model.decode_layer_s(group, layer, 1.0, workload.mean_context) for group in groups for layer in layers
    )
    return prefill_s + max(0.0, workload.output_tokens - 1) * decode_s


def _fill(
    program: Program,
    cluster: Cluster,
    capacities: Capacities,
    roles: Set[Role],
    gates: Mapping[str, int],
) -> list[int]:
    """Rows of busy shares and borders; the variables of prompts."""
    pools = _pools(cluster, capacities, roles)
    prompts, outputs = list[int](), list[int]()
    for at, pool in enumerate(pools):
        gate = gates.get(cluster.nodes[pool.node].id)
        prompts.append(_phase(program, at, pool.n_devices * pool.density.prefill, gate))
        outputs.append(_phase(program, at, pool.n_devices * pool.density.decode, gate))
        program.balance("served", prompts[at], 1.0)
        program.balance("served", outputs[at], -1.0)
    kv_bytes = capacities.model.kv_bytes(capacities.workload.prompt_tokens)
    for number, (members, out, into) in enumerate(_borders(cluster, pools)):
        for at in members:
            for way, sign, limit in (("out", 1.0, out), ("in", -1.0, into)):
                program.use((way, number), prompts[at], sign * kv_bytes, max(limit, LEAST_BYTES_PER_S))
                program.use((way, number), outputs[at], -sign * kv_bytes, max(limit, LEAST_BYTES_PER_S))
    return prompts


def _phase(program: Program, pool: int, rate: float, gate: int | None) -> int:
    at = program.variable()
    program.use(("busy", pool), at, 1.0, rate, gate)
    return at


def density_of(
    node: Node, device: Device, degrees: Iterable[int], roles: Set[Role], capacities: Capacities
) -> Density:
    """What one device of the node gives at most, in groups of any of the degrees and in those roles."""
    groups = _groups(node, device, degrees)
    can_prefill, can_decode = not roles <= {"decode"}, not roles <= {"prefill"}
    return Density(
        max((_prefill(group, capacities) for group in groups), default=0.0) if can_prefill else 0.0,
        max((_decode(group, capacities) for group in groups), default=0.0) if can_decode else 0.0,
    )


def _groups(node: Node, device: Device, degrees: Iterable[int]) -> list[Group]:
    return [Group(device=device, fabric=node.fabric, tp=tp, launch_s=launch_s(node)) for tp in degrees]


def _pools(cluster: Cluster, capacities: Capacities, asked: Set[Role]) -> list[_Pool]:
    known = dict[object, Density]()
    found = []
    for at, node in enumerate(cluster.nodes):
        roles = frozenset(node.roles or ROLES) & asked
        degrees = degrees_of(node, capacities)
        for device, n_devices in devices_alike(node).items():
            key = device, node.fabric, launch_s(node), degrees, roles
            if key not in known:
                known[key] = density_of(node, device, degrees, roles, capacities)
            found.append(_Pool(at, n_devices, known[key]))
    return found


def devices_alike(node: Node) -> Counter[Device]:
    """How many devices of each kind the host has."""
    return Counter(replace(device, index=0, name="", kind="cuda") for device in node.devices)


def degrees_of(node: Node, capacities: Capacities) -> tuple[int, ...]:
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
    sites = by_site if cluster.site_links else ()
    return hosts + [(by_site[site], *lines_of(cluster, site)) for site in sites]


def lines_of(cluster: Cluster, site: str) -> tuple[float, float]:
    """Bytes/s of all lines out of the site, and into it."""
    lines = cluster.site_links
    return (
        sum(line.bytes_per_s for line in lines if line.src == site),
        sum(line.bytes_per_s for line in lines if line.dst == site),
    )
