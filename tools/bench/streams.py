"""Many streamed answers read by one light loop: what a bench can ask with, without disturbing what it measures.

Raw HTTP over sockets: while streams run, bytes are only kept and the tokens in them counted, some 15 microseconds a
token. What the answers say is decoded when somebody asks for it, after the measurement.

    crowd = Crowd()
    streams = [crowd.send(dial(daemon.url), greedy(prompt, 64)) for prompt in prompts]
    crowd.run()
"""

from __future__ import annotations

import json
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

RUN_TIMEOUT_S = 300.0
_CONNECT_TIMEOUT_S = 10.0
_LOOK_S = 0.05
"""How often `until` is asked at least."""
_RECEIVE_BYTES = 256 * 1024
_LINE_MARK = b'"token_id":'
"""In each line of `/generate` that brings a token, with null where it brings text alone."""
_EVENT_MARK = b'data: {"id"'
"""In each event of the OpenAI routes."""
_END = b"\n0\r\n\r\n"


@dataclass(slots=True)
class Stream:
    """One answer: when its tokens (on the OpenAI routes: its events) came, on the monotonic clock, and its bytes."""

    sent_s: float
    mark: bytes = _LINE_MARK
    times_s: list[float] = field(default_factory=list)
    is_over: bool = False
    raw: bytearray = field(default_factory=bytearray)
    _n_counted: int = 0

    @property
    def first_token_s(self) -> float:
        """From sending the request to its first token."""
        return self.times_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens; 0 where several came in one piece."""
        return [after - before for before, after in pairwise(self.times_s)]

    def take(self, data: bytes, now_s: float) -> None:
        """Count the tokens that are complete with `data`; no data is the end of the connection."""
        self.raw += data
        stop = self.raw.rfind(b"\n") + 1
        if stop > self._n_counted:
            lines = self.raw[self._n_counted : stop]
            self._n_counted = stop
            self.times_s += [now_s] * (lines.count(self.mark) - lines.count(self.mark + b"null"))
        self.is_over = not data or self.raw.endswith(_END)

    def events(self) -> list[dict[str, Any]]:
        """Every line of a `/generate` answer. Raises SystemExit with the daemon's words where it is not whole."""
        lines = [line for line in bytes(self.raw).splitlines() if line.startswith(b"{")]
        events: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if not events or "finish_reason" not in events[-1]:
            words = events[-1] if events else bytes(self.raw[:200])
            raise SystemExit(f"a stream broke after {len(self.times_s)} tokens: {words!r}")
        return events

    @property
    def token_ids(self) -> list[int]:
        """Raises SystemExit where the answer is not whole."""
        return [event["token_id"] for event in self.events() if event.get("token_id") is not None]


@dataclass(slots=True)
class Crowd:
    """Owner of the sockets and the loop; more may be sent whenever `run` has returned."""

    streams: list[Stream] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def send(self, connection: socket.socket, body: dict[str, Any], path: str = "/generate") -> Stream:
        """Ask over a fresh connection, which is closed when the answer is over."""
        connection.settimeout(_CONNECT_TIMEOUT_S)
        request = _request(path, body)
        mark = _LINE_MARK if path == "/generate" else _EVENT_MARK
        stream = Stream(sent_s=time.monotonic(), mark=mark)
        connection.sendall(request)
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, stream)
        self.streams.append(stream)
        return stream

    def run(self, until: Callable[[], bool] = lambda: False, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Read until every answer is over, or `until` says so, which is asked 20 times a second or more.

        Raises SystemExit where that takes longer than `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._selector.get_map() and not until():
            ready = self._selector.select(timeout=_LOOK_S)
            if time.monotonic() > deadline_s:
                raise SystemExit(
                    f"{len(self._selector.get_map())} streams did not end within {timeout_s:.0f} s"
                )
            for key, _ in ready:
                self._read(key)

    def abandon(self) -> None:
        """Hang up on every stream that is not over: the daemon cancels it."""
        for key in list(self._selector.get_map().values()):
            self._hang_up(key)

    def _read(self, key: selectors.SelectorKey) -> None:
        connection, stream = key.fileobj, key.data
        assert isinstance(connection, socket.socket)
        try:
            data = connection.recv(_RECEIVE_BYTES)
        except ConnectionError:
            data = b""
        stream.take(data, time.monotonic())
        if stream.is_over:
            self._hang_up(key)

    def _hang_up(self, key: selectors.SelectorKey) -> None:
        assert isinstance(key.fileobj, socket.socket)
        self._selector.unregister(key.fileobj)
        key.fileobj.close()


def dial(url: str) -> socket.socket:
    """A connection to a daemon at `url`."""
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=_CONNECT_TIMEOUT_S)


def greedy(prompt: str | list[int], max_tokens: int) -> dict[str, Any]:
    """The body of a request that streams its likeliest tokens, to the last one."""
    return {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


def ask_at_once(
    connect: Callable[[], socket.socket], prompts: Iterable[list[int]], max_tokens: int
) -> tuple[list[Stream], float]:
    """One stream for each prompt, sent together, to their ends; and the seconds from first request to last token."""
    crowd = Crowd()
    connections = [(connect(), prompt) for prompt in prompts]
    streams = [crowd.send(connection, greedy(prompt, max_tokens)) for connection, prompt in connections]
    crowd.run()
    for stream in streams:
        if len(stream.times_s) != max_tokens:
            raise SystemExit(
                f"{len(stream.times_s)} of {max_tokens} tokens came: {bytes(stream.raw[-300:])!r}"
            )
    return streams, max(stream.times_s[-1] for stream in streams) - streams[0].sent_s


def percentile(values: Iterable[float], percent: int) -> float:
    """The value that so many percent of `values` do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data
