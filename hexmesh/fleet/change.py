"""What if a fleet were another: changes in words, such as "add host=a100-2 type=A100-SXM-80GB count=4".

    add host=NAME type=TYPE [count=N] [site=S] [nic=RATE] [price=P]     a host, or more devices of one that is there
    remove NAME [devices=N]                                             a host, or so many of its devices
    link A B rate=RATE [rtt=TIME]                                       between two hosts or two sites, both ways
    link A A rate=RATE [rtt=TIME]                                       between hosts of site A
    nic | fabric | launch | price NAME=VALUE                            of hosts, as in cluster files
    memory | bandwidth | flops NAME=VALUE                               of devices
    rate N | ttft TIME | tpot TIME                                      what the workload asks for

NAME is a host, a host table of several, or "all"; memory, bandwidth and flops take a device type, too. Values are
written as in cluster files, or as a multiple of what is there: "nic all=x2".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
from msgspec.structs import replace as with_fields

from hexmesh.catalogue import device_named
from hexmesh.cluster import Cluster, Node
from hexmesh.errors import InvalidInput
from hexmesh.fleet.expand import cluster_of
from hexmesh.fleet.file import Fleet, FleetDevice, FleetHost, FleetSite, Line, read_fleet
from hexmesh.fleet.write import write_fleet
from hexmesh.plan import DtypeName
from hexmesh.toml_text import Bytes, BytesPerS, FlopsPerS, Seconds
from hexmesh.units import parse_bytes, parse_duration_s, parse_flops, parse_rate
from hexmesh.workload import PoissonArrivals, Workload

_TIMES = re.compile(r"[x*](\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Scenario:
    """A fleet and what is asked of it."""

    fleet: Fleet
    workload: Workload
    dtype: DtypeName

    @cached_property
    def cluster(self) -> Cluster:
        return cluster_of(self.fleet, self.dtype)


def what_if(scenario: Scenario, changes: Iterable[str]) -> Scenario:
    """The scenario after all changes, one after the other. Raises InvalidInput, naming the change and what it takes."""
    for text in changes:
        scenario = _changed(scenario, text)
    return scenario


def _changed(scenario: Scenario, text: str) -> Scenario:
    verb, *words = text.split()[:16] or [""]
    change = _VERBS.get(verb)
    if change is None:
        raise InvalidInput(f"what-if {text!r}: no change is called {verb!r}", next_step=_one_of(_VERBS))
    try:
        found = change(replace(scenario, fleet=_spread(scenario.fleet)), words)
        # The file's own checks hold for what was changed, too.
        return replace(found, fleet=read_fleet(write_fleet(found.fleet), "the changed fleet"))
    except InvalidInput as error:
        raise InvalidInput(f"what-if {text!r}: {error.message}", next_step=error.next_step) from None


def _add(scenario: Scenario, words: Sequence[str]) -> Scenario:
    given = _settings(words, {"host", "type", "count", "site", "nic", "price"}, needed=("host", "type"))
    device = FleetDevice(type=device_named(given["type"]).name, count=_whole(given.get("count", "1")))
    fleet, name = scenario.fleet, given["host"]
    old = next((host for host in fleet.host if host.name == name), None)
    if old is not None:
        if given.keys() - {"host", "type", "count"}:
            raise InvalidInput(
                f"{name} is there already", next_step="give only type and count, or a new name"
            )
        return _with_hosts(scenario, {name: with_fields(old, devices=(*old.devices, device))})
    host = FleetHost(
        name=name,
        devices=(device,),
        site=given.get("site", fleet.host[0].site),
        nic=BytesPerS(parse_rate(given["nic"])) if "nic" in given else None,
        price_per_h=_number(given["price"]) if "price" in given else None,
    )
    return replace(scenario, fleet=with_fields(fleet, host=(*fleet.host, host)))


def _remove(scenario: Scenario, words: Sequence[str]) -> Scenario:
    if not words:
        raise InvalidInput("nothing to remove is named", next_step="write `remove HOST`")
    names = _hosts(scenario, words[0])
    given = _settings(words[1:], {"devices"})
    if "devices" in given:
        n = _whole(given["devices"])
        return _with_hosts(
            scenario, {host.name: _with_fewer(host, n) for host in scenario.fleet.host if host.name in names}
        )
    fleet = scenario.fleet
    kept = tuple(host for host in fleet.host if host.name not in names)
    if not kept:
        raise InvalidInput("no host would be left", next_step="keep one")
    sites = {host.site for host in kept}
    changed = with_fields(
        fleet,
        host=kept,
        site=tuple(site for site in fleet.site if site.name in sites),
        wan=tuple(line for line in fleet.wan if sites.issuperset(line.between)),
        pair=tuple(line for line in fleet.pair if not names & set(line.between)),
    )
    return replace(scenario, fleet=changed)


def _with_fewer(host: FleetHost, n: int) -> FleetHost:
    left = list(host.devices)
    while n and left:
        last = left.pop()
        gone = min(n, last.count)
        n -= gone
        if last.count > gone:
            left.append(with_fields(last, count=last.count - gone))
    if n or not left:
        raise InvalidInput(f"{host.name} has not so many to spare", next_step=f"write `remove {host.name}`")
    return with_fields(host, devices=tuple(left), tp=_still(host.tp, sum(device.count for device in left)))


def _still(degrees: tuple[int, ...] | None, n_devices: int) -> tuple[int, ...] | None:
    return None if degrees is None else tuple(tp for tp in degrees if tp <= n_devices) or (1,)


def _link(scenario: Scenario, words: Sequence[str]) -> Scenario:
    if len(words) < 2 or "=" in words[1]:
        raise InvalidInput("a link has two ends", next_step="write such as `link A B rate=10Gbit/s rtt=2ms`")
    a, b = words[:2]
    given = _settings(words[2:], {"rate", "rtt"})
    if a == b:
        return _site(scenario, a, given)
    fleet, is_wan = scenario.fleet, {a, b} <= set(scenario.fleet.site_names())
    if not is_wan:
        for end in (a, b):
            if _hosts(scenario, end) != {end}:
                raise InvalidInput(f"{end} is several hosts", next_step=f"name one, such as {end}-0")
    present = _way(scenario, a, b, is_wan=is_wan)
    if present is None and "rate" not in given:
        raise InvalidInput(f"{a} and {b} are not connected", next_step="give a rate")
    old_rate, old_rtt = present or (0.0, None)
    line = Line(
        between=(a, b),
        rate=BytesPerS(_value(given["rate"], parse_rate, old_rate) if "rate" in given else old_rate),
        rtt=Seconds(_value(given["rtt"], parse_duration_s, old_rtt or 0.0)) if "rtt" in given else old_rtt,
    )
    table = "wan" if is_wan else "pair"
    others = [one for one in getattr(fleet, table) if set(one.between) != {a, b}]
    return replace(scenario, fleet=with_fields(fleet, **{table: (*others, line)}))


def _site(scenario: Scenario, name: str, given: Mapping[str, str]) -> Scenario:
    fleet = scenario.fleet
    if name not in fleet.site_names():
        raise InvalidInput(f"no host is in site {name!r}", next_step=_one_of(fleet.site_names()))
    old = next((site for site in fleet.site if site.name == name), FleetSite(name=name))
    rtt_s = float(fleet.defaults.site_rtt if old.rtt is None else old.rtt)
    new = FleetSite(
        name=name,
        rtt=Seconds(_value(given["rtt"], parse_duration_s, rtt_s)) if "rtt" in given else old.rtt,
        rate=BytesPerS(_value(given["rate"], parse_rate, old.rate or 0.0)) if "rate" in given else old.rate,
    )
    others = [site for site in fleet.site if site.name != name]
    return replace(scenario, fleet=with_fields(fleet, site=(*others, new)))


def _way(scenario: Scenario, a: str, b: str, *, is_wan: bool) -> tuple[float, Seconds] | None:
    """(rate, round trip) of a way as it is."""
    if is_wan:
        lines = {(line.src, line.dst): line for line in scenario.cluster.site_links}
        line = lines.get((a, b))
        return None if line is None else (line.bytes_per_s, Seconds(line.rtt_s))
    link = scenario.cluster.link_table().get((a, b))
    return None if link is None else (link.bytes_per_s, Seconds(link.rtt_p50_s))


def _nic(scenario: Scenario, words: Sequence[str]) -> Scenario:
    def change(host: FleetHost, node: Node, text: str) -> FleetHost:
        assert node.nic is not None
        out = BytesPerS(_value(text, parse_rate, node.nic.out_bytes_per_s))
        into = BytesPerS(_value(text, parse_rate, node.nic.in_bytes_per_s))
        return with_fields(host, nic=out, nic_in=into if into != out else None)

    return _of_hosts(scenario, words, change)


def _fabric(scenario: Scenario, words: Sequence[str]) -> Scenario:
    def change(host: FleetHost, node: Node, text: str) -> FleetHost:
        present = 0.0 if node.fabric is None else node.fabric.bytes_per_s
        return with_fields(host, fabric_rate=BytesPerS(_value(text, parse_rate, present)))

    return _of_hosts(scenario, words, change)


def _launch(scenario: Scenario, words: Sequence[str]) -> Scenario:
    def change(host: FleetHost, node: Node, text: str) -> FleetHost:
        return with_fields(host, launch=Seconds(_value(text, parse_duration_s, node.launch_s or 0.0)))

    return _of_hosts(scenario, words, change)


def _price(scenario: Scenario, words: Sequence[str]) -> Scenario:
    def change(host: FleetHost, node: Node, text: str) -> FleetHost:
        return with_fields(host, price_per_h=_value(text, _number, node.price_per_h or 0.0))

    return _of_hosts(scenario, words, change)


def _memory(scenario: Scenario, words: Sequence[str]) -> Scenario:
    """A size is all of a device's memory, a multiple is one of what plans may use of it."""

    def change(device: FleetDevice, present: tuple[float, float, float], text: str) -> FleetDevice:
        if _TIMES.fullmatch(text):
            return with_fields(device, budget=Bytes(int(_value(text, parse_bytes, present[0]))))
        return with_fields(device, memory=Bytes(parse_bytes(text)), budget=None)

    return _of_devices(scenario, words, change)


