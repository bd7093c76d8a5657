"""The cluster file: its tables, and what is checked when it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated

import msgspec

from hexmesh.catalogue import device_named, link_named
from hexmesh.cluster import DeviceKind, Role
from hexmesh.errors import InvalidInput
from hexmesh.plan import DtypeName
from hexmesh.toml_text import Bytes, BytesPerS, FlopsPerS, Path, Seconds, fault, read_toml

MAX_HOSTS = 4096
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[\w.+-]+$")]
_Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_HOSTS)]


class Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What holds where a table does not say otherwise."""

    nic: BytesPerS = BytesPerS(1.25e9)
    site_rtt: Seconds = Seconds(2e-4)
    """Between two hosts of one site."""
    wan_rate: BytesPerS | None = None
    """Between two sites without a [[wan]]; None: they are not connected."""
    wan_rtt: Seconds = Seconds(0.04)


class FleetDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices of one kind in a host: a type of the catalogue, or figures, or both."""

    type: str | None = None
    count: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    name: str | None = None
    kind: DeviceKind | None = None
    memory: Bytes | None = None
    """All of it; what plans may use is a share."""
    budget: Bytes | None = None
    """What plans may use, exactly."""
    flops: dict[DtypeName, FlopsPerS] | None = None
    """Sustained FLOP/s by dtype, as measured: used as it is."""
    bandwidth: BytesPerS | None = None
    """Sustained bytes/s of its memory, as measured: used as it is."""


class FleetHost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`count` like hosts; more than one are called name-0, name-1 and so on."""

    name: _Name
    devices: Annotated[tuple[FleetDevice, ...], msgspec.Meta(min_length=1, max_length=64)]
    site: _Name = "here"
    count: _Count = 1
    nic: BytesPerS | None = None
    """What it sends, and receives unless `nic_in` says otherwise."""
    nic_in: BytesPerS | None = None
    fabric: str | None = None
    """Name of a link in the catalogue; None: the one that its first device type has."""
    fabric_rate: BytesPerS | None = None
    """What a device of it sends to others, as measured: used as it is."""
    fabric_step: Seconds | None = None
    launch: Seconds | None = None
    step: Seconds | None = None
    """Of each layer, beside what the rates explain."""
    price_per_h: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """Of one such host."""
    tp: tuple[Annotated[int, msgspec.Meta(ge=1, le=64)], ...] | None = None
    roles: Annotated[tuple[Role, ...], msgspec.Meta(min_length=1)] | None = None


