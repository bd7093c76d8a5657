"""Corrections of a device's measured figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec.structs import replace

from hexmesh.cluster import Node

MOST = 8.0
"""A factor is within this and its inverse: beyond, something else is wrong than a figure."""
MOST_LAUNCH_S, MOST_STEP_S, MOST_ROW_S = 5e-3, 5e-2, 2e-3

_Factor = Annotated[float, msgspec.Meta(ge=1 / MOST, le=MOST)]


class Factors(msgspec.Struct, frozen=True, kw_only=True):
    """What steps say of a device, beside what was measured of it alone."""

    flops: _Factor
    """Of the measured FLOP/s, what stages reach."""
    bytes: _Factor
    """Of the measured bytes/s."""
    launch_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_LAUNCH_S)]
    """Of a layer, beside what its rates explain."""
    step_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_STEP_S)]
    """Of a step, beside its layers."""
    row_s: Annotated[float, msgspec.Meta(ge=0, le=MOST_ROW_S)] = 0.0
    """Of a layer, for each sequence in the step."""
    n_steps: Annotated[int, msgspec.Meta(ge=0)]
    """How many it was fitted to."""

    def differs(self, other: Factors | None, share: float) -> bool:
        """Whether some figure is further from the other's than this share of it."""
        if other is None:
            return True
        pairs = (
            (self.flops, other.flops),
            (self.bytes, other.bytes),
            (self.launch_s + self.step_s, other.launch_s + other.step_s),
            (self.row_s, other.row_s),
        )
        return any(abs(one - before) > share * max(before, 1e-6) for one, before in pairs)


def applied(node: Node, factors: Mapping[int, Factors]) -> Node:
    """The node with corrected figures, by device index. Where its devices differ, the slowest call counts."""
    if not factors:
        return node
    devices = tuple(
        device
        if (known := factors.get(device.index)) is None
        else replace(
            device,
            flops_per_s=device.flops_per_s * known.flops,
            bytes_per_s=device.bytes_per_s * known.bytes,
            row_s=known.row_s,
        )
        for device in node.devices
    )
    return replace(
        node,
        devices=devices,
        launch_s=_most(one.launch_s for one in factors.values()),
        step_s=_most(one.step_s for one in factors.values()),
    )


def _most(seconds: Iterable[float]) -> float:
    return max(seconds)
