"""What catalogue devices and links sustain: peak figures times the fitted factors."""

from __future__ import annotations

from hexmesh.catalogue.efficiency import efficiency_of, link_efficiency_of
from hexmesh.catalogue.entries import CatalogueDevice, CatalogueLink
from hexmesh.cluster import Fabric
from hexmesh.errors import InvalidInput


def sustained_flops_per_s(device: CatalogueDevice, dtype: str) -> float:
    """In matrices of many tokens. Raises InvalidInput where the device cannot compute in `dtype`."""
    peak = device.peak_flops_per_s
    if dtype not in peak:
        raise InvalidInput(
            f"{device.name} does not compute in {dtype}", next_step=f"plan for {' or '.join(peak)}"
        )
    return peak[dtype] * efficiency_of(device).prefill


def sustained_bytes_per_s(device: CatalogueDevice) -> float:
    """Reading weights and KV in decode steps."""
    return device.peak_bytes_per_s * efficiency_of(device).decode


def usable_bytes(memory_bytes: float, share: float) -> int:
    """What weights, KV and workspace may have of a device's memory."""
    return int(memory_bytes * share)


def fabric_of(link: CatalogueLink) -> Fabric | None:
    """The link as collectives meet it; None where devices cannot reach each other."""
    row = link_efficiency_of(link)
    if link.peak_bytes_per_s == 0:
        return None
    return Fabric(kind=link.name, bytes_per_s=link.peak_bytes_per_s * row.rate, step_s=row.step_s)
