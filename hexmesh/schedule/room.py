"""Devices that may hold stages, and the KV blocks that each could hold beside each cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Device, Node
from hexmesh.cost import CostModel

Blocks = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """A device that may hold a stage."""

    node: Node
    device: Device


def room_blocks(costs: CostModel, places: Sequence[Place]) -> Blocks:
    """(n_places, n_layers + 1, n_layers + 1): KV blocks beside layers [start, stop), -1 where there is no such cut."""
    n_layers = costs.spec.n_layers
    fixed = np.zeros((n_layers + 1, n_layers + 1), dtype=np.int64)
    pool = np.zeros_like(fixed)
    for start in range(n_layers):
        for stop in range(start + 1, n_layers + 1):
            fixed[start, stop] = costs.fixed_bytes(start, stop)
            pool[start, stop] = costs.kv_block_bytes(stop - start)
    budgets = np.array([place.device.budget_bytes for place in places], dtype=np.int64)[:, None, None]
    gather = np.array([costs.gather_block_bytes(place.device.kind) for place in places], dtype=np.int64)
    room: Blocks = (budgets - fixed) // (pool + gather[:, None, None])
    return np.where(fixed > 0, room, -1)