def _bandwidth(scenario: Scenario, words: Sequence[str]) -> Scenario:
    def change(device: FleetDevice, present: tuple[float, float, float], text: str) -> FleetDevice:
        return with_fields(device, bandwidth=BytesPerS(_value(text, parse_rate, present[1])))

    return _of_devices(scenario, words, change)


def _flops(scenario: Scenario, words: Sequence[str]) -> Scenario:
    dtype = scenario.dtype

    def change(device: FleetDevice, present: tuple[float, float, float], text: str) -> FleetDevice:
        flops = FlopsPerS(_value(text, parse_flops, present[2]))
        return with_fields(device, flops={**(device.flops or {}), dtype: flops})

    return _of_devices(scenario, words, change)


def _rate(scenario: Scenario, words: Sequence[str]) -> Scenario:
    if len(words) != 1:
        raise InvalidInput("it takes one number", next_step="write such as `rate 20`")
    present = scenario.workload.requests_per_s or 0.0
    rate = _value(words[0].removesuffix("/s"), _number, present)
    if not 0 < rate <= 1e6:
        raise InvalidInput(
            f"{words[0]!r} is no rate", next_step="write requests per second, such as `rate 20`"
        )
    arrivals = PoissonArrivals(requests_per_s=rate)
    return replace(scenario, workload=with_fields(scenario.workload, arrivals=arrivals))


