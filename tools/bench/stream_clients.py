"""Many streaming clients in one process that costs little: plain sockets and one epoll loop; nothing is parsed.

Run by `daemon.py` as a process of its own. Prints one JSON object: see `Outcome`.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from urllib.parse import urlsplit

_EVENT = b'data: {"id"'
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_TAIL_BYTES = 4096
_RECEIVE_BYTES = 1 << 18


@dataclass(slots=True)
class Outcome:
    """What the clients saw of one round."""

    n_tokens: int
    elapsed_s: float
    """From the first request to the last byte."""
    gaps_s: list[float]
    """Between two arrivals of one stream, while all streams ran."""
    all_gaps_s: list[float]
    """The same from each stream's first arrival on."""
    first_s: list[float]
    """Time to the first event of each stream."""
    n_arrivals: int
    n_events: int
    client_cpu_s: float
    refused_s: list[float] = field(default_factory=list)
    """Time to each refusal."""
    statuses: dict[str, int] = field(default_factory=dict)


class _Client:
    """One request and what came of it."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = request
        self.times_s: list[float] = []
        self.n_events = 0
        self.head = b""
        self.tail = b""
        self.is_done = False
        self.sent_s = 0.0
        self.refused_after_s: float | None = None

    def send(self) -> None:
        self.sent_s = time.perf_counter()
        self.socket.sendall(self.request)
        self.socket.setblocking(False)

    def receive(self) -> None:
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except ConnectionError:
            data = b""
        now_s = time.perf_counter()
        if not self.head:
            self.head = data[:64]
        n_events = data.count(_EVENT)
        if n_events:
            self.times_s.append(now_s)
            self.n_events += n_events
        self.tail = (self.tail + data)[-_TAIL_BYTES:]
        if not self.head.startswith(b"HTTP/1.1 200"):
            self.refused_after_s = now_s - self.sent_s
        is_whole = self.tail.endswith(b"0\r\n\r\n")
        self.is_done = not data or is_whole or self.refused_after_s is not None

    @property
    def n_tokens(self) -> int:
        found = _COMPLETION_TOKENS.findall(self.tail)
        return int(found[-1]) if found else 0


def run(url: str, path: str, body: dict[str, object], n_clients: int) -> Outcome:
    """One round: all clients at once."""
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    requests = [_request(path, body, index) for index in range(n_clients)]
    clients = []
    selector = selectors.DefaultSelector()
    cpu_before_s, started_s = _cpu_s(), time.perf_counter()
    for request in requests:
        client = _Client(address, request)
        clients.append(client)
        client.send()
        selector.register(client.socket, selectors.EVENT_READ, client)
    n_open = n_clients
    while n_open:
        for key, _ in selector.select():
            client = key.data
            client.receive()
            if client.is_done:
                selector.unregister(client.socket)
                client.socket.close()
                n_open -= 1
    elapsed_s, cpu_s = time.perf_counter() - started_s, _cpu_s() - cpu_before_s
    served = [client for client in clients if client.times_s]
    all_ran_s = max((client.times_s[0] for client in served), default=0.0)
    first_end_s = min((client.times_s[-1] for client in served), default=0.0)
    statuses: dict[str, int] = {}
    for client in clients:
        status = client.head[9:12].decode(errors="replace")
        statuses[status] = statuses.get(status, 0) + 1
    return Outcome(
        n_tokens=sum(client.n_tokens for client in served),
        elapsed_s=elapsed_s,
        gaps_s=[
            later - earlier
            for client in served
            for earlier, later in zip(client.times_s, client.times_s[1:], strict=False)
            if earlier >= all_ran_s and later <= first_end_s
        ],
        all_gaps_s=[
            later - earlier
            for client in served
            for earlier, later in zip(client.times_s, client.times_s[1:], strict=False)
        ],
        first_s=[client.times_s[0] - started_s for client in served],
        n_arrivals=sum(len(client.times_s) for client in served),
        n_events=sum(client.n_events for client in served),
        client_cpu_s=cpu_s,
        refused_s=[client.refused_after_s for client in clients if client.refused_after_s is not None],
        statuses=statuses,
    )


def _request(path: str, body: dict[str, object], index: int) -> bytes:
    data = json.dumps(body | {"seed": index}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("path")
    parser.add_argument("body", help="the request's JSON; each client adds a seed of its own")
    parser.add_argument("n_clients", type=int)
    arguments = parser.parse_args()
    outcome = run(arguments.url, arguments.path, json.loads(arguments.body), arguments.n_clients)
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
