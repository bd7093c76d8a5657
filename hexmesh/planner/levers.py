"""What would make a plan better: figures of the fleet that could be raised, and what each would bring.

A lever is tried on the plan as it is: its layouts are rated anew with a tenth more of something, and the flow program
says what they then serve together. What brings most is the bottleneck, in terms of what somebody could buy.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from msgspec.structs import replace as with_fields

from hexmesh.cluster import Cluster, Device, Link, Nic, Node
from hexmesh.planner.objective import Latency
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.score.pipeline import launch_s
from hexmesh.workload import Slo

LeverKind = Literal[
    "memory", "bandwidth", "flops", "launch", "fabric", "nic", "line", "link", "rtt", "ttft", "tpot"
]
STEP = 1.1
_LESS = 0.91
"""The same for what should be less."""
LEAST = 5e-4
"""Gains below it are rounding."""
_NAMES = {
    "memory": "memory",
    "bandwidth": "memory bandwidth",
    "flops": "compute",
    "launch": "time per layer beside compute and memory",
    "fabric": "the way between the devices",
    "nic": "network card",
    "line": "line between sites",
    "link": "link",
    "rtt": "round trip",
    "ttft": "limit on the time to the first token",
    "tpot": "limit on the time per output token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """Something of the fleet, or a limit, that could be more."""

    kind: LeverKind
    target: tuple[str, ...]
    """Device type; node ids; or the two ends."""
    label: str
    """Whose it is, in words."""
    what_if: str
    """The same question for `hexmesh plan --what-if`."""

    @property
    def text(self) -> str:
        """Such as "memory of 8 x A100-SXM-80GB"."""
        return f"{_NAMES[self.kind]} of {self.label}" if self.label else _NAMES[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a tenth more of a lever brings the plan as it is, as a share of what the objective looks at."""

    lever: Lever
    gain: float


def gains(problem: Problem, judged: Judged) -> list[Gain]:
    """Every lever's gain, the largest first; levers that bring nothing are left out."""
    present = value_of(problem, judged)
    found = [
        Gain(
            lever=lever,
            gain=value_of(raised(problem, lever), _again(problem, lever, judged.draft)) / present - 1,
        )
        for lever in levers(problem, judged.draft)
    ]
    return sorted((one for one in found if one.gain > LEAST), key=lambda one: -one.gain)


def value_of(problem: Problem, judged: Judged | None) -> float:
    """What the objective wants more of, as one number: the rate, or the speed of a request."""
    if judged is None:
        return 0.0
    if isinstance(problem.objective, Latency) and judged.figures.latency_s < math.inf:
        return 1 / judged.figures.latency_s
    return judged.flow.requests_per_s


def raised(problem: Problem, lever: Lever) -> Problem:
    """The problem with a tenth more of it."""
    slo = problem.workload.slo
    match lever.kind:
        case "ttft":
            assert slo.ttft_s is not None
            return _with_slo(problem, with_fields(slo, ttft_s=slo.ttft_s * STEP))
        case "tpot":
            assert slo.tpot_s is not None
            return _with_slo(problem, with_fields(slo, tpot_s=slo.tpot_s * STEP))
        case _:
            return replace(problem, cluster=raised_cluster(problem.cluster, lever))


def _with_slo(problem: Problem, slo: Slo) -> Problem:
    return replace(problem, workload=with_fields(problem.workload, slo=slo))


def raised_cluster(cluster: Cluster, lever: Lever) -> Cluster:
    """The cluster with a tenth more of it."""
    match lever.kind:
        case "nic":
            return _with_nics(cluster, set(lever.target))
        case "line" | "link" | "rtt":
            return _with_ways(cluster, lever)
        case _:
            return with_fields(cluster, nodes=tuple(_raised_node(node, lever) for node in cluster.nodes))


def _raised_node(node: Node, lever: Lever) -> Node:
    match lever.kind:
        case "fabric" if node.id in lever.target and node.fabric is not None:
            fabric = with_fields(node.fabric, bytes_per_s=node.fabric.bytes_per_s * STEP)
            return with_fields(node, fabric=fabric)
        case "launch" if node.id in lever.target:
            return with_fields(node, launch_s=launch_s(node) * _LESS)
        case "memory" | "bandwidth" | "flops":
            return with_fields(node, devices=tuple(_raised_device(device, lever) for device in node.devices))
        case _:
            return node


