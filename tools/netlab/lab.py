"""A lab: namespaces for the hosts, one switch process between them, and the verbs that change the network.

    with Lab(Topology(sites={"tokyo": ("t1", "t2"), "osaka": ("o1",)}, links=both_ways({...}))) as lab:
        lab.hosts["t1"].popen(["ping", lab.hosts["o1"].address])
        lab.isolate("osaka")

Where a verb takes `a` and `b`, each is a host or a site.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from hexmesh.errors import Lost
from tools.netlab.control import Control, control_pair
from tools.netlab.host import Host
from tools.netlab.links import Link, Topology
from tools.netlab.namespaces import (
    configure_device,
    make_namespace,
    new_prefix,
    remove_namespace,
    remove_orphans,
    why_unavailable,
)
from tools.netlab.tun import why_no_tun

Backend = Literal["tun", "veth"]

MAX_P99_LATE_S = 0.001
_SUBNET = "10.88"
_SUBNET_BITS = 16
_SOURCE = Path(__file__).resolve().parents[2]
_STOP_TIMEOUT_S = 5.0


@dataclass(slots=True)
class HostState:
    """What the switch is told about a host."""

    is_up: bool = True
    is_dialable: bool = True


@dataclass(slots=True)
class Lab:
    """Owner of the namespaces, the switch and what is wanted of it. Entered = packets flow."""

    topology: Topology
    seed: int = 0
    """Of jitter and loss."""
    backend: Backend = field(default_factory=lambda: "veth" if why_no_tun() else "tun")
    """TUN carries more (5 Gbit/s in all); veth with packet sockets works without /dev/net/tun."""
    hosts: dict[str, Host] = field(init=False, default_factory=dict)
    links: dict[tuple[str, str], Link] = field(init=False, default_factory=dict)
    """As they are now, by source and destination host."""
    states: dict[str, HostState] = field(init=False, default_factory=dict)
    _control: Control | None = field(init=False, default=None)
    _switch: subprocess.Popen[bytes] | None = field(init=False, default=None)
    _namespaces: list[str] = field(init=False, default_factory=list)

    def __enter__(self) -> Self:
        """Raises NotReady, with what to do, where a lab cannot be made."""
        if (blocker := why_unavailable()) is not None:
            raise blocker
        remove_orphans()
        atexit.register(self.close)
        try:
            self._make_hosts()
            self.links = {pair: self.topology.link(*pair) for pair in self.topology.pairs()}
            self._start_switch()
            for host in self.hosts.values():
                configure_device(host.namespace.name, host.address, _SUBNET_BITS)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs on the hosts, end the switch, remove the namespaces. Safe to call again."""
        for host in self.hosts.values():
            host.kill_all()
        if self._control is not None:
            self._control.close()
        if self._switch is not None:
            try:
                self._switch.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.wait()
        while self._namespaces:
            remove_namespace(self._namespaces[-1])
            self._namespaces.pop()
        atexit.unregister(self.close)

    @property
    def switch_pid(self) -> int:
        """The process between the hosts."""
        assert self._switch is not None, "the lab has not been entered"
        return self._switch.pid

    # What can be changed while programs run.

    def set_link(self, a: str, b: str, link: Link, *, one_way: bool = False) -> None:
        """Make the links from `a` to `b`, and back unless `one_way`, behave as `link`."""
        self._change({pair: link for pair in self._between(a, b, one_way=one_way)})

    def cut(self, a: str, b: str, *, one_way: bool = False) -> None:
        """Let nothing pass from `a` to `b`, nor back unless `one_way`; what is under way is lost too."""
        pairs = self._between(a, b, one_way=one_way)
        self._change({pair: replace(self.links[pair], is_up=False) for pair in pairs})

    def partition(self, *groups: Sequence[str]) -> None:
        """Cut every link between hosts or sites of different groups."""
        pairs = [
            pair
            for one, other in combinations(groups, 2)
            for a in one
            for b in other
            for pair in self._between(a, b, one_way=False)
        ]
        self._change({pair: replace(self.links[pair], is_up=False) for pair in pairs})

    def isolate(self, name: str) -> None:
        """Take a host, or every host of a site, off the network altogether, as if the cable was pulled."""
        self._set_hosts(name, is_up=False)

    def set_dialable(self, name: str, is_dialable: bool) -> None:
        """Drop or admit new TCP connections to a host or site, as a NAT does; its own, and present ones, work."""
        self._set_hosts(name, is_dialable=is_dialable)

    def heal(self, a: str | None = None, b: str | None = None) -> None:
        """Undo cuts: all of them and isolation, those of `a` and its isolation, or those between `a` and `b`."""
        pairs = list(self.links) if b is None else self._between(a or "", b, one_way=False)
        if a is not None and b is None:
            pairs = [pair for pair in pairs if set(pair) & set(self.topology.hosts_of(a))]
        if b is None:
            self._set_hosts(a, is_up=True)
        self._change({pair: replace(self.links[pair], is_up=True) for pair in pairs})

    def stats(self, *, reset: bool = False) -> dict[str, Any]:
        """Counters per link, lateness percentiles, CPU time, scheduling class; since the last reset."""
        answer: dict[str, Any] = self._ask({"stats": True, "reset": reset})
        return answer

    def check_valid(self) -> None:
        """Raises Lost when the switch itself was too late for what was measured through it to count."""
        stats = self.stats()
        late_s = max(stats["lateness_p99_s"], stats["beat_lateness_p99_s"])
        if late_s > MAX_P99_LATE_S:
            raise Lost(
                f"the lab was late by {1000 * late_s:.2f} ms (p99, at most "
                f"{1000 * MAX_P99_LATE_S:g} ms may be): this run does not count",
                code="lab_too_late",
                next_step=f"use less traffic or a freer machine (scheduling class: {stats['scheduling']})",
            )

    def _between(self, a: str, b: str, *, one_way: bool) -> list[tuple[str, str]]:
        sources, destinations = self.topology.hosts_of(a), self.topology.hosts_of(b)
        pairs = [(src, dst) for src in sources for dst in destinations if src != dst]
        return pairs if one_way else pairs + [(dst, src) for src, dst in pairs]

    def _change(self, links: dict[tuple[str, str], Link]) -> None:
        self._ask({"links": _links_as_json(links)})
        self.links |= links

    def _set_hosts(
        self, name: str | None, *, is_up: bool | None = None, is_dialable: bool | None = None
    ) -> None:
        names = self.topology.hosts_of(name) if name is not None else tuple(self.states)
        for host in names:
            if is_up is not None:
                self.states[host].is_up = is_up
            if is_dialable is not None:
                self.states[host].is_dialable = is_dialable
        self._ask({"hosts": {host: asdict(self.states[host]) for host in names}})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._control is not None, "the lab has not been entered"
        return self._control.ask(request)

    def _make_hosts(self) -> None:
        prefix = new_prefix()
        for name, site, address in self._addresses():
            self._namespaces.append(prefix + name)
            namespace = make_namespace(prefix + name)
            self.hosts[name] = Host(name=name, site=site, address=address, namespace=namespace)
            self.states[name] = HostState()

    def _addresses(self) -> Iterator[tuple[str, str, str]]:
        for site_index, (site, hosts) in enumerate(self.topology.sites.items()):
            for index, name in enumerate(hosts):
                yield name, site, f"{_SUBNET}.{site_index}.{index + 1}"

    def _start_switch(self) -> None:
        self._control, theirs = control_pair()
        with contextlib.closing(theirs):
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "tools.netlab.switch", str(theirs.fileno())],
                cwd=_SOURCE,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is the owner's
            )
        hosts = {
            host.name: {"address": host.address, "namespace": str(host.namespace)}
            for host in self.hosts.values()
        }
        self._ask(
            {"hosts": hosts, "links": _links_as_json(self.links)}
            | {"seed": self.seed, "backend": self.backend}
        )


def _links_as_json(links: dict[tuple[str, str], Link]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(src, dst, asdict(link)) for (src, dst), link in links.items()]