def _limit(key: str) -> Callable[[Scenario, Sequence[str]], Scenario]:
    def change(scenario: Scenario, words: Sequence[str]) -> Scenario:
        slo = scenario.workload.slo
        present = getattr(slo, key)
        if len(words) != 1 or (present is None and _TIMES.fullmatch(words[0])):
            raise InvalidInput("it takes one duration", next_step="write such as 200ms")
        limit_s = _value(words[0], parse_duration_s, present or 0.0)
        if limit_s <= 0:
            raise InvalidInput("a limit of no time", next_step="write such as 200ms")
        slo = with_fields(slo, **{key: limit_s})
        return replace(scenario, workload=with_fields(scenario.workload, slo=slo))

    return change


_VERBS: Mapping[str, Callable[[Scenario, Sequence[str]], Scenario]] = {
    "add": _add,
    "remove": _remove,
    "link": _link,
    "nic": _nic,
    "fabric": _fabric,
    "launch": _launch,
    "memory": _memory,
    "bandwidth": _bandwidth,
    "flops": _flops,
    "price": _price,
    "rate": _rate,
    "ttft": _limit("ttft_s"),
    "tpot": _limit("tpot_s"),
}


def _of_hosts(
    scenario: Scenario, words: Sequence[str], change: Callable[[FleetHost, Node, str], FleetHost]
) -> Scenario:
    """The scenario with `change` made to every host that the words name, "NAME=VALUE" each."""
    for name, text in _assignments(words):
        names = _hosts(scenario, name)
        changed = {
            host.name: change(host, scenario.cluster.node(host.name), text)
            for host in scenario.fleet.host
            if host.name in names
        }
        scenario = _with_hosts(scenario, changed)
    return scenario


