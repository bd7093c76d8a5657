"""A replica's layout, as the score needs it: groups of devices, their layers, and the hops between them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.cost import LOCAL_BYTES_PER_S, LOCAL_HOP_S, STAGE_OVERHEAD_S, layer_overhead_s
from hexmesh.errors import InvalidInput
from hexmesh.plan import Stage
from hexmesh.roofline import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A stage: layers [start, stop) on a group of devices."""

    group: Group
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Hop:
    """One direction between two seats."""

    delay_s: float
    bytes_per_s: float

    def send_s(self, n_bytes: float) -> float:
        """How long the bytes occupy the way."""
        return n_bytes / self.bytes_per_s


NOWHERE = Hop(0.0, math.inf)
"""From the last stage to the first where they are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Seats in order, the hops between them and the way back of the sampled tokens."""

    seats: tuple[Seat, ...]
    hops: tuple[Hop, ...]
    back: Hop


def pipeline_of(stages: Iterable[Stage], cluster: Cluster) -> Pipeline:
    """The layout of a plan's replica.

    Raises InvalidInput where a link is missing, or a way between a stage's devices.
    """
    placed = [(stage, cluster.node(stage.node)) for stage in stages]
    links = cluster.link_table()
    nodes = [node for _, node in placed]
    return Pipeline(
        seats=tuple(
            Seat(group=group_of(node, stage.devices), start=stage.start, stop=stage.stop)
            for stage, node in placed
        ),
        hops=tuple(hop_between(a, b, links) for a, b in pairwise(nodes)),
        back=NOWHERE if len(nodes) == 1 else hop_between(nodes[-1], nodes[0], links),
    )


def group_of(node: Node, indices: tuple[int, ...]) -> Group:
    """Devices of a host as one group, which is as fast as its slowest and as roomy as its tightest."""
    devices = [device for device in node.devices if device.index in indices]
    if len(indices) > 1 and node.fabric is None:
        raise InvalidInput(f"{node.name}: no way between its devices is known", next_step="give it a fabric")
    slowest = min(devices, key=lambda device: (device.bytes_per_s, device.flops_per_s))
    device = replace(
        slowest,
        budget_bytes=min(device.budget_bytes for device in devices),
        flops_per_s=min(device.flops_per_s for device in devices),
    )
    return group_like(node, device, len(indices))


def group_like(node: Node, device: Device, tp: int) -> Group:
    """So many devices of the node that are all like `device`."""
    return Group(
        device=device,
        fabric=node.fabric,
        tp=tp,
        launch_s=launch_s(node),
        step_s=STAGE_OVERHEAD_S if node.step_s is None else node.step_s,
    )


def launch_s(node: Node) -> float:
    """Of a layer on the node's devices: as the node says, else what its slowest kind of device is known to take."""
    known = max((layer_overhead_s(device.kind) for device in node.devices), default=0.0)
    return known if node.launch_s is None else node.launch_s


def hop_between(src: Node, dst: Node, links: dict[tuple[str, str], Link]) -> Hop:
    """From one node to another, or inside one. Raises InvalidInput where there is no link."""
    if src.id == dst.id:
        return Hop(LOCAL_HOP_S, LOCAL_BYTES_PER_S)
    link = links.get((src.id, dst.id))
    if link is None:
        raise InvalidInput(
            f"no link from {src.name} to {dst.name}", next_step="lay the replica out elsewhere"
        )
    return Hop(link.rtt_p50_s / 2, link.bytes_per_s)
