"""Measures this node's links: pings all the time, and probes of the sustained rate, one at a time per host.

A probe needs both ends' consent: a host that takes part in one answers "busy, later" to all others. When two
hosts ask each other at once, the one with the smaller id goes first. A first quick probe runs as soon as a
peer connects, so that a plan need not wait; a full one follows when things have settled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn, assert_never

from daemon.courier import Courier, Payload
from hexmesh.cluster import Link
from hexmesh.errors import Lost, TimedOut
from hexmesh.ids import short
from hexmesh.membership.probing import (
    FULL_PROBE,
    QUICK_PROBE,
    ProbeBudget,
    RateEstimate,
    RateProbe,
    RttWindow,
)
from hexmesh.membership.records import LinkFacts
from hexmesh.units import show_bit_rate, show_duration
from hexmesh.wire.facts import (
    Ping,
    Pong,
    ProbeAnswer,
    ProbeAsk,
    ProbeChunk,
    ProbeEnd,
    ProbeMessage,
    ProbeReport,
)

log = logging.getLogger("hexmesh.links")

BURST_PINGS = 16
BURST_SPACING_S = 0.005
PING_PERIOD_S = 2.0
PONG_PATIENCE_S = 2.0
FULL_AFTER_S = 10.0
FULL_PERIOD_S = 300.0
ANSWER_PATIENCE_S = 2.0
WINDOW_PATIENCE_S = 5.0
RETRY_S = 0.03
FULL_QUEUE_PAUSE_S = 0.002
TURN_LEASE_S = 3.0
"""A granted turn ends when no chunk came for this long: the asker died."""
MAX_TURN_S, REST_S = 30.0, 10.0
"""A peer may probe this host for so long at a stretch, however often it asks; then others have a while."""
KEEP_S = 60.0
"""A link's figures stay for this long after its connection broke."""
CHUNK_BYTES = 256 * 1024
MOVED, MOVED_S = 0.25, 0.001
"""A round-trip time that moved by this share and this much since it was last told is news."""

_FILLER = memoryview(os.urandom(CHUNK_BYTES))


@dataclass(slots=True)
class _Path:
    """What is known of the way to one peer. Owned by LinkMonitor."""

    node: str
    n_connections: int = 0
    is_connected: bool = False
    is_new: bool = True
    """Nothing was measured on this connection yet; the first sample replaces those before the break."""
    is_warm: bool = False
    """The first ping of a connection is no sample: a channel is opened by its first message."""
    broken_at_s: float = 0.0
    rtt: RttWindow = field(default_factory=RttWindow)
    told_rtt_s: float = 0.0
    rate: RateEstimate | None = None
    measured_at_unix_s: float = 0.0
    sent_at_s: dict[int, float] = field(default_factory=dict)
    all_answered: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Asking:
    """This host waits for a peer's answer, or sends to it."""

    node: str
    probe: int
    answer: asyncio.Future[ProbeAnswer]
    is_sending: bool = False
    window: int = -1
    report: asyncio.Future[int] | None = None


@dataclass(slots=True)
class _Granted:
    """This host receives a peer's probe until `until_s`."""

    node: str
    probe: int
    until_s: float
    end_s: float
    """When the turn is over, whatever still comes: nobody keeps this host from measuring for long."""
    window: int = 0
    n_bytes: int = 0


