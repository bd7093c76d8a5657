"""From a fleet's tables to the cluster that is planned over: every host, every pair of hosts, every line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from hexmesh.catalogue import device_named, efficiency_of, link_named
from hexmesh.catalogue.efficiency import POOLED, fitted
from hexmesh.catalogue.entries import USABLE
from hexmesh.catalogue.rates import fabric_of, sustained_bytes_per_s, sustained_flops_per_s, usable_bytes
from hexmesh.cluster import Cluster, Device, Fabric, Link, Nic, Node, SiteLink
from hexmesh.errors import InvalidInput
from hexmesh.fleet.file import Fleet, FleetDevice, FleetHost, Line
from hexmesh.plan import DtypeName


def cluster_of(fleet: Fleet, dtype: DtypeName) -> Cluster:
    """The cluster that computes in `dtype`. Raises InvalidInput where a device cannot.

    Node ids are the hosts' names. A pair's link is the least of both NICs and the line between; a [[pair]] is taken
    as it is. Lines between sites are shared, and stand in `site_links`.
    """
    lines = _both_ways(fleet.wan)
    nodes = tuple(
        _node(fleet, host, name, dtype) for host in fleet.host for name in fleet.host_names()[host.name]
    )
    site_links = tuple(
        SiteLink(src=src, dst=dst, rtt_s=_wan_rtt(fleet, line), bytes_per_s=rate)
        for src in fleet.site_names()
        for dst in fleet.site_names()
        if src != dst and (found := _wan(fleet, lines, src, dst)) is not None
        for line, rate in [found]
    )
    return Cluster(nodes=nodes, links=tuple(_links(fleet, nodes, site_links)), site_links=site_links)


def _node(fleet: Fleet, host: FleetHost, name: str, dtype: DtypeName) -> Node:
    kinds = [device for device in host.devices for _ in range(device.count)]
    out = fleet.defaults.nic if host.nic is None else host.nic
    return Node(
        id=name,
        name=name,
        site=host.site,
        devices=tuple(_device(index, device, dtype) for index, device in enumerate(kinds)),
        nic=Nic(
            out_bytes_per_s=float(out), in_bytes_per_s=float(out if host.nic_in is None else host.nic_in)
        ),
        fabric=_fabric(host),
        launch_s=_launch_s(host),
        step_s=0.0 if host.step is None else float(host.step),
        price_per_h=_price_per_h(host),
        tp_degrees=host.tp,
        roles=host.roles,
    )


def _device(index: int, device: FleetDevice, dtype: DtypeName) -> Device:
    entry = None if device.type is None else device_named(device.type)
    flops, bandwidth, memory = (device.flops or {}).get(dtype), device.bandwidth, device.memory
    if entry is None:
        if flops is None or bandwidth is None:
            raise InvalidInput(
                f"device {device.name!r} has no flops for {dtype}",
                next_step=f"add {dtype} to its flops, or plan for {' or '.join(device.flops or {})}",
            )
        flops_per_s, bytes_per_s, memory_bytes, share = float(flops), float(bandwidth), memory or 0.0, USABLE
    else:
        flops_per_s = sustained_flops_per_s(entry, dtype) if flops is None else float(flops)
        bytes_per_s = sustained_bytes_per_s(entry) if bandwidth is None else float(bandwidth)
        memory_bytes, share = float(entry.memory_bytes if memory is None else memory), entry.usable
    return Device(
        index=index,
        kind=device.kind or ("cuda" if entry is None else entry.kind),
        name=device.name or ("" if entry is None else entry.name),
        budget_bytes=usable_bytes(memory_bytes, share) if device.budget is None else int(device.budget),
        flops_per_s=flops_per_s,
        bytes_per_s=bytes_per_s,
    )


def _fabric(host: FleetHost) -> Fabric | None:
    """As the host says, else as its first catalogue device comes; measured figures win."""
    types = [device.type for device in host.devices if device.type is not None]
    name = host.fabric or (device_named(types[0]).link if types else None)
    pooled = fitted().link[POOLED]
    if host.fabric_rate is not None:
        step_s = pooled.step_s if host.fabric_step is None else float(host.fabric_step)
        return Fabric(kind=name or "measured", bytes_per_s=float(host.fabric_rate), step_s=step_s)
    found = None if name is None else fabric_of(link_named(name))
    if found is None or host.fabric_step is None:
        return found
    return Fabric(kind=found.kind, bytes_per_s=found.bytes_per_s, step_s=float(host.fabric_step))


def _launch_s(host: FleetHost) -> float:
    """As the host says, else the largest of its catalogue devices', else the pooled one."""
    if host.launch is not None:
        return float(host.launch)
    rows = [efficiency_of(device_named(device.type)) for device in host.devices if device.type is not None]
    return max((row.launch_s for row in rows), default=fitted().device[POOLED].launch_s)


