"""The process that carries every packet of a lab: from one host's device to another's, when the link says.

One thread around select (poll and epoll round to milliseconds) and a heap of release times. Started by `lab`, which
speaks to it over the descriptor in its argument; it ends when that is closed.
"""

from __future__ import annotations

import ctypes
import gc
import heapq
import json
import os
import random
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hexmesh.errors import HexmeshError
from tools.netlab.control import MESSAGE_BYTES
from tools.netlab.lateness import Lateness
from tools.netlab.line import Line
from tools.netlab.links import Link
from tools.netlab.packets import destination, is_ipv4, opens_connection, wire_bytes
from tools.netlab.tun import TunDevice, enter_new_namespace
from tools.netlab.veth import VethDevice

_READS_PER_TURN = 32
"""Of one device before the others get their turn."""
_BEAT_S = 0.01
_PR_SET_TIMERSLACK = 29
_FIFO_PRIORITY = 10


@dataclass(slots=True, eq=False)
class Port:
    """A host's device, and the links that lead away from it."""

    name: str
    device: TunDevice | VethDevice
    is_up: bool = True
    is_dialable: bool = True
    has_offload: bool = True
    lines: dict[bytes, tuple[Port, Line]] = field(default_factory=dict)
    """By destination address."""


@dataclass(slots=True)
class Switch:
    """Owner of the devices, the packets under way and all counters."""

    ports: dict[str, Port]
    rng: random.Random
    control: socket.socket
    real_time: str
    """The scheduling class it got."""
    under_way: list[tuple[float, int, Port, Port, Line, bytes]] = field(default_factory=list)
    n_admitted: int = 0
    n_without_link: int = 0
    lateness: Lateness = field(default_factory=Lateness)
    """Of packets, against when their link would release them."""
    beat_lateness: Lateness = field(default_factory=Lateness)
    """Of a regular beat: how long a packet that came at that moment would have waited to be read."""
    next_beat_s: float = field(default_factory=time.monotonic)
    since_s: float = field(default_factory=time.monotonic)
    cpu_since_s: float = field(default_factory=time.process_time)

    def run(self) -> None:
        """Carry packets until the owner hangs up."""
        by_fd = {port.device.fd: port for port in self.ports.values()}
        readable = [*by_fd, self.control.fileno()]
        while True:
            wake_s = min(self.under_way[0][0], self.next_beat_s) if self.under_way else self.next_beat_s
            wait_s = max(wake_s - time.monotonic(), 0.0)
            for fd in select.select(readable, (), (), wait_s)[0]:
                if (port := by_fd.get(fd)) is not None:
                    self._take_in(port)
                elif not self._answer():
                    return
            self._release()
            self._beat()

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s >= self.next_beat_s:
            self.beat_lateness.add(now_s - self.next_beat_s)
            self.next_beat_s = now_s + _BEAT_S

    def _take_in(self, port: Port) -> None:
        for _ in range(_READS_PER_TURN):
            try:
                packet = port.device.read()
            except OSError:  # nothing more to read; or the device is down, as while the lab is set up
                return
            self._admit(port, packet)

    def _admit(self, port: Port, packet: bytes) -> None:
        found = port.lines.get(destination(packet)) if is_ipv4(packet) else None
        if found is None:
            self.n_without_link += 1
            return
        to, line = found
        if not (port.is_up and to.is_up):
            line.drop("down")
            return
        if not to.is_dialable and opens_connection(packet):
            line.drop("undialable")
            return
        n_bytes = wire_bytes(packet)
        release_s = line.admit(time.monotonic(), n_bytes, self.rng)
        if release_s is not None:
            self.n_admitted += 1  # ties leave in the order they came
            heapq.heappush(self.under_way, (release_s, self.n_admitted, port, to, line, packet))

    def _release(self) -> None:
        while self.under_way and self.under_way[0][0] <= (now_s := time.monotonic()):
            release_s, _, _, to, line, packet = heapq.heappop(self.under_way)
            try:
                to.device.write(packet)
            except OSError:
                line.drop("refused")
                continue
            self.lateness.add(now_s - release_s)
            line.n_packets += 1
            line.n_bytes += wire_bytes(packet)

    def _answer(self) -> bool:
        """Do what the owner asks; False when it hung up."""
        message = self.control.recv(MESSAGE_BYTES)
        if not message:
            return False
        try:
            answer = self._do(json.loads(message))
        except (KeyError, TypeError, ValueError, OSError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self.control.send(json.dumps(answer).encode())
        return True

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        for src, dst, link in request.get("links", ()):
            self._line(src, dst).change(Link(**link))
        for name, settings in request.get("hosts", {}).items():
            self.ports[name].is_up = settings["is_up"]
            self.ports[name].is_dialable = settings["is_dialable"]
        self._lose_what_was_cut()
        for port in self.ports.values():
            self._adjust_offload(port)
        answer = self._stats() if request.get("stats") else {}
        if request.get("reset"):
            self._reset()
        return answer

    def _lose_what_was_cut(self) -> None:
        """Drop the packets under way on links that are down now: also a cut that heals soon costs them."""
        arriving = []
        for packet in self.under_way:
            _, _, port, to, line, _ = packet
            if line.link.is_up and port.is_up and to.is_up:
                arriving.append(packet)
            else:
                line.drop("down")
        if len(arriving) < len(self.under_way):
            heapq.heapify(arriving)
            self.under_way = arriving

    def _line(self, src: str, dst: str) -> Line:
        return next(line for to, line in self.ports[src].lines.values() if to.name == dst)

    def _adjust_offload(self, port: Port) -> None:
        """Loss is of packets as the wire knows them, so a lossy link's sender may not send larger ones."""
        wants_offload = not any(line.link.loss for _, line in port.lines.values())
        if wants_offload != port.has_offload:
            port.device.set_offload(wants_offload)
            port.has_offload = wants_offload

    def _stats(self) -> dict[str, Any]:
        links = [
            {"src": port.name, "dst": to.name, "packets": line.n_packets, "bytes": line.n_bytes}
            | {"dropped": line.dropped}
            for port in self.ports.values()
            for to, line in port.lines.values()
        ]
        return {
            "links": links,
            "lateness_p50_s": self.lateness.percentile_s(0.5),
            "lateness_p99_s": self.lateness.percentile_s(0.99),
            "lateness_max_s": self.lateness.max_s,
            "beat_lateness_p99_s": self.beat_lateness.percentile_s(0.99),
            "packets": self.lateness.n_samples,
            "packets_without_link": self.n_without_link,
            "cpu_s": time.process_time() - self.cpu_since_s,
            "elapsed_s": time.monotonic() - self.since_s,
            "scheduling": self.real_time,
            "without_offload": [port.name for port in self.ports.values() if not port.has_offload],
        }

    def _reset(self) -> None:
        for port in self.ports.values():
            for _, line in port.lines.values():
                line.n_packets = line.n_bytes = 0
                line.dropped = {}
        self.lateness, self.beat_lateness = Lateness(), Lateness()
        self.n_without_link = 0
        self.since_s, self.cpu_since_s = time.monotonic(), time.process_time()


def open_switch(setup: dict[str, Any], control: socket.socket) -> Switch:
    """A switch as the owner's first message says: hosts with address and namespace, links, a seed."""
    if setup["backend"] == "veth":
        enter_new_namespace()
    kind = TunDevice if setup["backend"] == "tun" else VethDevice
    ports = {
        name: Port(name=name, device=kind.open(host["namespace"])) for name, host in setup["hosts"].items()
    }
    for src, dst, link in setup["links"]:
        address = socket.inet_aton(setup["hosts"][dst]["address"])
        ports[src].lines[address] = (ports[dst], Line(Link(**link)))
    switch = Switch(
        ports=ports, rng=random.Random(setup["seed"]), control=control, real_time=_ask_for_real_time()
    )
    for port in ports.values():
        switch._adjust_offload(port)
    return switch


def _ask_for_real_time() -> str:
    """Wake up when due and not 50 us later, ahead of busy programs where that is allowed."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    gc.disable()  # nothing here makes cycles, and a collection would delay packets
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_FIFO_PRIORITY))
    except OSError:
        return "other"
    return "fifo"


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    setup = json.loads(control.recv(MESSAGE_BYTES))
    try:
        switch = open_switch(setup, control)
    except (OSError, HexmeshError) as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    control.send(b"{}")
    switch.run()


if __name__ == "__main__":
    main()
