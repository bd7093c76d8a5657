"""Keeps what a run shows: ends of requests, the measured window, and points for a timeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hexmesh.sim.events import Events
from hexmesh.sim.gateway import Flight
from hexmesh.sim.mesh import Mesh
from hexmesh.sim.network import Network, Resource
from hexmesh.sim.result import (
    HandoffUse,
    Point,
    ReplicaUse,
    SimResult,
    StageUse,
    WayUse,
    spread_of,
)
from hexmesh.workload import Workload

MAX_POINTS = 400
FIRST_POINT_S = 0.05


@dataclass(frozen=True, slots=True)
class _Counters:
    """Everything that only rises, at one end of the window."""

    at_s: float
    n_tokens: int
    n_prompts: int
    n_served: int
    stage_busy_s: dict[tuple[str, int], float]
    ways: dict[Resource, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Look:
    """The mesh at one time."""

    at_s: float
    n_tokens: int
    running: int
    waiting: int
    kv_used: float


@dataclass(slots=True)
class _Seen:
    """Sums over looks at one replica in the window."""

    n: int = 0
    kv: float = 0.0
    kv_max: float = 0.0
    waiting: int = 0
    waiting_max: int = 0
    running: int = 0
    running_max: int = 0


@dataclass(frozen=True, slots=True)
class _Ended:
    arrival_s: float
    ttft_s: float
    tpot_s: float | None
    end_to_end_s: float
    end_s: float


@dataclass(slots=True, kw_only=True)
class Counts:
    """How requests ended."""

    served: int = 0
    refused: int = 0
    lost: int = 0
    replayed: int = 0
    handed_bytes: float = 0.0
    handed_s: list[float] = field(default_factory=list)


class Record:
    """Owns the figures of a run; `begin` and `end` mark the window."""

    def __init__(self, events: Events, mesh: Mesh, network: Network) -> None:
        self.counts = Counts()
        self.n_tokens = 0
        self.n_prompts = 0
        """Requests that have their first token."""
        self._events = events
        self._mesh = mesh
        self._network = network
        self._ended: list[_Ended] = []
        self._failed_s: list[float] = []
        """Arrivals of requests that were refused or lost."""
        self._begin: _Counters | None = None
        self._end: _Counters | None = None
        self._looks: list[_Look] = []
        self._seen: dict[str, _Seen] = {}
        self._interval_s = FIRST_POINT_S

    @property
    def is_over(self) -> bool:
        """Whether the window was closed."""
        return self._end is not None

    # --- what happens ---

    def tokens(self, n: int) -> None:
        self.n_tokens += n

    def prompt(self) -> None:
        self.n_prompts += 1

    def served(self, flight: Flight) -> None:
        self.counts.served += 1
        if flight.is_resident:
            return
        now_s, n_more = self._events.now_s, flight.output_tokens - 1
        tpot_s = (now_s - flight.first_s) / n_more if n_more else None
        self._ended.append(
            _Ended(
                flight.arrival_s, flight.first_s - flight.arrival_s, tpot_s, now_s - flight.arrival_s, now_s
            )
        )

    def refused(self, flight: Flight) -> None:
        self.counts.refused += 1
        self._failed_s.append(flight.arrival_s)

    def lost(self, flight: Flight) -> None:
        self.counts.lost += 1
        self._failed_s.append(flight.arrival_s)

    def replayed(self, flight: Flight) -> None:
        self.counts.replayed += 1

    def handed_over(self, n_bytes: float, seconds: float) -> None:
        self.counts.handed_bytes += n_bytes
        self.counts.handed_s.append(seconds)

    # --- looks ---

    def look(self, n_without_route: int) -> float:
        """Take a point of the timeline; when to take the next."""
        used, total, running, waiting = 0, 0, 0, n_without_route
        for replica in self._mesh.whole():
            batcher = replica.batcher
            n_held = batcher.pool.n_blocks - batcher.pool.n_available
            n_running, n_waiting = batcher.n_running, len(batcher.waiting)
            used, total = used + n_held, total + batcher.pool.n_blocks
            running, waiting = running + n_running, waiting + n_waiting
            if self._begin is not None and self._end is None:
                self._see(replica.replica.id, n_held / batcher.pool.n_blocks, n_running, n_waiting)
        share = used / total if total else 0.0
        self._looks.append(_Look(self._events.now_s, self.n_tokens, running, waiting, share))
        if len(self._looks) > 2 * MAX_POINTS:
            self._looks = self._looks[::2]
            self._interval_s *= 2
        return self._events.now_s + self._interval_s

    def _see(self, name: str, kv: float, n_running: int, n_waiting: int) -> None:
        seen = self._seen.setdefault(name, _Seen())
        seen.n += 1
        seen.kv += kv
        seen.kv_max = max(seen.kv_max, kv)
        seen.waiting += n_waiting
        seen.waiting_max = max(seen.waiting_max, n_waiting)
        seen.running += n_running
        seen.running_max = max(seen.running_max, n_running)

    # --- the window ---

    def begin(self) -> None:
        """The window opens."""
        self._begin = self._counters()

    def end(self) -> None:
        """The window closes."""
        self._end = self._counters()

    def _counters(self) -> _Counters:
        busy = {
            (name, at): seconds
            for name, replica in self._mesh.replicas.items()
            for at, seconds in enumerate(replica.stage_busy_s)
        }
        ways = {resource: (small, bulk) for resource, small, bulk in self._network.resources()}
        return _Counters(self._events.now_s, self.n_tokens, self.n_prompts, self.counts.served, busy, ways)

    # --- the result ---

    def result(self, n_requests: int, workload: Workload) -> SimResult:
        """What the run found."""
        slo, is_saturated = workload.slo, workload.arrivals is None
        end = self._end or self._counters()
        begin = self._begin or end
        seconds = max(end.at_s - begin.at_s, 1e-12)
        measured = [
            one
            for one in self._ended
            if begin.at_s <= (one.end_s if is_saturated else one.arrival_s) <= end.at_s
        ]
        n_failed = sum(begin.at_s <= arrival_s <= end.at_s for arrival_s in self._failed_s)
        rate = (end.n_served - begin.n_served) / seconds
        if is_saturated:  # what is there at first may run out, or more may be begun than can be ended
            n_outputs = (end.n_tokens - begin.n_tokens) / workload.output_tokens
            rate = min(n_outputs, end.n_prompts - begin.n_prompts) / seconds
        n_good = sum(slo.is_met(one.ttft_s, one.tpot_s or 0.0) for one in measured)
        return SimResult(
            n_requests=n_requests,
            served=self.counts.served,
            refused=self.counts.refused,
            lost=self.counts.lost,
            replayed=self.counts.replayed,
            seconds=self._events.now_s,
            window_start_s=begin.at_s,
            window_stop_s=end.at_s,
            is_saturated=is_saturated,
            ttft_s=spread_of([one.ttft_s for one in measured]),
            tpot_s=spread_of([one.tpot_s for one in measured if one.tpot_s is not None]),
            end_to_end_s=spread_of([one.end_to_end_s for one in measured]),
            requests_per_s=rate,
            output_tokens_per_s=(end.n_tokens - begin.n_tokens) / seconds,
            goodput_share=n_good / max(1, len(measured) + n_failed),
            goodput_requests_per_s=n_good / seconds,
            stages=self._stages(begin, end, seconds),
            ways=_ways(begin, end, seconds),
            replicas=self._replicas(),
            timeline=self._timeline(),
            handoffs=HandoffUse(
                n=len(self.counts.handed_s),
                n_bytes=self.counts.handed_bytes,
                seconds=spread_of(self.counts.handed_s),
            ),
            n_events=self._events.n_run,
            n_steps=sum(replica.n_steps for replica in self._mesh.replicas.values()),
        )

    def _stages(self, begin: _Counters, end: _Counters, seconds: float) -> tuple[StageUse, ...]:
        return tuple(
            StageUse(
                replica=name,
                stage=at,
                node=replica.replica.stages[at].node,
                busy=min(1.0, (busy_s - begin.stage_busy_s.get((name, at), 0.0)) / seconds),
            )
            for name, replica in self._mesh.replicas.items()
            for at, busy_s in enumerate(
                end.stage_busy_s[name, at] for at in range(len(replica.replica.stages))
            )
        )

    def _replicas(self) -> tuple[ReplicaUse, ...]:
        found = []
        for name, replica in self._mesh.replicas.items():
            seen = self._seen.get(name, _Seen())
            n = max(1, seen.n)
            found.append(
                ReplicaUse(
                    replica=name,
                    role=replica.replica.role,
                    kv_mean=seen.kv / n,
                    kv_max=seen.kv_max,
                    waiting_mean=seen.waiting / n,
                    waiting_max=seen.waiting_max,
                    running_mean=seen.running / n,
                    running_max=seen.running_max,
                )
            )
        return tuple(found)

    def _timeline(self) -> tuple[Point, ...]:
        looks = self._looks
        if len(looks) > MAX_POINTS:
            looks = looks[::2]
        points = []
        for before, look in pairwise(looks):
            seconds = look.at_s - before.at_s
            points.append(
                Point(
                    at_s=look.at_s,
                    tokens_per_s=(look.n_tokens - before.n_tokens) / seconds if seconds > 0 else 0.0,
                    running=look.running,
                    waiting=look.waiting,
                    kv_used=look.kv_used,
                )
            )
        return tuple(points)


def _ways(begin: _Counters, end: _Counters, seconds: float) -> tuple[WayUse, ...]:
    found = []
    for resource, (small, bulk) in end.ways.items():
        small_before, bulk_before = begin.ways.get(resource, (0.0, 0.0))
        hidden_bytes, kv_bytes = small - small_before, bulk - bulk_before
        found.append(
            WayUse(
                kind=resource.kind,
                name=resource.name,
                busy=min(1.0, (hidden_bytes + kv_bytes) / seconds / resource.bytes_per_s),
                hidden_bytes=hidden_bytes,
                kv_bytes=kv_bytes,
            )
        )
    return tuple(found)