def _price_per_h(host: FleetHost) -> float | None:
    """As the host says, else the sum over its devices if the catalogue has them all."""
    if host.price_per_h is not None:
        return host.price_per_h
    prices = [
        None if device.type is None else device_named(device.type).price_per_h for device in host.devices
    ]
    known = [
        price * device.count for price, device in zip(prices, host.devices, strict=True) if price is not None
    ]
    return sum(known) if len(known) == len(prices) else None


def _links(fleet: Fleet, nodes: tuple[Node, ...], site_links: tuple[SiteLink, ...]) -> Iterator[Link]:
    between = {(link.src, link.dst): link for link in site_links}
    own = {site.name: site for site in fleet.site}
    pairs = {
        (a, b): found
        for (src, dst), found in _both_ways(fleet.pair).items()
        for a in _members(fleet, src)
        for b in _members(fleet, dst)
    }

    @cache
    def line(src: str, dst: str) -> tuple[float, float] | None:
        """(round trip, rate) between hosts of two sites, NICs apart."""
        if src == dst:
            site = own.get(src)
            rtt_s = fleet.defaults.site_rtt if site is None or site.rtt is None else site.rtt
            return float(rtt_s), float("inf") if site is None or site.rate is None else float(site.rate)
        found = between.get((src, dst))
        return None if found is None else (found.rtt_s, found.bytes_per_s)

    for src in nodes:
        for dst in nodes:
            if src is dst:
                continue
            found, pair = line(src.site, dst.site), pairs.get((src.id, dst.id))
            if pair is not None:
                rtt_s = (
                    pair[0].rtt if pair[0].rtt is not None else found[0] if found else fleet.defaults.wan_rtt
                )
                yield _link(src, dst, float(rtt_s), pair[1])
            elif found is not None:
                assert src.nic is not None
                assert dst.nic is not None
                yield _link(
                    src, dst, found[0], min(found[1], src.nic.out_bytes_per_s, dst.nic.in_bytes_per_s)
                )


def _link(src: Node, dst: Node, rtt_s: float, bytes_per_s: float) -> Link:
    return Link(
        src=src.id,
        dst=dst.id,
        rtt_p50_s=rtt_s,
        rtt_p95_s=rtt_s,
        bytes_per_s=bytes_per_s,
        lower_bound=False,
    )


def _members(fleet: Fleet, name: str) -> tuple[str, ...]:
    """The hosts that a name in [[pair]] stands for: one, or all of a table."""
    return fleet.host_names().get(name, (name,))


def _both_ways(lines: tuple[Line, ...]) -> Mapping[tuple[str, str], tuple[Line, float]]:
    ways = {}
    for line in lines:
        a, b = line.between
        ways[a, b] = line, float(line.rate)
        ways[b, a] = line, float(line.rate if line.rate_back is None else line.rate_back)
    return ways


def _wan(
    fleet: Fleet, lines: Mapping[tuple[str, str], tuple[Line, float]], src: str, dst: str
) -> tuple[Line | None, float] | None:
    if (src, dst) in lines:
        return lines[src, dst]
    return None if fleet.defaults.wan_rate is None else (None, float(fleet.defaults.wan_rate))


def _wan_rtt(fleet: Fleet, line: Line | None) -> float:
    return float(fleet.defaults.wan_rtt if line is None or line.rtt is None else line.rtt)
