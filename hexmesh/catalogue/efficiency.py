"""What is reached of peak figures, by class of device and of link, as fitted from published measurements."""

from __future__ import annotations

import tomllib
from functools import cache

import msgspec

from hexmesh.catalogue.entries import CatalogueDevice, CatalogueLink, data

POOLED = "pooled"
"""The row for classes that nobody published measurements of: the geometric mean of the measured ones."""


class DeviceEfficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of the peak figures, and seconds beside them."""

    prefill: float
    """Of peak FLOP/s, in matrices of many tokens."""
    decode: float
    """Of peak memory bandwidth, in steps of few tokens."""
    launch_s: float
    """Of each layer, whatever its size."""
    points: int
    """Measurements that the row was fitted to; 0: pooled."""
    rms: float
    """Root mean square of their relative residuals."""


class LinkEfficiency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Share of the peak rate, and the delay of one step of a collective."""

    rate: float
    step_s: float
    points: int
    rms: float


class EfficiencyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole of efficiency.toml."""

    device: dict[str, DeviceEfficiency]
    link: dict[str, LinkEfficiency]
    framework_step_s: float
    """What the serving framework of the end-to-end measurements adds to each pass over the whole model."""


@cache
def fitted() -> EfficiencyFile:
    """The factors that ship with hexmesh."""
    return msgspec.convert(tomllib.loads(data("efficiency.toml")), EfficiencyFile)


def efficiency_of(device: CatalogueDevice) -> DeviceEfficiency:
    """The row of the device's class, or the pooled one."""
    rows = fitted().device
    return rows.get(device.efficiency_class, rows[POOLED])


def link_efficiency_of(link: CatalogueLink) -> LinkEfficiency:
    """The row of the link's class, or the pooled one."""
    rows = fitted().link
    return rows.get(link.efficiency_class, rows[POOLED])