class FleetSite(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is special within a site."""

    name: _Name
    rtt: Seconds | None = None
    rate: BytesPerS | None = None
    """What two hosts of it reach at most; None: what their NICs do."""


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line between two ends, both ways: sites share it, a pair of hosts replaces what would hold for it."""

    between: tuple[_Name, _Name]
    rate: BytesPerS
    rate_back: BytesPerS | None = None
    """From the second to the first; None: the same."""
    rtt: Seconds | None = None


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole cluster file."""

    host: Annotated[tuple[FleetHost, ...], msgspec.Meta(min_length=1)]
    name: str = ""
    note: str = ""
    defaults: Defaults = Defaults()
    site: tuple[FleetSite, ...] = ()
    wan: tuple[Line, ...] = ()
    pair: tuple[Line, ...] = ()

    def host_names(self) -> dict[str, tuple[str, ...]]:
        """Names of the hosts that each table stands for."""
        return {
            host.name: (host.name,)
            if host.count == 1
            else tuple(f"{host.name}-{index}" for index in range(host.count))
            for host in self.host
        }

    def site_names(self) -> tuple[str, ...]:
        """The sites that hosts are in, in order of appearance."""
        return tuple(dict.fromkeys(host.site for host in self.host))


def read_fleet(text: str, where: str = "cluster file") -> Fleet:
    """The fleet of a cluster file's text. Raises InvalidInput, naming file, line, key and next step."""
    fleet = read_toml(text, Fleet, where)
    for path, message, next_step in _faults(fleet):
        raise fault(text, where, path, message, next_step)
    return fleet


def _faults(fleet: Fleet) -> Iterator[tuple[Path, str, str]]:
    yield from _host_faults(fleet)
    sites = set(fleet.site_names())
    for at, site in enumerate(fleet.site):
        if site.name not in sites:
            yield ("site", at, "name"), f"no host is in site {site.name!r}", _one_of("site", sites)
    yield from _line_faults("wan", fleet.wan, {name: (name,) for name in sites}, "site")
    members = fleet.host_names()
    members |= {name: (name,) for names in list(members.values()) for name in names}
    yield from _line_faults("pair", fleet.pair, members, "host")


def _host_faults(fleet: Fleet) -> Iterator[tuple[Path, str, str]]:
    names = Counter(name for names in fleet.host_names().values() for name in names)
    if sum(names.values()) > MAX_HOSTS:
        yield (
            ("host",),
            f"{sum(names.values())} hosts are more than {MAX_HOSTS}",
            "plan for a part of the fleet",
        )
    for at, host in enumerate(fleet.host):
        for name in fleet.host_names()[host.name]:
            if names[name] > 1:
                yield ("host", at, "name"), f"two hosts are called {name!r}", "give each a name of its own"
        n_devices = sum(device.count for device in host.devices)
        for degree in host.tp or ():
            if degree > n_devices:
                yield ("host", at, "tp"), f"TP {degree} of {n_devices} devices", f"write up to {n_devices}"
        try:
            fabric = None if host.fabric is None else link_named(host.fabric)
        except InvalidInput as error:
            if host.fabric_rate is None:
                yield ("host", at, "fabric"), error.message, f"{error.next_step} as fabric_rate"
            fabric = None
        if fabric is not None and fabric.peak_bytes_per_s == 0 and host.tp and max(host.tp) > 1:
            yield (
                ("host", at, "fabric"),
                "TP without a way between the devices",
                "leave tp out, or name a fabric",
            )
        for nth, device in enumerate(host.devices):
            yield from _device_faults(device, ("host", at, "devices", nth))


def _device_faults(device: FleetDevice, path: Path) -> Iterator[tuple[Path, str, str]]:
    if device.type is not None:
        try:
            device_named(device.type)
        except InvalidInput as error:
            yield (*path, "type"), error.message, error.next_step
        return
    has_memory = device.memory is not None or device.budget is not None
    given = {"name": device.name, "flops": device.flops, "bandwidth": device.bandwidth}
    missing = [key for key, value in given.items() if value is None] + ([] if has_memory else ["memory"])
    if missing:
        yield (
            path,
            f"no type, and no {', '.join(missing)}",
            "name a type of the catalogue, or give all figures",
        )


def _line_faults(
    table: str, lines: tuple[Line, ...], ends: dict[str, tuple[str, ...]], what: str
) -> Iterator[tuple[Path, str, str]]:
    for at, line in enumerate(lines):
        for end in line.between:
            if end not in ends:
                yield (
                    (table, at, "between"),
                    f"no host is in {what} {end!r}" if what == "site" else f"no host {end!r}",
                    (_one_of(what, ends)),
                )
                return
        if line.between[0] == line.between[1]:
            yield (table, at, "between"), f"both ends are {line.between[0]!r}", f"name two {what}s"
        if 0.0 in (line.rate, line.rate_back):
            yield (table, at, "rate"), "a line of no rate", "leave the line out, or give its rate"
    for (first, a), (second, b) in combinations(enumerate(lines), 2):
        if set(a.between) == set(b.between):
            yield (
                (table, second, "between"),
                f"{' and '.join(b.between)} are connected above ({table} {first + 1})",
                "keep one; rate_back is the way back",
            )


def _one_of(what: str, names: set[str] | dict[str, tuple[str, ...]]) -> str:
    known = sorted(names)
    return f"name a {what}: {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"