def _of_devices(
    scenario: Scenario,
    words: Sequence[str],
    change: Callable[[FleetDevice, tuple[float, float, float], str], FleetDevice],
) -> Scenario:
    """The same for devices, which are told (usable memory, bandwidth, FLOP/s) of theirs."""
    for name, text in _assignments(words):
        kinds = {device.name for node in scenario.cluster.nodes for device in node.devices}
        kind = next((known for known in kinds if _plain(known) == _plain(name)), None)
        names = {host.name for host in scenario.fleet.host} if kind else _hosts(scenario, name, or_type=True)
        changed = {}
        for host in scenario.fleet.host:
            if host.name in names:
                present = iter(scenario.cluster.node(host.name).devices)
                devices = []
                for device in host.devices:
                    first, *_ = [next(present) for _ in range(device.count)]
                    figures = (float(first.budget_bytes), first.bytes_per_s, first.flops_per_s)
                    is_meant = kind is None or first.name == kind
                    devices.append(change(device, figures, text) if is_meant else device)
                changed[host.name] = with_fields(host, devices=tuple(devices))
        scenario = _with_hosts(scenario, changed)
    return scenario


def _with_hosts(scenario: Scenario, changed: Mapping[str, FleetHost]) -> Scenario:
    hosts = tuple(changed.get(host.name, host) for host in scenario.fleet.host)
    return replace(scenario, fleet=with_fields(scenario.fleet, host=hosts))


def _hosts(scenario: Scenario, name: str, *, or_type: bool = False) -> set[str]:
    """The hosts that a name stands for: one, those of a table, or all."""
    names = [host.name for host in scenario.fleet.host]
    if name == "all":
        return set(names)
    found = {host for host in names if host == name} or {
        host for host in names if re.fullmatch(rf"{re.escape(name)}-\d+", host)
    }
    if not found:
        what = "host or device type" if or_type else "host"
        shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
        raise InvalidInput(f"no {what} is called {name!r}", next_step=f"name one of {shown}")
    return found


def _spread(fleet: Fleet) -> Fleet:
    """The same fleet with a table for every host, so that one of several can be changed."""
    names = fleet.host_names()
    if all(host.count == 1 for host in fleet.host):
        return fleet
    hosts = tuple(with_fields(host, name=name, count=1) for host in fleet.host for name in names[host.name])
    pairs = {
        frozenset((a, b)): msgspec.structs.replace(line, between=(a, b))
        for line in fleet.pair
        for a in names.get(line.between[0], (line.between[0],))
        for b in names.get(line.between[1], (line.between[1],))
    }
    return with_fields(fleet, host=hosts, pair=tuple(pairs.values()))


def _assignments(words: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, _, value in (word.partition("=") for word in words)]
    if not pairs or not all(name and value for name, value in pairs):
        raise InvalidInput("it takes NAME=VALUE", next_step="write such as `nic all=25Gbit/s`")
    return pairs


def _settings(words: Sequence[str], known: set[str], needed: Sequence[str] = ()) -> dict[str, str]:
    given = dict(_assignments(words)) if words else {}
    for key in given:
        if key not in known:
            raise InvalidInput(f"it takes no {key!r}", next_step=_one_of(sorted(known)))
    for key in needed:
        if key not in given:
            raise InvalidInput(f"{key}= is missing", next_step=f"add {key}=...")
    return given


def _value(text: str, parse: Callable[[str], float], present: float) -> float:
    """A value as written, or a multiple of the present one."""
    times = _TIMES.fullmatch(text)
    return parse(text) if times is None else present * float(times.group(1))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise InvalidInput(f"{text!r} is no number", next_step="write such as 3.2, or x0.5")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise InvalidInput(f"{text!r} is no count", next_step="write 1 to 64")
    return int(text)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"
