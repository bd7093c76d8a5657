"""A cluster as a fleet: a running mesh saved to a file, to be changed there and planned over again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.fleet.file import Defaults, Fleet, FleetDevice, FleetHost, Line
from hexmesh.plan import DtypeName
from hexmesh.toml_text import Bytes, BytesPerS, FlopsPerS, Seconds


def fleet_of(cluster: Cluster, dtype: DtypeName, name: str = "") -> Fleet:
    """The fleet whose cluster in `dtype` has the same devices and links, every figure as measured.

    Hosts are called by their names, made unique, instead of ids. A pair that was measured one way only is left out, and
    lines that pairs share are not known, so every pair of the file stands for itself.
    """
    names = _names(cluster.nodes)
    links = cluster.link_table()
    pairs = [
        Line(
            between=(names[a.id], names[b.id]),
            rate=BytesPerS(there.bytes_per_s),
            rate_back=BytesPerS(back.bytes_per_s) if back.bytes_per_s != there.bytes_per_s else None,
            rtt=Seconds((there.rtt_p50_s + back.rtt_p50_s) / 2),
        )
        for a, b in combinations(cluster.nodes, 2)
        if (there := links.get((a.id, b.id))) is not None and (back := links.get((b.id, a.id))) is not None
    ]
    return Fleet(
        name=name,
        host=tuple(_host(node, names[node.id], cluster.links, dtype) for node in cluster.nodes),
        defaults=Defaults(),
        pair=tuple(pairs),
    )


def _host(node: Node, name: str, links: Iterable[Link], dtype: DtypeName) -> FleetHost:
    """NICs that are not known are as fast as the fastest link that was measured."""
    out = max((link.bytes_per_s for link in links if link.src == node.id), default=Defaults().nic)
    into = max((link.bytes_per_s for link in links if link.dst == node.id), default=Defaults().nic)
    if node.nic is not None:
        out, into = node.nic.out_bytes_per_s, node.nic.in_bytes_per_s
    fabric = node.fabric
    return FleetHost(
        name=name,
        devices=tuple(_device(device, dtype) for device in node.devices),
        site=_word(node.site) or "here",
        nic=BytesPerS(out),
        nic_in=BytesPerS(into) if into != out else None,
        fabric=None if fabric is None else fabric.kind,
        fabric_rate=None if fabric is None else BytesPerS(fabric.bytes_per_s),
        fabric_step=None if fabric is None else Seconds(fabric.step_s),
        launch=None if node.launch_s is None else Seconds(node.launch_s),
        step=None if node.step_s is None else Seconds(node.step_s),
        price_per_h=node.price_per_h,
        tp=node.tp_degrees,
        roles=node.roles,
    )


def _device(device: Device, dtype: DtypeName) -> FleetDevice:
    return FleetDevice(
        name=device.name,
        kind=device.kind,
        budget=Bytes(device.budget_bytes),
        flops={dtype: FlopsPerS(device.flops_per_s)},
        bandwidth=BytesPerS(device.bytes_per_s),
    )


def _names(nodes: Iterable[Node]) -> dict[str, str]:
    """A name for every id: the node's own, with the start of its id where two share one."""
    words = {node.id: _word(node.name) or node.id[:8] for node in nodes}
    shared = Counter(words.values())
    return {
        node_id: word if shared[word] == 1 else f"{word[:50]}-{node_id[:12]}"
        for node_id, word in words.items()
    }


def _word(text: str) -> str:
    """The text with only what names in a file may have."""
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-")[:64]
