"""Real devices and what is reached of their peak figures, from the data beside this file.

`devices.toml` and `links.toml` are data sheets with their sources; `efficiency.toml` is fitted from published
measurements by `tools.efficiency`, never by hand.
"""

from hexmesh.catalogue.efficiency import DeviceEfficiency, LinkEfficiency, efficiency_of, link_efficiency_of
from hexmesh.catalogue.entries import CatalogueDevice, CatalogueLink, device_named, devices, link_named, links

__all__ = [
    "CatalogueDevice",
    "CatalogueLink",
    "DeviceEfficiency",
    "LinkEfficiency",
    "device_named",
    "devices",
    "efficiency_of",
    "link_efficiency_of",
    "link_named",
    "links",
]
