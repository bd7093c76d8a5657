"""Devices and intra-host links by name, with the source of every figure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from difflib import get_close_matches
from functools import cache
from importlib import resources

import msgspec

from hexmesh.cluster import DeviceKind
from hexmesh.errors import InvalidInput
from hexmesh.units import parse_bytes, parse_flops, parse_rate

USABLE = 0.92
"""Share of a device's memory for weights, KV and workspace; the rest is the driver's and the allocator's."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where figures were read, and when."""

    title: str
    url: str
    read: date


class CatalogueDevice(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename={"efficiency_class": "class"},
):
    """A device as its maker describes it; sizes and rates as written in the file."""

    name: str
    kind: DeviceKind
    efficiency_class: str
    memory: str
    bandwidth: str
    flops: dict[str, str]
    link: str
    sources: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    watts: float | None = None
    price_per_h: float | None = None
    usable: float = USABLE
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory)

    @property
    def peak_bytes_per_s(self) -> float:
        return parse_rate(self.bandwidth)

    @property
    def peak_flops_per_s(self) -> Mapping[str, float]:
        """By dtype; a dtype that is not in it cannot be computed in."""
        return {dtype: parse_flops(text) for dtype, text in self.flops.items()}


class CatalogueLink(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename={"efficiency_class": "class"},
):
    """How devices of one host reach each other."""

    name: str
    efficiency_class: str
    rate: str
    sources: tuple[str, ...]
    unverified: tuple[str, ...] = ()
    note: str = ""

    @property
    def peak_bytes_per_s(self) -> float:
        """What one device sends, one way."""
        return parse_rate(self.rate)


class _DeviceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: dict[str, Source]
    device: tuple[CatalogueDevice, ...]


class _LinkFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: dict[str, Source]
    link: tuple[CatalogueLink, ...]


def data(name: str) -> str:
    """The text of a data file of the catalogue."""
    return resources.files("hexmesh.catalogue").joinpath(name).read_text(encoding="utf-8")


@cache
def devices() -> tuple[CatalogueDevice, ...]:
    """All devices, in the order of the file."""
    return _device_file().device


@cache
def links() -> tuple[CatalogueLink, ...]:
    """All intra-host links."""
    return _link_file().link


def device_sources() -> Mapping[str, Source]:
    """What the devices' `sources` name."""
    return _device_file().source


def link_sources() -> Mapping[str, Source]:
    """What the links' `sources` name."""
    return _link_file().source


def device_named(name: str) -> CatalogueDevice:
    """The device of that name or alias, whatever its case, spaces and dashes. Raises InvalidInput."""
    found = _devices_by_key().get(_key(name))
    if found is None:
        raise _unknown("device type", name, [device.name for device in devices()], _devices_by_key())
    return found


def link_named(name: str) -> CatalogueLink:
    """The intra-host link of that name. Raises InvalidInput."""
    by_key = {_key(link.name): link for link in links()}
    found = by_key.get(_key(name))
    if found is None:
        raise _unknown("link", name, [link.name for link in links()], by_key)
    return found


@cache
def _device_file() -> _DeviceFile:
    return msgspec.convert(tomllib.loads(data("devices.toml")), _DeviceFile)


@cache
def _link_file() -> _LinkFile:
    return msgspec.convert(tomllib.loads(data("links.toml")), _LinkFile)


@cache
def _devices_by_key() -> Mapping[str, CatalogueDevice]:
    return {_key(name): device for device in devices() for name in (device.name, *device.aliases)}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _unknown(
    what: str, name: str, names: Iterable[str], by_key: Mapping[str, CatalogueDevice | CatalogueLink]
) -> InvalidInput:
    close = [by_key[key].name for key in get_close_matches(_key(name), list(by_key), n=3, cutoff=0.5)]
    known = " or ".join(dict.fromkeys(close)) or f"one of {', '.join(names)}"
    return InvalidInput(
        f"no {what} {name!r} in the catalogue", next_step=f"write {known}, or give its figures"
    )
