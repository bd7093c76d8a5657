"""What searches count with: pools of like devices, teams drawn from them, and parts of a pipeline.

Devices of one host that are alike cannot be told apart, so a search counts them instead of naming them: that is what
makes exact search possible at all (`planner.md` of the design counts 249 partitions where names give 1e11).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Node, Role
from hexmesh.model_spec import ModelSpec

ROLES: tuple[Role, ...] = ("mixed", "prefill", "decode")

Team = tuple[tuple[int, int], ...]
"""Devices of one replica: (pool, how many), by rising pool, without zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Like devices of one host."""

    node: Node
    device: Device
    """Any of them, with its index and name left out."""
    devices: tuple[int, ...]
    """Their indices on the host."""
    degrees: tuple[int, ...]
    """TP degrees that a stage here may have, rising; 1 is the first."""
    roles: frozenset[Role]
    """What they may be used for."""

    @property
    def size(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stage before it has got its devices: layers [start, stop) on `tp` devices of a pool."""

    pool: int
    tp: int
    start: int
    stop: int

    @property
    def n_layers(self) -> int:
        return self.stop - self.start


def team_of(parts: tuple[Part, ...]) -> Team:
    """The devices that a layout takes."""
    counts = defaultdict[int, int](int)
    for part in parts:
        counts[part.pool] += part.tp
    return tuple(sorted(counts.items()))


def pools_of(cluster: Cluster, spec: ModelSpec) -> tuple[Pool, ...]:
    """The cluster's devices by host and kind, in the order of the nodes; those without measured speed left out."""
    return tuple(pool for node in cluster.nodes for pool in _pools_of_node(node, spec))


def _pools_of_node(node: Node, spec: ModelSpec) -> Iterator[Pool]:
    alike = defaultdict[Device, list[int]](list)
    for device in node.devices:
        if device.flops_per_s > 0 and device.bytes_per_s > 0:
            alike[replace(device, index=0, name="")].append(device.index)
    for device, indices in alike.items():
        most = len(indices) if node.fabric is not None else 1
        allowed = node.tp_degrees or tuple(range(1, most + 1))
        yield Pool(
            node=node,
            device=device,
            devices=tuple(indices),
            degrees=tuple(tp for tp in sorted({1, *allowed}) if tp <= most and spec.splits_into(tp)),
            roles=frozenset(node.roles or ROLES),
        )
