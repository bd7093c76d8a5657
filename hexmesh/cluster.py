"""What the planner knows: devices with their speed, links with their delay and rate.

A snapshot of a running mesh has measured figures, and knows nothing of NICs, fabrics, sites' lines and prices (None or
empty); one made from a file (`hexmesh.fleet`) says all of it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

DeviceKind = Literal["cpu", "cuda", "rocm", "xpu", "mps", "npu", "hpu"]
"""As torch calls its backends, but for "rocm", which torch calls cuda too. A daemon drives cpu and cuda."""

Role = Literal["mixed", "prefill", "decode"]

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
    """What it sustains: measured with a GEMM in the mesh's compute dtype, or from the catalogue."""
    bytes_per_s: float
    """Sustained read bandwidth of the device's memory."""
    row_s: float = 0.0
    """Of a layer, what each sequence in a step takes beside what the rates explain."""


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine can send and receive in all, whoever the partners are."""

    out_bytes_per_s: float
    in_bytes_per_s: float


class Fabric(msgspec.Struct, frozen=True, kw_only=True):
    """How the devices of one machine reach each other."""

    kind: str
    """Such as "nvlink4"."""
    bytes_per_s: float
    """What one device sends, one way, while all of a group do."""
    step_s: float
    """Delay of one step of a collective."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine of the mesh. What is None is not known."""

    id: str
    name: str
    site: str
    devices: tuple[Device, ...]
    nic: Nic | None = None
    fabric: Fabric | None = None
    launch_s: float | None = None
    """What a layer takes on its devices beside what their rates explain."""
    step_s: float | None = None
    """What a step takes on a stage here beside its layers."""
    price_per_h: float | None = None
    tp_degrees: tuple[int, ...] | None = None
    """Group sizes that may share a layer; None: any that fits."""
    roles: tuple[Role, ...] | None = None
    """What it may do; None: anything."""


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


class SiteLink(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of the line between two sites, which all pairs of their nodes share."""

    src: str
    dst: str
    rtt_s: float
    bytes_per_s: float


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot to plan over. A pair of nodes without a link in it is never used together."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...]
    """What one pair reaches while nobody else sends: never more than its NICs and lines."""
    site_links: tuple[SiteLink, ...] = ()

    def node(self, node_id: str) -> Node:
        """The node of that id; KeyError if there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)

    def link_table(self) -> dict[tuple[str, str], Link]:
        """Links by (source, destination)."""
        return {(link.src, link.dst): link for link in self.links}