def _raised_device(device: Device, lever: Lever) -> Device:
    if device.name != lever.target[0]:
        return device
    match lever.kind:
        case "memory":
            return with_fields(device, budget_bytes=int(device.budget_bytes * STEP))
        case "bandwidth":
            return with_fields(device, bytes_per_s=device.bytes_per_s * STEP)
        case _:
            return with_fields(device, flops_per_s=device.flops_per_s * STEP)


def _with_nics(cluster: Cluster, raised_ids: set[str]) -> Cluster:
    """With faster network cards, and links that they limited as fast as both ends now allow."""

    def card(node: Node) -> Nic | None:
        if node.nic is None or node.id not in raised_ids:
            return node.nic
        return Nic(
            out_bytes_per_s=node.nic.out_bytes_per_s * STEP, in_bytes_per_s=node.nic.in_bytes_per_s * STEP
        )

    old = {node.id: node.nic for node in cluster.nodes}
    new = {node.id: card(node) for node in cluster.nodes}

    def link(link: Link) -> Link:
        before, after = _nics_rate(old, link), _nics_rate(new, link)
        is_limited = link.bytes_per_s >= before * (1 - 1e-9)
        return with_fields(link, bytes_per_s=after) if is_limited and after > before else link

    return with_fields(
        cluster,
        nodes=tuple(with_fields(node, nic=new[node.id]) for node in cluster.nodes),
        links=tuple(map(link, cluster.links)),
    )


def _nics_rate(nics: dict[str, Nic | None], link: Link) -> float:
    src, dst = nics[link.src], nics[link.dst]
    return math.inf if src is None or dst is None else min(src.out_bytes_per_s, dst.in_bytes_per_s)


def _with_ways(cluster: Cluster, lever: Lever) -> Cluster:
    """With a faster line or link, or a shorter round trip, both ways."""
    ends, sites = set(lever.target), {node.id: node.site for node in cluster.nodes}
    lines = {(line.src, line.dst): line for line in cluster.site_links}

    def link(link: Link) -> Link:
        between = {sites[link.src], sites[link.dst]}
        if lever.kind == "rtt" and between == ends:
            return with_fields(link, rtt_p50_s=link.rtt_p50_s * _LESS, rtt_p95_s=link.rtt_p95_s * _LESS)
        line = lines.get((sites[link.src], sites[link.dst]))
        follows = lever.kind == "line" and between == ends and line is not None
        follows = follows and line is not None and link.bytes_per_s >= line.bytes_per_s * (1 - 1e-9)
        if follows or (lever.kind == "link" and {link.src, link.dst} == ends):
            return with_fields(link, bytes_per_s=link.bytes_per_s * STEP)
        return link

    return with_fields(
        cluster,
        links=tuple(map(link, cluster.links)),
        site_links=tuple(
            with_fields(line, bytes_per_s=line.bytes_per_s * STEP)
            if lever.kind == "line" and {line.src, line.dst} == ends
            else line
            for line in cluster.site_links
        ),
    )


def _again(problem: Problem, lever: Lever, draft: Draft) -> Judged | None:
    """The same layouts, rated and judged with a tenth more of it."""
    other = raised(problem, lever)
    rated = [other.layouts.rated(layout.parts, layout.role) for layout in draft]
    return other.judge(tuple(layout for layout in rated if layout is not None))


def levers(problem: Problem, draft: Draft) -> Iterator[Lever]:
    """Everything that the draft uses."""
    used = _used_nodes(problem, draft)
    yield from _device_levers(problem, draft)
    for node_ids, kind in _shared_by(problem, draft, used):
        names = _node_names(problem.cluster, node_ids)
        changes = " ".join(f"{name}=x{_LESS if kind == 'launch' else STEP}" for name in names)
        yield Lever(kind=kind, target=node_ids, label=_listed(names), what_if=f"{kind} {changes}")
    yield from _way_levers(problem, draft, used)
    slo = problem.capacities.workload.slo
    if slo.ttft_s is not None:
        yield Lever(kind="ttft", target=(), label="", what_if=f"ttft x{STEP}")
    if slo.tpot_s is not None:
        yield Lever(kind="tpot", target=(), label="", what_if=f"tpot x{STEP}")


def _used_nodes(problem: Problem, draft: Draft) -> dict[str, Node]:
    return {
        problem.pools[part.pool].node.id: problem.pools[part.pool].node
        for layout in draft
        for part in layout.parts
    }


