"""Streams through a pipeline, looked at while all of them decode: their rate, and the driver's metrics of its steps."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from daemon.terminal.local_mesh import LocalDaemon
from tools.bench.processes import metric, metrics_of
from tools.bench.streams import Crowd, Stream, greedy

SETTLED_AT = 6
"""The token of the last stream from which on nothing of a prefill is left."""
STEP, TRIP = "hexmesh_stage_step_seconds", "hexmesh_step_round_trip_seconds"
TRANSIT = "hexmesh_step_transit_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The time from when all streams decode until the first one is about to end."""

    streams: list[Stream]
    start_s: float
    stop_s: float
    n_steps: float
    trip_s: float
    """A step's mean round trip."""
    transit_s: float
    """Of it on the ways, neither computing nor queueing at a stage."""
    stage_s: list[float]
    """Each stage's mean compute of a step."""

    @property
    def n_tokens(self) -> int:
        return sum(self.start_s < at_s <= self.stop_s for one in self.streams for at_s in one.times_s)

    @property
    def tokens_per_s(self) -> float:
        return self.n_tokens / (self.stop_s - self.start_s)

    @property
    def token_s(self) -> float:
        """Mean time between two tokens of a stream."""
        return len(self.streams) / self.tokens_per_s

    @property
    def gaps_s(self) -> list[float]:
        """Between two tokens of a stream, of all streams."""
        return [
            gap
            for one in self.streams
            for gap, at_s in zip(one.gaps_s, one.times_s[1:], strict=True)
            if self.start_s < at_s <= self.stop_s
        ]

    @property
    def rows(self) -> float:
        """Of a step, in the mean."""
        return self.n_tokens / self.n_steps

    @property
    def busy(self) -> list[float]:
        """Share of the time that each stage computes."""
        return [stage_s * self.n_steps / (self.stop_s - self.start_s) for stage_s in self.stage_s]


def watch(
    driver: LocalDaemon,
    n_stages: int,
    connect: Callable[[], socket.socket],
    prompts: list[list[int]],
    max_tokens: int,
) -> Window:
    """All prompts at once. Raises SystemExit when they do not all run together."""
    crowd = Crowd()
    connections = [connect() for _ in prompts]
    streams = [
        crowd.send(connection, greedy(prompt, max_tokens))
        for connection, prompt in zip(connections, prompts, strict=True)
    ]
    crowd.run(until=lambda: any(one.is_over for one in streams) or _least(streams) >= SETTLED_AT)
    start_s, before = time.monotonic(), _sums(driver, n_stages)
    crowd.run(until=lambda: any(one.is_over or len(one.times_s) >= max_tokens - 2 for one in streams))
    stop_s, after = time.monotonic(), _sums(driver, n_stages)
    crowd.run()
    for one in streams:
        one.events()
    if _least(streams) < max_tokens or stop_s - start_s < 0.2:
        raise SystemExit(f"{len(streams)} streams did not run together for long enough")
    n_steps, trip_s, transit_s, *stage_s = (late - early for late, early in zip(after, before, strict=True))
    return Window(
        streams=streams,
        start_s=start_s,
        stop_s=stop_s,
        n_steps=n_steps,
        trip_s=trip_s / n_steps,
        transit_s=transit_s / n_steps,
        stage_s=[one_s / n_steps for one_s in stage_s],
    )


def _least(streams: list[Stream]) -> int:
    return min(len(one.times_s) for one in streams)


def _sums(driver: LocalDaemon, n_stages: int) -> list[float]:
    """Steps, the seconds of their round trips, of their ways and of each stage's compute, since the daemon began."""
    lines = metrics_of([driver])
    stages = [metric(lines, f"{STEP}_sum", f'stage="{index}"') for index in range(n_stages)]
    trips = [metric(lines, f"{TRIP}_count"), metric(lines, f"{TRIP}_sum"), metric(lines, f"{TRANSIT}_sum")]
    return [*trips, *stages]
