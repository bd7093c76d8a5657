"""Fills a link for a moment to see what it carries: one probe at a time per host, and none beside requests.

A probe needs both ends' consent: a host that takes part in one, or whose requests use the network, answers "busy,
later". When two hosts ask each other at once, the one with the smaller id goes first. The stream goes over the
probe channel's own connection, made like that of the data channel, so the figure is what one such connection
carries; when data starts to flow at either end, it stops at once.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from daemon.courier import Courier, Payload
from hexmesh.errors import Busy, TimedOut
from hexmesh.membership.probing import MAX_CHUNK_BYTES, ProbeBudget, RateEstimate, RateProbe
from hexmesh.wire.facts import ProbeAnswer, ProbeAsk, ProbeChunk, ProbeEnd, ProbeReport

ANSWER_PATIENCE_S = 2.0
DRAIN_PATIENCE_S = 5.0
"""How long the last chunk may take to arrive."""
RETRY_S = 0.03
QUIET_S = 1.0
"""Data that flowed less than this ago flows still."""
REPORT_S = 0.005
FILL_S = 0.002
"""How often the connection's queue is filled up: it has no news of room."""
TURN_LEASE_S = 3.0
"""A granted turn ends when no chunk came for this long: the asker died."""
MAX_TURN_S, REST_S = 30.0, 10.0
"""A peer may probe this host for so long at a stretch, however often it asks; then others have a while."""

_FILLER = memoryview(os.urandom(MAX_CHUNK_BYTES))

StreamMessage = ProbeAsk | ProbeAnswer | ProbeChunk | ProbeReport | ProbeEnd


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe found. `is_cut_short`: data began to flow before it was through."""

    estimate: RateEstimate | None
    is_cut_short: bool


@dataclass(slots=True)
class _Asking:
    """This host waits for a peer's answer, or sends to it."""

    node: str
    probe: int
    answer: asyncio.Future[ProbeAnswer]
    is_urgent: bool
    rate: RateProbe
    since_s: float
    is_enough: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Granted:
    """This host receives a peer's probe until `until_s`."""

    node: str
    probe: int
    is_urgent: bool
    since_s: float
    until_s: float
    end_s: float
    """When the turn is over, whatever still comes: nobody keeps this host from measuring for long."""
    first_chunk_s: float | None = None
    reported_s: float = 0.0
    n_bytes: int = 0


