"""A pipeline in virtual time: stages take time by the row, links take time, sequences decode for ever."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pipeline:
    """What a micro-batch of b rows needs: at each stage `fixed_s + row_s * b`, times noise, and the links' delays."""

    stages: list[tuple[float, float]]
    links_s: list[float]
    """Into each stage, the first from the driver, and last the way back."""
    noise: float
    """Standard deviation, as a share."""


@dataclass
class _Step:
    n_rows: int
    sent_s: float
    n_in_flight: int
    seconds: list[float]


Observe = Callable[[int, int, list[float], float, int], None]


def tokens_per_s(
    pipeline: Pipeline,
    n_decoding: int,
    groups: Callable[[int], int],
    observe: Observe,
    *,
    n_steps: int,
    seed: int = 0,
    changed: Pipeline | None = None,
) -> float:
    """Run so many steps as a driver does: `groups` in flight at most, the longest waiting sequences first.

    With `changed`, the pipeline becomes that one after a quarter of the steps, and the second half alone counts.
    """
    rng = random.Random(seed)
    n_stages = len(pipeline.stages)
    free_s = [0.0] * n_stages
    events: list[tuple[float, int, int, _Step]] = []
    """(time, order, stage that the step comes to, step)"""
    now_s, n_ready, n_in_flight, n_sent, n_tokens, n_answered = 0.0, n_decoding, 0, 0, 0, 0
    counted_from = (0, 0.0)
    while n_answered < n_steps:
        if changed is not None and n_answered == n_steps // 4:
            pipeline = changed
        if changed is not None and n_answered == n_steps // 2:
            counted_from = (n_tokens, now_s)
        limit = groups(n_decoding)
        while n_ready and n_in_flight < limit:
            n_rows = min(n_ready, -(-n_decoding // limit))
            n_ready -= n_rows
            n_in_flight += 1
            step = _Step(n_rows, now_s, n_in_flight, [])
            n_sent += 1
            heapq.heappush(events, (now_s + pipeline.links_s[0], n_sent, 0, step))
            limit = groups(n_decoding)
        now_s, order, stage, step = heapq.heappop(events)
        if stage < n_stages:
            fixed_s, row_s = pipeline.stages[stage]
            seconds = (fixed_s + row_s * step.n_rows) * max(0.3, rng.gauss(1.0, pipeline.noise))
            step.seconds.append(seconds)
            free_s[stage] = max(free_s[stage], now_s) + seconds
            there_s = free_s[stage] + pipeline.links_s[stage + 1]
            heapq.heappush(events, (there_s, order, stage + 1, step))
            continue
        n_ready += step.n_rows
        n_in_flight -= 1
        n_tokens += step.n_rows
        n_answered += 1
        observe(step.n_rows, step.n_rows, step.seconds, now_s - step.sent_s, step.n_in_flight)
    return (n_tokens - counted_from[0]) / (now_s - counted_from[1])


def best_rate(pipeline: Pipeline, n_decoding: int, *, n_steps: int, most: int) -> tuple[float, int]:
    """The best that any fixed number of groups reaches, by trying them, and that number."""
    tried = {n for n in (*range(1, 9), *range(10, most, 3), most, n_decoding) if n <= min(n_decoding, most)}
    return max(
        (
            tokens_per_s(pipeline, n_decoding, lambda _, n=n: n, lambda *_: None, n_steps=n_steps),  # type: ignore[misc]
            n,
        )
        for n in tried
    )
