"""Best pipelines over every ordered subset of a few devices and every cut, exactly.

The state of Held and Karp (1962) with one axis more: for a fixed first device, D[S, j, l] is the least time
to run layers [0, l) on the devices of subset S, ending on j. A stage [l, l') on k costs step(k, l, l') and
the hop from j, so

    D[S + k, k, l'] = min over l < l' of ( min over j in S of D[S, j, l] + hop(j, k) ) + step(k, l, l')

and a pipeline's cycle is D[S, j, L] plus the way back to the first device. O(n^2 2^n L (n + L)) for each
batch level; the loops over levels, j and both ends of the cut are numpy's.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search over orders gives."""

    options: tuple[Option, ...]
    """The fastest orders of the fewest stages, all about as good as the best pipeline; at least one."""
    best_rate: float
    """Tokens per second of the best pipeline of all."""
    rate_with: tuple[tuple[float, int], ...]
    """The best pipeline that uses each place: tokens per second (0: there is none) and number of stages."""


def best_orders(tables: Tables, tolerance: float) -> Found | None:
    """The orders to choose a cut from; None when no pipeline holds the model. At most MAX_PLACES places.

    A rate counts as good if it is at most the fraction `tolerance` below the best.
    """
    n = len(tables.places)
    reaches = [_reach(tables, first) for first in range(n)]
    cycles = np.stack([_cycles(tables, reach, first) for first, reach in enumerate(reaches)])
    batches = np.array(tables.batches, dtype=np.float64)[None, :, None, None]
    rates = batches / cycles  # (n_first, n_batches, 2**n, n_last)
    best = float(rates.max())
    if best <= 0.0:
        return None
    members = np.array([[bool(subset >> place & 1) for place in range(n)] for subset in range(1 << n)])
    good = rates >= best * (1.0 - max(tolerance, SAME))
    sizes = np.where(good, members.sum(axis=1)[None, None, :, None], n + 1)
    good &= sizes == sizes.min()
    ends = sorted(np.argwhere(good).tolist(), key=lambda end: (-float(rates[tuple(end)]), end))
    by_subset = rates.max(axis=(0, 1, 3))
    best_with = [
        max(
            (float(by_subset[subset]), -int(members[subset].sum()))
            for subset in np.flatnonzero(members[:, place])
        )
        for place in range(n)
    ]
    return Found(
        options=tuple(
            Option(_walk_back(tables, reaches[first], batch, subset, last), batch)
            for first, batch, subset, last in ends[:MAX_OPTIONS]
        ),
        best_rate=best,
        rate_with=tuple((rate, -fewer) for rate, fewer in best_with),
    )


def _reach(tables: Tables, first: int) -> Seconds:
    """D of the module's text for one first place: (n_batches, 2**n, n_places, n_layers + 1)."""
    n, n_batches = len(tables.places), len(tables.batches)
    reach = np.full((n_batches, 1 << n, n, tables.n_layers + 1), np.inf)
    reach[:, 1 << first, first, :] = tables.step_s[:, first, 0, :]
    for subset in range(1 << n):
        if not subset >> first & 1:
            continue
        members = [place for place in range(n) if subset >> place & 1]
        for place in range(n):
            if subset >> place & 1:
                continue
            hops = tables.hop_s[:, members, place, None]
            arrival = (reach[:, subset, members, :] + hops).min(axis=1)  # (n_batches, n_layers + 1)
            if np.isfinite(arrival).any():
                onward = arrival[:, :, None] + tables.step_s[:, place]
                reach[:, subset | 1 << place, place, :] = onward.min(axis=1)
    return reach


def _cycles(tables: Tables, reach: Seconds, first: int) -> Seconds:
    """(n_batches, 2**n, n_last) seconds of whole pipelines."""
    cycles: Seconds = reach[:, :, :, tables.n_layers] + tables.return_s[:, first]
    return cycles


def _walk_back(tables: Tables, reach: Seconds, batch: int, subset: int, last: int) -> tuple[int, ...]:
    """The order of places that gives reach[batch, subset, last, n_layers]."""
    order, stop = [last], tables.n_layers
    while subset != 1 << last:
        subset ^= 1 << last
        before = reach[batch, subset] + tables.hop_s[batch, :, last, None]  # (n_places, n_layers + 1)
        through = before + tables.step_s[batch, last, :, stop]
        last, stop = (int(axis) for axis in np.unravel_index(int(through.argmin()), through.shape))
        order.append(last)
    return tuple(reversed(order))
