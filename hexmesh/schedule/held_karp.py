"""Best pipelines over every ordered subset of a few devices and every cut, exactly.

The state of Held and Karp (1962) with one axis more: for a fixed first device, D[S, j, l] is the least time
to run layers [0, l) on the devices of subset S, ending on j. A stage [l, l') on k costs step(k, l, l') and
the hop from j, so

    D[S + k, k, l'] = min over l < l' of ( min over j in S of D[S, j, l] + hop(j, k) ) + step(k, l, l')

and a pipeline's cycle is D[S, j, L] plus the way back to the first device. O(n^2 2^n L (n + L)) for each
batch level; all loops but that over subsets are numpy's. A subset is a bit mask of places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hexmesh.schedule.tables import Seconds, Tables

MAX_PLACES = 8
MAX_OPTIONS = 16
SAME = 1e-9
"""Rates nearer than this differ by rounding alone."""


@dataclass(frozen=True, slots=True)
class Option:
    """Places, first stage first, and a batch level."""

    order: tuple[int, ...]
    batch: int


class Subsets:
    """The best pipeline that uses exactly the places of each subset, for at most MAX_PLACES places."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._reach = _reach(tables)
        cycles = self._reach[..., tables.n_layers] + tables.return_s.T[None, :, None, :]
        batches = np.array(tables.batches, dtype=np.float64)[None, None, :, None]
        self._rates: Seconds = batches / cycles  # (2**n, n_first, n_batches, n_last)
        self.rates: Seconds = self._rates.max(axis=(1, 2, 3))
        """(2**n,): tokens per second of the best pipeline of each subset; 0: there is none."""

    def options(self, subset: int, least_rate: float) -> tuple[Option, ...]:
        """The fastest orders over the subset, none slower than `least_rate`; at least the best."""
        rates = self._rates[subset]
        good = np.argwhere(rates >= min(least_rate, float(self.rates[subset])))
        ends = sorted(good.tolist(), key=lambda end: (-float(rates[tuple(end)]), end))
        return tuple(
            Option(self._walk_back(first, batch, subset, last), batch)
            for first, batch, last in ends[:MAX_OPTIONS]
        )

    def _walk_back(self, first: int, batch: int, subset: int, last: int) -> tuple[int, ...]:
        """The order of places that gives reach[subset, first, batch, last, n_layers]."""
        tables = self._tables
        order, stop = [last], tables.n_layers
        while subset != 1 << last:
            subset ^= 1 << last
            before = self._reach[subset, first, batch] + tables.hop_s[batch, :, last, None]
            through = before + tables.step_s[batch, last, :, stop]  # (n_places, n_layers + 1)
            last, stop = (int(axis) for axis in np.unravel_index(int(through.argmin()), through.shape))
            order.append(last)
        return tuple(reversed(order))


def members_of(subset: int) -> tuple[int, ...]:
    """The places of a subset, ascending."""
    return tuple(place for place in range(subset.bit_length()) if subset >> place & 1)


def _reach(tables: Tables) -> Seconds:
    """D of the module's text for every first place: (2**n, n_first, n_batches, n_places, n_layers + 1)."""
    n, n_batches = len(tables.places), len(tables.batches)
    reach = np.full((1 << n, n, n_batches, n, tables.n_layers + 1), np.inf)
    for first in range(n):
        reach[1 << first, first, :, first, :] = tables.step_s[:, first, 0, :]
    for subset in range(1, (1 << n) - 1):
        inside = list(members_of(subset))
        outside = [place for place in range(n) if not subset >> place & 1]
        here = reach[subset][inside][:, :, inside]  # (n_first, n_batches, n_inside, n_layers + 1)
        if not np.isfinite(here[..., :-1]).any():
            continue
        hops = tables.hop_s[:, inside][:, :, outside]
        arrival = (here[:, :, :, None, :] + hops[None, ..., None]).min(axis=2)
        onward = (arrival[..., None] + tables.step_s[None, :, outside]).min(axis=3)
        for at, place in enumerate(outside):
            reach[subset | 1 << place, inside, :, place, :] = onward[:, :, at]
    return reach
