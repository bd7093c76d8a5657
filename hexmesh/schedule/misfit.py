"""Why a model does not fit: what it needs, what there is, and what each device could take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np

from hexmesh.cluster import Cluster, Device, DeviceKind
from hexmesh.cost import CostModel
from hexmesh.plan import Unused
from hexmesh.schedule.explain import device_name
from hexmesh.schedule.room import Place, room_blocks
from hexmesh.units import show_bytes


class NoFit(msgspec.Struct, frozen=True, kw_only=True):
    """No layout holds the model and one sequence. needed_bytes counts every stage's workspace and copies."""

    message: str
    next_step: str
    needed_bytes: int
    room_bytes: int
    unused: tuple[Unused, ...]
    """Every device, and what it could hold."""
    explanation: tuple[str, ...]
    """The message and a line for every device."""


def misfit(
    cluster: Cluster, costs: CostModel, floor_tokens: int, usable: Sequence[Place], hosts: Mapping[str, int]
) -> NoFit:
    """The account of a search that found nothing for sequences of `floor_tokens`."""
    account = _Account(
        costs, floor_tokens, tuple(sorted(usable, key=lambda place: -place.device.budget_bytes))
    )
    needed, room = account.closest()
    message, next_step = account.blocker(needed, room)
    why = {(place.node.id, place.device.index): account.capacity(place) for place in usable}
    unused = tuple(
        Unused(
            node=node.id,
            device=device.index,
            reason=why.get((node.id, device.index)) or why_unusable(node.id, hosts),
        )
        for node in cluster.nodes
        for device in node.devices
    )
    lines = (f"{device_name(cluster, one.node, one.device)}: {one.reason}" for one in unused)
    return NoFit(
        message=message,
        next_step=next_step,
        needed_bytes=needed,
        room_bytes=room,
        unused=unused,
        explanation=(message, *lines),
    )


def why_unusable(node_id: str, hosts: Mapping[str, int]) -> str:
    """Why a device was not considered at all."""
    return "its speed is not measured yet" if node_id in hosts else "its host is not part of this plan"


def too_small(costs: CostModel, device: Device, floor_tokens: int) -> str:
    """Why a device cannot hold even one layer."""
    return (
        f"too little memory: one layer with KV for {floor_tokens} tokens needs "
        f"{show_bytes(least_layer_bytes(costs, floor_tokens, device.kind))}, "
        f"its budget is {show_bytes(device.budget_bytes)}"
    )


def least_layer_bytes(costs: CostModel, floor_tokens: int, kind: DeviceKind) -> int:
    """What a stage of one layer needs, at the place in the pipeline where that is least."""
    blocks = costs.blocks_of(floor_tokens)
    return min(costs.needed_bytes(at, at + 1, blocks, kind) for at in range(costs.spec.n_layers))


@dataclass(frozen=True, slots=True)
class _Account:
    """What is to be held, on what."""

    costs: CostModel
    floor_tokens: int
    roomiest: tuple[Place, ...]
    """Devices, the largest budget first."""

    @property
    def budgets(self) -> list[int]:
        return [place.device.budget_bytes for place in self.roomiest]

    def closest(self) -> tuple[int, int]:
        """(needed, room) of the number of stages that comes closest, over the roomiest devices.

        Room is that of all devices together where even that is too little. Where it is not, but no device
        holds even a layer, both are those of one layer.
        """
        budgets, n_layers = self.budgets, self.costs.spec.n_layers
        if not budgets:
            return self._needed(0, n_layers, "cpu"), 0
        needed, room = min(
            (
                (self._needed_by(n_stages), sum(budgets[:n_stages]))
                for n_stages in range(1, self._most_stages + 1)
            ),
            key=lambda option: option[0] - option[1],
        )
        if needed > sum(budgets):
            return needed, sum(budgets)
        layer = least_layer_bytes(self.costs, self.floor_tokens, self.roomiest[0].device.kind)
        return (layer, budgets[0]) if layer > budgets[0] else (needed, room)

    def blocker(self, needed: int, room: int) -> tuple[str, str]:
        """Message and next step."""
        if not self.roomiest:
            return (
                "no device with measured speed is part of the mesh",
                "wait for the measurements, or join a node",
            )
        kind, largest = self.roomiest[0].device.kind, self.budgets[0]
        n_devices = f"{len(self.roomiest)} device{'s' if len(self.roomiest) > 1 else ''}"
        sequence = f"one sequence of {self.floor_tokens} tokens"
        if needed == least_layer_bytes(self.costs, self.floor_tokens, kind):
            return (
                f"no device has room for one layer with KV for {sequence}: it needs {show_bytes(needed)}, "
                f"the roomiest of {n_devices} has {show_bytes(room)}",
                f"raise --memory to {show_bytes(needed)} or more on each node",
            )
        if needed > room:
            where = n_devices if room == sum(self.budgets) else "the roomiest devices"
            return (
                f"the model with {sequence} needs {show_bytes(needed)} and {where} have room for "
                f"{show_bytes(room)}",
                f"raise --memory or join nodes with at least {show_bytes(needed - room)} more",
            )
        n_layers = self.costs.spec.n_layers
        end = max(self._needed(0, 1, kind), self._needed(n_layers - 1, n_layers, kind))
        if end > largest:
            return (
                f"a stage with the embedding or the output head needs {show_bytes(end)} and the largest "
                f"device has {show_bytes(largest)}",
                f"give one device --memory {show_bytes(end)} or more",
            )
        return (
            f"{show_bytes(room)} would hold the {show_bytes(needed)} that the model with {sequence} needs, "
            f"but no cut into whole layers fits those of {n_devices} that measured links join",
            "check `hexmesh links` for pairs without a measurement, or raise --memory",
        )

    def capacity(self, place: Place) -> str:
        """What a device could hold, by its place in the pipeline."""
        n_layers = self.costs.spec.n_layers
        fits = room_blocks(self.costs, [place])[0] >= self.costs.blocks_of(self.floor_tokens)
        spans = [(int(start), int(stop)) for start, stop in np.argwhere(fits)]
        if not spans:
            return too_small(self.costs, place.device, self.floor_tokens)

        def most(wanted: Iterable[tuple[int, int]]) -> int:
            return max((stop - start for start, stop in wanted), default=0)

        return (
            f"its {show_bytes(place.device.budget_bytes)} could hold {most(spans)} of {n_layers} layers: "
            f"{most(span for span in spans if span[0] == 0)} as first stage, "
            f"{most(span for span in spans if span[1] == n_layers)} as last"
        )

    @property
    def _most_stages(self) -> int:
        return min(len(self.roomiest), self.costs.spec.n_layers)

    def _needed(self, start: int, stop: int, kind: DeviceKind) -> int:
        return self.costs.needed_bytes(start, stop, self.costs.blocks_of(self.floor_tokens), kind)

    def _needed_by(self, n_stages: int) -> int:
        """What the model needs in all as that many stages on the roomiest devices."""
        n_layers = self.costs.spec.n_layers
        bounds = [0, *range(n_layers - n_stages + 1, n_layers + 1)]
        spans = zip(pairwise(bounds), self.roomiest, strict=False)
        return sum(self._needed(start, stop, place.device.kind) for (start, stop), place in spans)