class Prober:
    """Owns this host's turn to take part in a probe. `queued_bytes`: what waits for the probe connection to a peer."""

    def __init__(
        self,
        courier: Courier,
        *,
        queued_bytes: Callable[[str], int],
        rng: random.Random,
        stopwatch: Callable[[], float],
    ) -> None:
        self._courier = courier
        self._queued_bytes = queued_bytes
        self._rng = rng
        self._stopwatch = stopwatch
        self._one_at_a_time = asyncio.Lock()
        self._turn: _Asking | _Granted | None = None
        self._allowances_s: dict[str, float] = {}
        """Until when each peer may be granted turns. Of members alone, so it stays small."""
        self._n_asked = 0
        self._flowed_s = float("-inf")

    def data_flowed(self) -> None:
        """A request's message was sent or came in just now."""
        self._flowed_s = self._now_s()

    @property
    def is_free(self) -> bool:
        """Whether this host takes part in no probe; a grant that its holder let lapse is over."""
        if isinstance(self._turn, _Granted) and self._turn.until_s < self._now_s():
            self._turn = None
        return self._turn is None

    def disconnected(self, node: str) -> None:
        if isinstance(self._turn, _Granted) and self._turn.node == node:
            self._turn = None

    async def probe(self, node: str, budget: ProbeBudget, rtt_s: float, *, is_urgent: bool = False) -> Probed:
        """Measure the rate to a peer as soon as both hosts are free.

        Raises Busy while data flows at one of them, unless urgent, and TimedOut when the peer does not answer.
        """
        async with self._one_at_a_time:
            asking = await self._win_turn(node, RateProbe(budget, rtt_s), is_urgent)
            try:
                await self._stream(asking)
            finally:
                self._end_turn(asking)
        return Probed(asking.rate.estimate(), asking.is_enough)

    def receive(self, src: str, message: StreamMessage, payload: Payload = b"") -> None:
        match message:
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

    # The asking side

    async def _win_turn(self, node: str, rate: RateProbe, is_urgent: bool) -> _Asking:
        while True:
            await self._until_free()
            if not is_urgent and self._data_flows():
                raise Busy("requests use this host's network", code="data_flows")
            asking = self._ask(node, rate, is_urgent)
            is_sending = False
            try:
                async with asyncio.timeout(ANSWER_PATIENCE_S):
                    answer = await asking.answer
                is_sending = answer.is_granted
            except TimeoutError:
                raise TimedOut(f"no answer within {ANSWER_PATIENCE_S:.0f} s") from None
            finally:
                if not is_sending:
                    self._end_turn(asking)
            if is_sending:
                return asking
            if answer.retry_after_s >= QUIET_S:
                raise Busy("requests use the peer's network", code="data_flows")
            await asyncio.sleep(answer.retry_after_s * self._rng.uniform(0.5, 2.0))

    def _ask(self, node: str, rate: RateProbe, is_urgent: bool) -> _Asking:
        self._n_asked += 1
        answer: asyncio.Future[ProbeAnswer] = asyncio.get_running_loop().create_future()
        asking = _Asking(node, self._n_asked, answer, is_urgent, rate, self._now_s())
        self._turn = asking
        self._send(node, ProbeAsk(probe=asking.probe, is_urgent=is_urgent))
        return asking

    async def _until_free(self) -> None:
        while not self.is_free:  # noqa: ASYNC110
            await asyncio.sleep(RETRY_S * self._rng.uniform(0.1, 1.0))

    def _end_turn(self, asking: _Asking) -> None:
        if self._turn is asking:
            self._turn = None
        self._send(asking.node, ProbeEnd(probe=asking.probe))

    async def _stream(self, asking: _Asking) -> None:
        """Send until the probe knows enough, then wait until all of it has arrived: a full link is not free yet."""
        started_s, n_sent = self._stopwatch(), 0
        while not self._is_over(asking, n_sent, self._stopwatch() - started_s):
            if self._queued_bytes(asking.node) >= asking.rate.queue_bytes or not (
                n_now := self._send_chunk(asking)
            ):
                await asyncio.sleep(FILL_S)
            else:
                n_sent += n_now
        self._send(asking.node, ProbeChunk(probe=asking.probe, is_last=True))
        try:
            async with asyncio.timeout(DRAIN_PATIENCE_S):
                await asking.drained.wait()
        except TimeoutError:
            return

    def _is_over(self, asking: _Asking, n_sent: int, spent_s: float) -> bool:
        if not asking.is_urgent and self._flowed_s > asking.since_s:
            asking.is_enough = True
        return asking.is_enough or asking.rate.is_over(n_sent, spent_s)

    def _send_chunk(self, asking: _Asking) -> int:
        """How many bytes were queued."""
        filler = _FILLER[: asking.rate.chunk_bytes]
        was_queued = self._send(asking.node, ProbeChunk(probe=asking.probe, is_last=False), filler)
        return len(filler) if was_queued else 0

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
        turn.rate.record(report.n_bytes, report.elapsed_s)
        turn.is_enough = turn.is_enough or report.is_enough
        if report.is_last:
            turn.drained.set()

    # The granting side

    def _on_ask(self, src: str, ask: ProbeAsk) -> None:
        retry_after_s = self._retry_after_s(src, ask)
        if retry_after_s is None:
            now_s, end_s = self._now_s(), self._end_of_allowance_s(src)
            until_s = min(end_s, now_s + TURN_LEASE_S)
            self._turn = _Granted(src, ask.probe, ask.is_urgent, now_s, until_s, end_s)
        answer = ProbeAnswer(
            probe=ask.probe, is_granted=retry_after_s is None, retry_after_s=retry_after_s or 0.0
        )
        self._send(src, answer)

    def _retry_after_s(self, src: str, ask: ProbeAsk) -> float | None:
        """None: it may be now. An ask of this host's own gives way first."""
        if self._data_flows() and not ask.is_urgent:
            return QUIET_S
        if self._now_s() >= self._end_of_allowance_s(src):
            return REST_S
        turn = self._turn
        if isinstance(turn, _Granted) and (turn.node == src or self.is_free):
            return None
        if isinstance(turn, _Asking) and self._gives_way(turn, src):
            turn.answer.set_result(ProbeAnswer(probe=turn.probe, is_granted=False, retry_after_s=RETRY_S))
            return None
        return None if turn is None else RETRY_S

    def _end_of_allowance_s(self, node: str) -> float:
        now_s, end_s = self._now_s(), self._allowances_s.get(node)
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
        if self._now_s() >= turn.end_s:
            return
        arrived_s = self._stopwatch()
        if turn.first_chunk_s is None:
            turn.first_chunk_s = turn.reported_s = arrived_s
        else:
            turn.n_bytes += n_bytes
        turn.until_s = min(turn.end_s, self._now_s() + TURN_LEASE_S)
        if chunk.is_last or arrived_s - turn.reported_s >= REPORT_S:
            turn.reported_s = arrived_s
            self._report(turn, arrived_s - turn.first_chunk_s, is_last=chunk.is_last)

    def _report(self, turn: _Granted, elapsed_s: float, *, is_last: bool) -> None:
        report = ProbeReport(
            probe=turn.probe,
            n_bytes=turn.n_bytes,
            elapsed_s=elapsed_s,
            is_last=is_last,
            is_enough=not turn.is_urgent and self._flowed_s > turn.since_s,
        )
        self._send(turn.node, report)

    @staticmethod
    def _is_of(turn: _Asking | _Granted, node: str, probe: int) -> bool:
        return turn.node == node and turn.probe == probe

    def _data_flows(self) -> bool:
        return self._now_s() - self._flowed_s < QUIET_S

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _send(self, node: str, message: StreamMessage, payload: Payload = b"") -> bool:
        return self._courier.send(node, message, payload, channel="probe")
