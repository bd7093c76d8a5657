"""The figures that layout searches run over: seconds and room of every cut on every device, as arrays.

Axes: batch level, place, start, stop. A cut that cannot be (no room for its KV, stop <= start) costs
infinity, and so does a hop between nodes without a measured link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from hexmesh.cluster import Device, Link, Node
from hexmesh.cost import STAGE_OVERHEAD_S, CostModel

Seconds = npt.NDArray[np.float64]
Blocks = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Place:
    """A device that may hold a stage."""

    node: Node
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A pipeline: stage i is layers [bounds[i], bounds[i + 1]) on place order[i]."""

    order: tuple[int, ...]
    bounds: tuple[int, ...]
    batch: int
    """The batch level."""
    cycle_s: float

    def spans(self) -> list[tuple[int, int, int]]:
        """(place, start, stop) of every stage."""
        return [(place, *span) for place, span in zip(self.order, pairwise(self.bounds), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """One layout problem. `n_layers` layers go over some of `places`, in some order."""

    places: tuple[Place, ...]
    n_layers: int
    batches: tuple[int, ...]
    room_blocks: Blocks
    """(n_places, n_layers + 1, n_layers + 1): KV blocks beside layers [start, stop); negative: no room."""
    step_s: Seconds
    """(n_batches, n_places, n_layers + 1, n_layers + 1)"""
    hop_s: Seconds
    """(n_batches, n_places, n_places): from, to"""
    return_s: Seconds
    """(n_places, n_places): from the last, to the first"""

    def only(self, places: Sequence[int]) -> Tables:
        """The same problem over some of the places, in the order given."""
        kept = list(places)
        return replace(
            self,
            places=tuple(self.places[place] for place in kept),
            room_blocks=self.room_blocks[kept],
            step_s=self.step_s[:, kept],
            hop_s=self.hop_s[:, kept][:, :, kept],
            return_s=self.return_s[kept][:, kept],
        )

    def rate_of(self, cut: Cut) -> float:
        """Tokens per second of a pipeline."""
        return self.batches[cut.batch] / cut.cycle_s

    def room_of(self, cut: Cut) -> int:
        """KV blocks that the tightest stage of a pipeline has room for."""
        return min(int(self.room_blocks[span]) for span in cut.spans())

    def slowest_s(self, cut: Cut) -> float:
        """Step seconds of a pipeline's slowest stage."""
        return max(float(self.step_s[cut.batch, *span]) for span in cut.spans())

    def network_s(self, batch: int, order: Sequence[int]) -> float:
        """Hops and the way back of a pipeline over `order`."""
        hops = sum(float(self.hop_s[batch, a, b]) for a, b in pairwise(order))
        return hops + float(self.return_s[order[-1], order[0]])


def room_blocks(costs: CostModel, places: Sequence[Place]) -> Blocks:
    """KV blocks that each place could hold beside each cut, -1 where there is no such cut."""
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


def build_tables(
    costs: CostModel,
    places: Sequence[Place],
    links: Mapping[tuple[str, str], Link],
    *,
    room: Blocks,
    batches: Sequence[int],
    needed_blocks: Sequence[int],
    context_tokens: int,
) -> Tables:
    """Tables in which a stage at batch level i must have room for needed_blocks[i] KV blocks.

    A level is left out where a larger one has the same cuts: rates grow with the batch.
    """
    fits = [room >= n_blocks for n_blocks in needed_blocks]
    kept = [at for at, fit in enumerate(fits) if at + 1 == len(fits) or (fit != fits[at + 1]).any()]
    batches, needed_blocks = [batches[at] for at in kept], [needed_blocks[at] for at in kept]
    step_s = np.stack([_steps(costs, places, batch, context_tokens) for batch in batches])
    needed = np.array(needed_blocks, dtype=np.int64)[:, None, None, None]
    return Tables(
        places=tuple(places),
        n_layers=costs.spec.n_layers,
        batches=tuple(batches),
        room_blocks=room,
        step_s=np.where(room[None] >= needed, step_s, np.inf),
        hop_s=np.array([_hops(costs, places, links, batch) for batch in batches]),
        return_s=np.array([[_return(costs, a, b, links) for b in places] for a in places]),
    )


def _steps(costs: CostModel, places: Sequence[Place], batch: int, context_tokens: int) -> Seconds:
    """(n_places, n_layers + 1, n_layers + 1) stage seconds from prefix sums over the layers."""
    tables = []
    for place in places:
        layer_s = {
            layer: costs.layer_s(place.device, layer, batch, context_tokens)
            for layer in set(costs.spec.layers)
        }
        before = np.array(list(accumulate((layer_s[layer] for layer in costs.spec.layers), initial=0.0)))
        table = before[None, :] - before[:, None] + STAGE_OVERHEAD_S
        table[:, -1] += costs.head_s(place.device, batch)
        tables.append(table)
    return np.array(tables)


def _hops(
    costs: CostModel, places: Sequence[Place], links: Mapping[tuple[str, str], Link], batch: int
) -> list[list[float]]:
    def hop_s(src: Place, dst: Place) -> float:
        if src.node.id == dst.node.id:
            return costs.hop_s(None, batch)
        link = links.get((src.node.id, dst.node.id))
        return float("inf") if link is None else costs.hop_s(link, batch)

    return [[hop_s(src, dst) for dst in places] for src in places]


def _return(costs: CostModel, src: Place, dst: Place, links: Mapping[tuple[str, str], Link]) -> float:
    if src is dst:
        return 0.0
    if src.node.id == dst.node.id:
        return costs.return_s(None)
    link = links.get((src.node.id, dst.node.id))
    return float("inf") if link is None else costs.return_s(link)
