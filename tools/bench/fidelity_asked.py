"""What requests meet that a gateway is asked, in three ways: one after the other, so many at once, at chance times."""

from __future__ import annotations

import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from daemon.terminal.local_mesh import LocalDaemon
from hexmesh.workload import Workload
from tools.bench.models import random_prompt
from tools.bench.pipeline_window import STEP, TRANSIT, TRIP
from tools.bench.processes import metric, metrics_of
from tools.bench.streams import Crowd, Stream, greedy

N_STREAMS = 16
"""Requests that are under way at once where a mesh is saturated."""
SETTLED = 0.3
"""Of a saturated measurement, until it counts."""
_IDLE_S = 0.005


@dataclass(frozen=True, slots=True)
class Met:
    """What requests met; those that the measurement's end cut off included."""

    output_tokens_per_s: float
    ttft_s: float
    tpot_s: float
    sent_s: list[float]
    """When each was sent."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A replica's steps in a measurement, by its driver's metrics."""

    per_s: float
    transit_s: float
    """Of a step, on all its ways: neither computing nor queueing at a stage."""
    stage_s: list[float]

    @property
    def busy(self) -> list[float]:
        return [self.per_s * seconds for seconds in self.stage_s]


@dataclass(slots=True)
class Client:
    """Asks one gateway."""

    connect: Callable[[], socket.socket]
    seeds: Iterator[int] = field(default_factory=count)

    def one_by_one(self, workload: Workload, seconds: float) -> Met:
        """Each request after the last one's end: nothing waits."""
        crowd, streams, start_s = Crowd(), list[Stream](), time.monotonic()
        while time.monotonic() - start_s < seconds:
            streams.append(self._send(crowd, workload))
            crowd.run()
        return _met(streams, start_s, time.monotonic())

    def saturate(self, workload: Workload, seconds: float) -> Met:
        """N_STREAMS at once, each followed by the next."""
        crowd, streams, start_s = Crowd(), list[Stream](), time.monotonic()

        def go_on() -> bool:
            n_running = sum(not stream.is_over for stream in streams)
            streams.extend(self._send(crowd, workload) for _ in range(N_STREAMS - n_running))
            return time.monotonic() - start_s >= seconds

        _drive(crowd, go_on)
        stop_s = time.monotonic()
        crowd.run()
        return _met(streams, start_s + SETTLED * seconds, stop_s)

    def arrive(self, workload: Workload, rate: float, seconds: float) -> Met:
        """Requests at chance times of that rate."""
        rng, crowd, streams, start_s = random.Random(1), Crowd(), list[Stream](), time.monotonic()
        due_s = start_s

        def go_on() -> bool:
            nonlocal due_s
            while due_s <= min(time.monotonic(), start_s + seconds):
                streams.append(self._send(crowd, workload))
                due_s += rng.expovariate(rate)
            return time.monotonic() - start_s >= seconds

        _drive(crowd, go_on)
        crowd.run()
        return _met(streams, start_s, start_s + seconds)

    def _send(self, crowd: Crowd, workload: Workload) -> Stream:
        prompt = random_prompt(workload.prompt_tokens, seed=next(self.seeds))
        return crowd.send(self.connect(), greedy(prompt, workload.output_tokens))


def _drive(crowd: Crowd, is_over: Callable[[], bool]) -> None:
    """Until it is over, whether answers are under way or not."""
    while not is_over():
        crowd.run(until=is_over)
        time.sleep(_IDLE_S)


def _met(streams: Sequence[Stream], start_s: float, stop_s: float) -> Met:
    n_tokens = sum(start_s < at_s <= stop_s for stream in streams for at_s in stream.times_s)
    counted = [stream for stream in streams if stream.times_s[-1] > start_s]
    return Met(
        output_tokens_per_s=n_tokens / (stop_s - start_s),
        ttft_s=statistics.median(stream.first_token_s for stream in counted),
        tpot_s=statistics.median(
            (one.times_s[-1] - one.times_s[0]) / (len(one.times_s) - 1) for one in counted
        ),
        sent_s=[stream.sent_s for stream in streams],
    )


@dataclass(slots=True)
class StepCounter:
    """Steps of the driver since it was made."""

    driver: LocalDaemon
    n_stages: int
    _start_s: float = field(default_factory=time.monotonic)
    _before: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._before = self._sums()

    def steps(self) -> Steps:
        now = [after - before for after, before in zip(self._sums(), self._before, strict=True)]
        n, transit_s, *stage_s = now
        return Steps(n / (time.monotonic() - self._start_s), transit_s / n, [one / n for one in stage_s])

    def _sums(self) -> list[float]:
        lines = metrics_of([self.driver])
        stages = [metric(lines, f"{STEP}_sum", f'stage="{index}"') for index in range(self.n_stages)]
        return [metric(lines, f"{TRIP}_count"), metric(lines, f"{TRANSIT}_sum"), *stages]
