"""Measures this node's links: pings all the time, and now and then a probe of the sustained rate.

A first quick probe runs as soon as a peer connects, so that a plan need not wait; a full one follows when things
have settled, and again after ever longer times while it finds the same. See `prober` for how probes are made.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NoReturn, assert_never

from daemon.courier import Courier, Payload
from daemon.peering.prober import Prober
from hexmesh.cluster import Link
from hexmesh.errors import Busy, Lost
from hexmesh.ids import short
from hexmesh.membership.probing import (
    FULL_PROBE,
    HURRIED_PROBE,
    QUICK_PROBE,
    ProbeBudget,
    RateEstimate,
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

BURST_PINGS = 8
BURST_SPACING_S = 0.005
PING_PERIOD_S = 0.5
"""So that within some seconds of calm the newest round trips outvote those of a host that was busy."""
PONG_PATIENCE_S = 2.0
FULL_AFTER_S = 10.0
FULL_PERIOD_S = 300.0
MAX_FULL_PERIOD_S = 3600.0
SAME = 0.2
"""A rate within this share of the last one is the same: the next full probe may wait twice as long."""
RETRY_S = 2.0
FIRST_PATIENCE_S = 10.0
"""A link of which nothing is known waits so long for a pause in the data, then is probed beside it."""
KEEP_S = 60.0
"""A link's figures stay for this long after its connection broke."""
MOVED, MOVED_S = 0.1, 0.0005
"""A round-trip time that moved by this share and this much since it was last told is news."""

ProbeResult = Literal["measured", "put off", "lost"]


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
    is_relayed: bool = False
    rtt: RttWindow = field(default_factory=RttWindow)
    told_rtt_s: float = 0.0
    rate: RateEstimate | None = None
    measured_at_unix_s: float = 0.0
    sent_at_s: dict[int, float] = field(default_factory=dict)
    all_answered: asyncio.Event = field(default_factory=asyncio.Event)


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
        queued_bytes: Callable[[str], int],
        on_change: Callable[[], None] = lambda: None,
        now_unix_s: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] | None = None,
        full_after_s: float = FULL_AFTER_S,
    ) -> None:
        self._courier = courier
        self._rng = rng
        self._on_change = on_change
        self._now_unix_s = now_unix_s
        self._stopwatch = stopwatch or (lambda: asyncio.get_running_loop().time())
        self._full_after_s = full_after_s
        self._paths: dict[str, _Path] = {}
        self._watchers: dict[tuple[str, int], asyncio.Task[NoReturn]] = {}
        self._peers_changed = asyncio.Event()
        self._prober = Prober(courier, queued_bytes=queued_bytes, rng=rng, stopwatch=self._stopwatch)
        self._n_sent = 0

    def connected(self, node: str) -> None:
        """A connection to the peer is up; after a break its figures are measured anew."""
        path = self._paths.setdefault(node, _Path(node))
        path.is_connected = path.is_new = True
        path.is_warm = False
        path.n_connections += 1
        self._peers_changed.set()

    def path_changed(self, node: str, *, is_relayed: bool) -> None:
        """The peer is reached over a relay now, or no longer: what was measured says nothing of that path."""
        path = self._paths.setdefault(node, _Path(node))
        path.is_relayed = is_relayed
        path.rate = None
        if path.is_connected:
            self.connected(node)

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
        self._prober.disconnected(node)
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

    def data_flowed(self) -> None:
        """A request's message was sent or came in just now: probes keep out of its way."""
        self._prober.data_flowed()

    def receive(self, src: str, message: ProbeMessage, payload: Payload = b"") -> None:
        """A message of the probe channel came from `src`."""
        match message:
            case Ping():
                self._send(src, Pong(n=message.n))
            case Pong():
                self._on_pong(src, message)
            case ProbeAsk() | ProbeAnswer() | ProbeChunk() | ProbeReport() | ProbeEnd():
                self._prober.receive(src, message, payload)
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
        while not await self._ping(path, 1):
            pass  # a ping waits for its answer, so this does not spin
        path.is_warm = True
        while path.is_new:
            await self._ping(path, BURST_PINGS)
        await self._first_rate(path)
        await self._ping_for(path, self._full_after_s)
        period_s = FULL_PERIOD_S
        while True:
            before = path.rate
            await self._full_rate(path)
            period_s = min(2 * period_s, MAX_FULL_PERIOD_S) if _is_same(before, path.rate) else FULL_PERIOD_S
            await self._ping_for(path, period_s)

    async def _ping_for(self, path: _Path, duration_s: float) -> None:
        """Ping now and then for about so long."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + duration_s * self._rng.uniform(0.8, 1.2)
        while loop.time() < end_s:
            await asyncio.sleep(PING_PERIOD_S)
            if self._prober.is_free:
                await self._ping(path, 1)
                self._tell_if_moved(path)

    async def _first_rate(self, path: _Path) -> None:
        """A quick figure for the first plan, beside requests when they leave no pause."""
        loop = asyncio.get_running_loop()
        hurry_at_s = loop.time() + FIRST_PATIENCE_S
        while True:
            is_urgent = path.rate is None and loop.time() >= hurry_at_s
            budget = HURRIED_PROBE if is_urgent else QUICK_PROBE
            result = await self._probe(path, budget, is_urgent=is_urgent)
            if result == "measured":
                return
            await self._ping_for(path, RETRY_S if result == "put off" else self._full_after_s)

    async def _full_rate(self, path: _Path) -> None:
        while await self._probe(path, FULL_PROBE, is_urgent=False) != "measured":
            await self._ping_for(path, self._full_after_s)

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

    # Rates

    async def _probe(self, path: _Path, budget: ProbeBudget, *, is_urgent: bool) -> ProbeResult:
        """Measure the rate to a peer as soon as both hosts are free, and tell it."""
        try:
            probed = await self._prober.probe(path.node, budget, path.rtt.p50_s, is_urgent=is_urgent)
        except Busy as error:
            log.debug("link not measured now peer=%s reason=%s", short(path.node), error.message)
            return "put off"
        except Lost as error:
            log.info("link not measured peer=%s reason=%s", short(path.node), error.message)
            return "lost"
        estimate = probed.estimate
        if estimate is None:
            return "put off" if probed.is_cut_short else "lost"
        if self._is_news(path, estimate, is_brief=probed.is_cut_short or budget is not FULL_PROBE):
            path.rate = estimate
            path.measured_at_unix_s = self._now_unix_s()
            self._log_measured(path, estimate)
        self._tell(path)
        return "put off" if probed.is_cut_short else "measured"

    @staticmethod
    def _is_news(path: _Path, estimate: RateEstimate, *, is_brief: bool) -> bool:
        """A lower bound out of a brief probe says nothing against a higher figure."""
        is_weak = is_brief and estimate.lower_bound
        return path.rate is None or not is_weak or estimate.bytes_per_s > path.rate.bytes_per_s

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
        return LinkFacts(link=link, measured_at_unix_s=path.measured_at_unix_s, relayed=path.is_relayed)

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


def _is_same(before: RateEstimate | None, now: RateEstimate | None) -> bool:
    if before is None or now is None:
        return False
    return abs(now.bytes_per_s - before.bytes_per_s) <= SAME * before.bytes_per_s