class LinkMonitor:
    """Owns what this node has measured of its links, and this host's turn to probe.

    The peer network calls `connected`, `disconnected` and `receive`; `on_change` is called when there is
    something new to tell the mesh. `run` does the measuring.
    """

    def __init__(
        self,
        courier: Courier,
        *,
        rng: random.Random,
        on_change: Callable[[], None] = lambda: None,
        now_unix_s: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] | None = None,
        full_after_s: float = FULL_AFTER_S,
        full_period_s: float = FULL_PERIOD_S,
    ) -> None:
        self._courier = courier
        self._rng = rng
        self._on_change = on_change
        self._now_unix_s = now_unix_s
        self._stopwatch = stopwatch or (lambda: asyncio.get_running_loop().time())
        self._full_after_s = full_after_s
        self._full_period_s = full_period_s
        self._paths: dict[str, _Path] = {}
        self._watchers: dict[tuple[str, int], asyncio.Task[NoReturn]] = {}
        self._peers_changed = asyncio.Event()
        self._my_turn = asyncio.Lock()
        self._turn: _Asking | _Granted | None = None
        self._allowances_s: dict[str, float] = {}
        """Until when each peer may be granted turns. Of members alone, so it stays small."""
        self._n_sent = 0

    def connected(self, node: str) -> None:
        """A connection to the peer is up; after a break its figures are measured anew."""
        path = self._paths.setdefault(node, _Path(node))
        path.is_connected = path.is_new = True
        path.is_warm = False
        path.n_connections += 1
        self._peers_changed.set()

    def measure_anew(self) -> None:
        """What was measured so far was disturbed (this host was busy): measure every link again."""
        for path in self._paths.values():
            if path.is_connected:
                self.connected(path.node)

    def disconnected(self, node: str) -> None:
        """The connection is down. The figures stay for a minute, for it may come back at once."""
        path = self._paths.get(node)
        if path is None or not path.is_connected:
            return
        path.is_connected = False
        path.broken_at_s = asyncio.get_running_loop().time()
        if isinstance(self._turn, _Granted) and self._turn.node == node:
            self._turn = None
        self._peers_changed.set()

    def forget(self, node: str) -> None:
        """The peer was removed from the mesh."""
        self.disconnected(node)
        self._paths.pop(node, None)

    def links(self) -> tuple[LinkFacts, ...]:
        """Every link that has both a round-trip time and a rate, by destination."""
        now_s = asyncio.get_running_loop().time()
        return tuple(
            self._as_facts(path, path.rate)
            for _, path in sorted(self._paths.items())
            if path.rate is not None and len(path.rtt) and _is_usable(path, now_s)
        )

    def rtt_s(self, node: str) -> float | None:
        """The median round-trip time to a peer, as soon as one ping was answered."""
        path = self._paths.get(node)
        return path.rtt.p50_s if path is not None and len(path.rtt) else None

    def observed(self, node: str, n_bytes: int, seconds: float) -> None:
        """Real traffic moved so much in that time: a link is at least as fast as what it carried."""
        path = self._paths.get(node)
        if path is None or seconds <= 0:
            return
        rate = n_bytes / seconds
        if path.rate is None or rate > path.rate.bytes_per_s:
            path.rate = RateEstimate(bytes_per_s=rate, lower_bound=True)
            path.measured_at_unix_s = self._now_unix_s()

    def receive(self, src: str, message: ProbeMessage, payload: Payload = b"") -> None:
        """A message of the probe channel came from `src`."""
        match message:
            case Ping():
                self._send(src, Pong(n=message.n))
            case Pong():
                self._on_pong(src, message)
            case ProbeAsk():
                self._on_ask(src, message)
            case ProbeAnswer():
                self._on_answer(src, message)
            case ProbeChunk():
                self._on_chunk(src, message, len(payload))
            case ProbeReport():
                self._on_report(src, message)
            case ProbeEnd():
                if isinstance(self._turn, _Granted) and self._is_of(self._turn, src, message.probe):
                    self._turn = None
            case _:
                assert_never(message)

    async def run(self) -> NoReturn:
        """Measure every connected peer, for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._peers_changed.clear()
                await self._replace_watchers(group)
                await self._peers_changed.wait()
        raise AssertionError("unreachable")

    async def _replace_watchers(self, group: asyncio.TaskGroup) -> None:
        """One task for each connection, so that a new connection is measured anew."""
        wanted = {(path.node, path.n_connections): path for path in self._paths.values() if path.is_connected}
        ended = {key: task for key, task in self._watchers.items() if key not in wanted}
        for key, task in ended.items():
            task.cancel()
            del self._watchers[key]
        if ended:
            await asyncio.wait(ended.values())
        for key in wanted.keys() - self._watchers.keys():
            self._watchers[key] = group.create_task(self._watch(wanted[key]), name=f"link-{short(key[0])}")

    async def _watch(self, path: _Path) -> NoReturn:
        loop = asyncio.get_running_loop()
        while not await self._ping(path, 1):
            pass  # a ping waits for its answer, so this does not spin
        path.is_warm = True
        while path.is_new:
            await self._ping(path, BURST_PINGS)
        await self._probe(path, QUICK_PROBE)
        full_at_s = loop.time() + self._full_after_s * self._jitter()
        while True:
            await asyncio.sleep(PING_PERIOD_S)
            if self._is_free():
                await self._ping(path, 1)
                self._tell_if_moved(path)
            if loop.time() >= full_at_s:
                is_done = await self._probe(path, FULL_PROBE)
                wait_s = self._full_period_s if is_done else self._full_after_s
                full_at_s = loop.time() + wait_s * self._jitter()

    def _jitter(self) -> float:
        return self._rng.uniform(0.8, 1.2)

    # Round trips

    async def _ping(self, path: _Path, count: int) -> bool:
        """Send pings and wait until all are answered, or give up and say False."""
        path.sent_at_s.clear()
        path.all_answered.clear()
        for i in range(count):
            if i:
                await asyncio.sleep(BURST_SPACING_S)
            self._n_sent += 1
            path.sent_at_s[self._n_sent] = self._stopwatch()
            self._send(path.node, Ping(n=self._n_sent))
        with suppress(TimeoutError):
            async with asyncio.timeout(PONG_PATIENCE_S):
                while path.sent_at_s:
                    await path.all_answered.wait()
                    path.all_answered.clear()
        return not path.sent_at_s

    def _on_pong(self, src: str, pong: Pong) -> None:
        path = self._paths.get(src)
        sent_at_s = path.sent_at_s.pop(pong.n, None) if path is not None else None
        if path is None or sent_at_s is None:
            return
        if path.is_warm:
            self._add_rtt(path, self._stopwatch() - sent_at_s)
        if not path.sent_at_s:
            path.all_answered.set()

    def _add_rtt(self, path: _Path, rtt_s: float) -> None:
        if path.is_new:
            path.rtt.clear()
            path.is_new = False
        path.rtt.add(rtt_s)

    def _tell_if_moved(self, path: _Path) -> None:
        moved_s = abs(path.rtt.p50_s - path.told_rtt_s)
        if path.rate is not None and moved_s > max(MOVED_S, MOVED * path.told_rtt_s):
            self._tell(path)

    def _tell(self, path: _Path) -> None:
        path.told_rtt_s = path.rtt.p50_s
        self._on_change()

    # The asking side of a rate probe

    async def _probe(self, path: _Path, budget: ProbeBudget) -> bool:
        """Measure the rate to a peer as soon as both hosts are free; False when nothing came of it."""
        try:
            async with self._my_turn:
                asking = await self._win_turn(path.node)
                try:
                    estimate = await self._send_windows(asking, RateProbe(budget, path.rtt.p50_s))
                finally:
                    self._end_turn(asking)
        except Lost as error:
            log.info("link not measured peer=%s reason=%s", short(path.node), error.message)
            return False
        if estimate is None:
            return False
        path.rate = estimate
        path.measured_at_unix_s = self._now_unix_s()
        self._log_measured(path, estimate)
        self._tell(path)
        return True

    async def _win_turn(self, node: str) -> _Asking:
        """Ask until this host and the peer are both free. Raises TimedOut when the peer does not answer."""
        while True:
            await self._until_free()
            self._n_sent += 1
            asking = _Asking(node, self._n_sent, asyncio.get_running_loop().create_future())
            self._turn = asking
            self._send(node, ProbeAsk(probe=asking.probe))
            try:
                async with asyncio.timeout(ANSWER_PATIENCE_S):
                    answer = await asking.answer
                asking.is_sending = answer.is_granted
            except TimeoutError:
                raise TimedOut(f"no answer within {ANSWER_PATIENCE_S:.0f} s") from None
            finally:
                if not asking.is_sending:
                    self._end_turn(asking)
            if asking.is_sending:
                return asking
            await asyncio.sleep(
                min(max(answer.retry_after_s, RETRY_S), ANSWER_PATIENCE_S) * self._rng.uniform(0.5, 2.0)
            )

    async def _until_free(self) -> None:
        while True:
            if self._is_free():
                return
            await asyncio.sleep(RETRY_S * self._rng.uniform(0.1, 1.0))

    def _is_free(self) -> bool:
        """Whether this host takes part in no probe; a grant that its holder let lapse is over."""
        if isinstance(self._turn, _Granted) and self._turn.until_s < asyncio.get_running_loop().time():
            self._turn = None
        return self._turn is None

    def _end_turn(self, asking: _Asking) -> None:
        if self._turn is asking:
            self._turn = None
        self._send(asking.node, ProbeEnd(probe=asking.probe))

    async def _send_windows(self, asking: _Asking, probe: RateProbe) -> RateEstimate | None:
        loop = asyncio.get_running_loop()
        while (n_bytes := probe.next_window_bytes()) is not None:
            asking.window += 1
            asking.report = loop.create_future()
            started_s = self._stopwatch()
            try:
                async with asyncio.timeout(WINDOW_PATIENCE_S):
                    await self._send_window(asking, n_bytes)
                    n_arrived = await asking.report
            except TimeoutError:
                return probe.estimate()
            if n_arrived != n_bytes:
                return probe.estimate()
            probe.record(n_bytes, self._stopwatch() - started_s)
        return probe.estimate()

    async def _send_window(self, asking: _Asking, n_bytes: int) -> None:
        while n_bytes > 0:
            n_now = min(n_bytes, CHUNK_BYTES)
            n_bytes -= n_now
            chunk = ProbeChunk(probe=asking.probe, window=asking.window, is_last=n_bytes == 0)
            await self._send_chunk(asking.node, chunk, _FILLER[:n_now])

    async def _send_chunk(self, node: str, chunk: ProbeChunk, filler: memoryview) -> None:
        """Queue a chunk. A full queue has no news of room; the window's deadline ends the wait."""
        while True:
            if self._send(node, chunk, filler):
                return
            await asyncio.sleep(FULL_QUEUE_PAUSE_S)

    def _on_answer(self, src: str, answer: ProbeAnswer) -> None:
        turn = self._turn
        if isinstance(turn, _Asking) and self._is_of(turn, src, answer.probe) and not turn.answer.done():
            turn.answer.set_result(answer)
        elif answer.is_granted:
            self._send(src, ProbeEnd(probe=answer.probe))

    def _on_report(self, src: str, report: ProbeReport) -> None:
        turn = self._turn
        if not isinstance(turn, _Asking) or not self._is_of(turn, src, report.probe):
            return
        if turn.window == report.window and turn.report is not None and not turn.report.done():
            turn.report.set_result(report.n_bytes)

    # The granting side

    def _on_ask(self, src: str, ask: ProbeAsk) -> None:
        now_s = asyncio.get_running_loop().time()
        turn = self._turn
        if isinstance(turn, _Granted) and (turn.node == src or self._is_free()):
            turn = None
        if isinstance(turn, _Asking) and self._gives_way(turn, src):
            turn.answer.set_result(ProbeAnswer(probe=turn.probe, is_granted=False, retry_after_s=RETRY_S))
            turn = None
        end_s = self._end_of_allowance_s(src, now_s)
        is_granted = turn is None and now_s < end_s
        if turn is None:
            until_s = min(end_s, now_s + TURN_LEASE_S)
            self._turn = _Granted(src, ask.probe, until_s, end_s) if is_granted else None
        self._send(src, ProbeAnswer(probe=ask.probe, is_granted=is_granted, retry_after_s=RETRY_S))

    def _end_of_allowance_s(self, node: str, now_s: float) -> float:
        end_s = self._allowances_s.get(node)
        if end_s is None or now_s >= end_s + REST_S:
            end_s = self._allowances_s[node] = now_s + MAX_TURN_S
        return end_s

    def _gives_way(self, asking: _Asking, src: str) -> bool:
        """Two hosts that ask each other would both be busy: the smaller id goes first."""
        return asking.node == src and not asking.answer.done() and src < self._courier.node_id

    def _on_chunk(self, src: str, chunk: ProbeChunk, n_bytes: int) -> None:
        turn = self._turn
        if not isinstance(turn, _Granted) or not self._is_of(turn, src, chunk.probe):
            return
        now_s = asyncio.get_running_loop().time()
        if now_s >= turn.end_s:
            return
        if turn.window != chunk.window:
            turn.window, turn.n_bytes = chunk.window, 0
        turn.n_bytes += n_bytes
        turn.until_s = min(turn.end_s, now_s + TURN_LEASE_S)
        if chunk.is_last:
            self._send(src, ProbeReport(probe=chunk.probe, window=chunk.window, n_bytes=turn.n_bytes))

    @staticmethod
    def _is_of(turn: _Asking | _Granted, node: str, probe: int) -> bool:
        return turn.node == node and turn.probe == probe

    def _send(self, node: str, message: ProbeMessage, payload: Payload = b"") -> bool:
        return self._courier.send(node, message, payload, channel="probe")

    def _as_facts(self, path: _Path, rate: RateEstimate) -> LinkFacts:
        link = Link(
            src=self._courier.node_id,
            dst=path.node,
            rtt_p50_s=path.rtt.p50_s,
            rtt_p95_s=path.rtt.p95_s,
            bytes_per_s=rate.bytes_per_s,
            lower_bound=rate.lower_bound,
        )
        return LinkFacts(link=link, measured_at_unix_s=path.measured_at_unix_s)

    def _log_measured(self, path: _Path, rate: RateEstimate) -> None:
        log.info(
            "link measured peer=%s rtt=%s p95=%s rate=%s%s",
            short(path.node),
            show_duration(path.rtt.p50_s),
            show_duration(path.rtt.p95_s),
            ">=" if rate.lower_bound else "",
            show_bit_rate(rate.bytes_per_s),
        )


def _is_usable(path: _Path, now_s: float) -> bool:
    return path.is_connected or now_s - path.broken_at_s < KEEP_S
