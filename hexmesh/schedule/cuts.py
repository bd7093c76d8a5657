"""Where to cut the layers along a given order of devices.

Among all cuts whose cycle stays within a limit: those whose slowest stage takes at most EVEN times the least
possible, because with several steps in flight that stage sets the rate; of these the one with the most KV blocks,
then the one whose slowest stage is fastest. All are found by bisection over an exact feasibility test, a DP of
O(stages x layers^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from hexmesh.schedule.tables import Cut, Seconds, Tables

EVEN = 1.03
"""How much slower than need be the slowest stage may be for the sake of more KV."""


def best_cut(
    tables: Tables, order: Sequence[int], batch: int, *, limit_s: float, max_blocks: int
) -> Cut | None:
    """The cut described above, or None if none is within `limit_s`. Blocks over `max_blocks` are no gain."""
    network_s = tables.network_s(batch, order)
    steps = [tables.step_s[batch, place] for place in order]
    rooms = [tables.room_blocks[place] for place in order]

    def masked(min_blocks: int, slowest_s: float) -> list[Seconds]:
        return [
            np.where((room >= min_blocks) & (step <= slowest_s), step, np.inf)
            for step, room in zip(steps, rooms, strict=True)
        ]

    def is_within(min_blocks: int, slowest_s: float) -> bool:
        return float(_least_sums(masked(min_blocks, slowest_s))[-1][-1]) + network_s <= limit_s

    if not is_within(0, np.inf):
        return None
    times = np.unique(np.concatenate([step[np.isfinite(step)] for step in steps]))[::-1]

    def fastest_slowest_s(min_blocks: int) -> float:
        return float(times[last_true(0, len(times) - 1, lambda at: is_within(min_blocks, float(times[at])))])

    even_s = EVEN * fastest_slowest_s(0)
    blocks = last_true(0, max_blocks, lambda n_blocks: is_within(n_blocks, even_s))
    chosen = masked(blocks, fastest_slowest_s(blocks))
    sums = _least_sums(chosen)
    return Cut(
        order=tuple(order),
        bounds=_bounds(chosen, sums),
        batch=batch,
        cycle_s=float(sums[-1][-1]) + network_s,
    )


def best_cycle_s(tables: Tables, order: Sequence[int], batch: int) -> float:
    """Seconds of the best cut along `order`; infinite if there is none."""
    sums = _least_sums([tables.step_s[batch, place] for place in order])
    return float(sums[-1][-1]) + tables.network_s(batch, order)


def cut_cycle_s(tables: Tables, order: Sequence[int], bounds: Sequence[int], batch: int) -> float:
    """Seconds of one given cut; infinite if it does not fit at this batch level."""
    stages = sum(
        float(tables.step_s[batch, place, start, stop])
        for place, (start, stop) in zip(order, pairwise(bounds), strict=True)
    )
    return stages + tables.network_s(batch, order)


def _least_sums(steps: Sequence[Seconds]) -> list[Seconds]:
    """sums[i][l]: least time to run layers [0, l) on the first i stages."""
    n_ends = steps[0].shape[0]
    sums = [np.where(np.arange(n_ends) == 0, 0.0, np.inf)]
    for step in steps:
        sums.append((sums[-1][:, None] + step).min(axis=0))
    return sums


def _bounds(steps: Sequence[Seconds], sums: Sequence[Seconds]) -> tuple[int, ...]:
    bounds = [steps[0].shape[0] - 1]
    for index in range(len(steps) - 1, -1, -1):
        bounds.append(int((sums[index] + steps[index][:, bounds[-1]]).argmin()))
    return tuple(reversed(bounds))


def last_true(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number in [low, high] that `holds`, which is true at `low` and once false stays so."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
