"""What the planner knows of the mesh: devices with measured speed, links with measured delay and rate."""

from __future__ import annotations

from typing import Literal

import msgspec

DeviceKind = Literal["cpu", "cuda"]

Availability = Literal["active", "cordoned", "drained", "leaving", "left"]
"""What a node says of itself. cordoned: place nothing new here; drained: and move away what is here; leaving: as
drained, and then it goes. The operator's word, kept by the node itself, is one of the first three."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, or one share of a host's CPUs, with the memory that hexmesh may use on it."""

    index: int
    kind: DeviceKind
    name: str
    budget_bytes: int
    """Room for weights, KV pool and workspace together."""
    flops_per_s: float
    """Measured with a GEMM in the mesh's compute dtype."""
    bytes_per_s: float
    """Measured sustained read bandwidth of the device's memory."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the mesh."""

    id: str
    name: str
    site: str
    devices: tuple[Device, ...]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between two nodes, as measured by its source."""

    src: str
    dst: str
    rtt_p50_s: float
    rtt_p95_s: float
    bytes_per_s: float
    """What a sustained transfer over one connection reaches, its start left out: the data channel is one connection.
    On a far link the sender's buffer may allow less than the link would carry over several."""
    lower_bound: bool
    """The probe ended before the rate had stopped rising; the true rate is at least this."""


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot to plan over. A pair of nodes without a link in it is never used together."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...]

    def node(self, node_id: str) -> Node:
        """The node of that id; KeyError if there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)

    def link_table(self) -> dict[tuple[str, str], Link]:
        """Links by (source, destination)."""
        return {(link.src, link.dst): link for link in self.links}