def _device_levers(problem: Problem, draft: Draft) -> Iterator[Lever]:
    counts = defaultdict[str, int](int)
    for layout in draft:
        for part in layout.parts:
            pool = problem.pools[part.pool]
            counts[_device_name(pool.node, pool.device)] += part.tp
    for name, n in counts.items():
        for kind in ("memory", "bandwidth", "flops"):
            word = name.replace(" ", "-")
            yield Lever(kind=kind, target=(name,), label=f"{n} x {name}", what_if=f"{kind} {word}=x{STEP}")


def _device_name(node: Node, like: Device) -> str:
    """Pools have no names of devices; the node's own have."""
    alike = with_fields(like, index=0, name="")
    return next(one.name for one in node.devices if with_fields(one, index=0, name="") == alike)


def _shared_by(
    problem: Problem, draft: Draft, used: dict[str, Node]
) -> Iterator[tuple[tuple[str, ...], LeverKind]]:
    """Nodes alike, and what of them could be more: one lever for all of a kind."""
    has_tp = {problem.pools[part.pool].node.id for layout in draft for part in layout.parts if part.tp > 1}
    classes = defaultdict[tuple[object, ...], list[str]](list)
    for node in used.values():
        kinds = tuple(sorted(device.name for device in node.devices))
        classes["launch", kinds].append(node.id)
        if node.nic is not None and len(used) > 1:
            classes["nic", kinds, node.nic].append(node.id)
        if node.id in has_tp:
            classes["fabric", kinds, node.fabric].append(node.id)
    for (kind, *_), node_ids in classes.items():
        yield tuple(node_ids), kind  # type: ignore[misc]  # the first of a key is a LeverKind


def _way_levers(problem: Problem, draft: Draft, used: dict[str, Node]) -> Iterator[Lever]:
    """Lines between the sites in use, links slower than their ends, and the round trips of hops."""
    cluster, sites = problem.cluster, sorted({node.site for node in used.values()})
    lines = {frozenset((line.src, line.dst)) for line in cluster.site_links}
    for a, b in ((a, b) for a in sites for b in sites if a < b):
        if frozenset((a, b)) in lines:
            yield Lever(
                kind="line", target=(a, b), label=f"{a} and {b}", what_if=f"link {a} {b} rate=x{STEP}"
            )
    hops = {
        (problem.pools[a.pool].node, problem.pools[b.pool].node)
        for layout in draft
        for a, b in pairwise((*layout.parts, layout.parts[0]))
        if problem.pools[a.pool].node.id != problem.pools[b.pool].node.id
    }
    for between in sorted({tuple(sorted({a.site, b.site})) for a, b in hops}):
        ends = between if len(between) == 2 else between * 2
        label = f"{ends[0]} and {ends[1]}" if len(between) == 2 else f"hosts in {ends[0]}"
        yield Lever(kind="rtt", target=ends, label=label, what_if=f"link {ends[0]} {ends[1]} rtt=x{_LESS}")
    yield from _slow_links(cluster, used, lines)


def _slow_links(cluster: Cluster, used: dict[str, Node], lines: set[frozenset[str]]) -> Iterator[Lever]:
    """Links between nodes in use that neither network card nor line explains."""
    nics = {node.id: node.nic for node in cluster.nodes}
    site = {node.id: node.site for node in cluster.nodes}
    for link in cluster.links:
        known = link.bytes_per_s >= _nics_rate(nics, link) * (1 - 1e-9)
        known = known or frozenset((site[link.src], site[link.dst])) in lines
        if link.src < link.dst and link.src in used and link.dst in used and not known:
            a, b = used[link.src].name, used[link.dst].name
            yield Lever(
                kind="link",
                target=(link.src, link.dst),
                label=f"{a} and {b}",
                what_if=f"link {a} {b} rate=x{STEP}",
            )


def _node_names(cluster: Cluster, node_ids: Iterable[str]) -> list[str]:
    """Names to ask about: a host table's where all of it is meant, so that they stay few."""
    meant = set(node_ids)
    tables = defaultdict[str, list[str]](list)
    for node in cluster.nodes:
        tables[re.sub(r"-\d+$", "", node.name)].append(node.id)
    names = []
    for table, members in tables.items():
        inside = [node for node in cluster.nodes if node.id in meant.intersection(members)]
        is_whole = len(members) > 1 and len(inside) == len(members)
        names += [table] if is_whole else [node.name for node in inside]
    return names


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
