"""How long a prompt's hidden states take on a connection that has carried single tokens, by TCP's congestion control.

Two hosts of a lab, 40 ms of round trip and 1 Gbit/s; plain TCP, no daemon. A message counts from before its first byte
is handed to the kernel until its last one was read; both ends see one clock. What a delay and a rate would say stands
beside it. Run: `python -m tools.bench.bursts [--json]` (about a minute; needs root or a user namespace).
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.netlab.host import Host
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.user_namespace import become_able

LINK = Link(latency_s=0.020, rate_bytes_per_s=1.25e8)
TOKEN_BYTES, TOKEN_EVERY_S, N_TOKENS = 3072, 0.08, 12
"""Before each prompt."""
PROMPT_BYTES = (98_304, 294_912, 589_824)
N_PROMPTS = 5
IDLE_S, N_IDLE = 3.0, 4
_HEAD = struct.Struct("<dI")
_PATIENCE_S = 10.0


class Way:
    """A connection from one host to another, and how long each message took over it."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self._sender, self._receiver = sender, receiver
        self.took_s = list[tuple[int, float]]()

    def send(self, n_bytes: int) -> None:
        """One message; it arrives while the next one waits."""
        self._sender.sendall(_HEAD.pack(time.monotonic(), n_bytes) + bytes(n_bytes))

    def receive(self) -> None:
        """Until the sender is closed."""
        with self._receiver.makefile("rb") as stream:
            while head := stream.read(_HEAD.size):
                sent_s, n_bytes = _HEAD.unpack(head)
                stream.read(n_bytes)
                self.took_s.append((n_bytes, time.monotonic() - sent_s))

    def prompts(self, n_bytes: int) -> list[float]:
        """Seconds of so many prompts, each after some tokens."""
        for _ in range(N_PROMPTS):
            for _ in range(N_TOKENS):
                self.send(TOKEN_BYTES)
                time.sleep(TOKEN_EVERY_S)
            self.send(n_bytes)
            time.sleep(4 * TOKEN_EVERY_S)
        return self._lately(n_bytes, N_PROMPTS)

    def idle_prompts(self, n_bytes: int) -> list[float]:
        """The same after pauses."""
        for _ in range(N_IDLE):
            time.sleep(IDLE_S)
            self.send(n_bytes)
        time.sleep(IDLE_S)
        return self._lately(n_bytes, N_IDLE)

    def _lately(self, n_bytes: int, n: int) -> list[float]:
        return [seconds for size, seconds in self.took_s if size == n_bytes][-n:]


@contextmanager
def way(source: Host, target: Host, control: str) -> Iterator[Way]:
    """A new connection under that congestion control."""
    with target.listen() as listener:
        sender = source.connect(target.address, listener.getsockname()[1], timeout_s=_PATIENCE_S)
        receiver, _ = listener.accept()
    with sender, receiver:
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        receiver.settimeout(_PATIENCE_S)
        found = Way(sender, receiver)
        reader = Thread(target=found.receive)
        reader.start()
        yield found
        sender.shutdown(socket.SHUT_WR)
        reader.join()


def measure(report: Report, source: Host, target: Host, control: str) -> None:
    """A connection from its beginning on; messages grow, so that it gets used to more."""
    progress(control)
    with way(source, target, control) as found:
        for n_bytes in PROMPT_BYTES:
            _add(report, f"{control}, {n_bytes // 1024} KiB after tokens", found.prompts(n_bytes))
        first = PROMPT_BYTES[0]
        _add(report, f"{control}, {first // 1024} KiB after tokens, later", found.prompts(first))
        _add(
            report,
            f"{control}, {first // 1024} KiB after {IDLE_S:.0f} s of silence",
            found.idle_prompts(first),
        )


def _add(report: Report, name: str, seconds: list[float]) -> None:
    report.add(f"{name}: the first", 1e3 * seconds[0], "ms")
    report.add(f"{name}: the last", 1e3 * seconds[-1], "ms")


def main() -> int:
    arguments = bench_arguments(__doc__ or "").parse_args()
    become_able()
    report = Report(name="bursts", method="one connection each, 40 ms of round trip, 1 Gbit/s")
    for n_bytes in PROMPT_BYTES:
        expected_s = LINK.latency_s + n_bytes / (LINK.rate_bytes_per_s or 1.0)
        report.add(f"{n_bytes // 1024} KiB by delay and rate", 1e3 * expected_s, "ms")
    sites = {"a": ("a-1",), "b": ("b-1",)}
    with Lab(Topology(sites=sites, links=both_ways({("a", "b"): LINK}))) as lab:
        for control in ("bbr", "cubic"):
            try:
                measure(report, lab.hosts["a-1"], lab.hosts["b-1"], control)
            except FileNotFoundError:
                report.not_run.append(f"{control}: not in this kernel")
        lab.check_valid()
    print_report(report, "json" if arguments.json else "text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
