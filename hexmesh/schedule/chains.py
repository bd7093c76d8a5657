"""Good pipelines over many devices, where every ordered subset is too many: not exact.

From each of the fastest devices a chain of up to MAX_CHAIN_PLACES is grown by always taking the nearest device
next (the cheapest hop at batch 1; ties by place). A DP then chooses, for each chain, which devices to skip and
where to cut: exact for that chain, blind to other orders. State: [batch level, stages so far, last place in the
chain, layers].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hexmesh.schedule.cuts import best_cycle_s
from hexmesh.schedule.held_karp import MAX_OPTIONS, SAME, Option
from hexmesh.schedule.tables import Seconds, Tables

MAX_CHAINS = 16
MAX_STAGES = 16
MAX_CHAIN_PLACES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LongPipeline:
    """What a search over chains gives."""

    options: tuple[Option, ...]
    """The fastest orders of the fewest stages, all about as good as the best pipeline; at least one."""
    best_rate: float
    """Tokens per second of the best pipeline of all chains."""


def good_orders(tables: Tables, tolerance: float) -> LongPipeline | None:
    """The orders to choose a cut from, over the chains alone; None when none holds the model.

    A rate counts as good if it is at most the fraction `tolerance` below the best.
    """
    options = [(rate, len(order), order, batch) for rate, order, batch in _options(tables)]
    if not options:
        return None
    best = max(rate for rate, *_ in options)
    close = [option for option in options if option[0] >= best * (1.0 - max(tolerance, SAME))]
    fewest = min(n_stages for _, n_stages, *_ in close)
    fastest = sorted({(-rate, order, batch) for rate, n_stages, order, batch in close if n_stages == fewest})
    return LongPipeline(
        options=tuple(Option(order, batch) for _, order, batch in fastest[:MAX_OPTIONS]), best_rate=best
    )


def rate_with_one_more(tables: Tables, order: tuple[int, ...], place: int) -> float:
    """Tokens per second of the best pipeline that `place` inserted into `order` gives; 0: there is none."""
    orders = [(*order[:at], place, *order[at:]) for at in range(len(order) + 1)]
    return max(
        n_sequences / best_cycle_s(tables, longer, batch)
        for longer in orders
        for batch, n_sequences in enumerate(tables.batches)
    )


def _options(tables: Tables) -> Iterator[tuple[float, tuple[int, ...], int]]:
    """(rate, order, batch level) of the best pipeline of every chain, number of stages and batch level."""
    for chain in _chains(tables):
        reach = _reach(tables, chain)
        cycles = reach[..., tables.n_layers] + tables.return_s[list(chain), chain[0]]
        for batch, n_stages in np.argwhere(np.isfinite(cycles).any(axis=2)):
            last = int(cycles[batch, n_stages].argmin())
            order = _walk_back(tables, reach, chain, int(batch), int(n_stages), last)
            yield float(tables.batches[batch] / cycles[batch, n_stages, last]), order, int(batch)


def _chains(tables: Tables) -> Iterator[tuple[int, ...]]:
    n = len(tables.places)
    layer_s = [
        float(tables.step_s[0, place][np.isfinite(tables.step_s[0, place])].min()) for place in range(n)
    ]
    for first in sorted(range(n), key=lambda place: (layer_s[place], place))[:MAX_CHAINS]:
        chain, left = [first], set(range(n)) - {first}
        while left and len(chain) < MAX_CHAIN_PLACES:
            nearest = min(left, key=lambda place: (tables.hop_s[0, chain[-1], place], layer_s[place], place))
            chain.append(nearest)
            left.remove(nearest)
        yield tuple(chain)


def _reach(tables: Tables, chain: Sequence[int]) -> Seconds:
    """Least seconds to run layers [0, l) with i + 1 stages: (n_batches, i, n_places, n_layers + 1)."""
    n_stages = min(MAX_STAGES, len(chain), tables.n_layers)
    reach = np.full((len(tables.batches), n_stages, len(chain), tables.n_layers + 1), np.inf)
    reach[:, 0, 0, :] = tables.step_s[:, chain[0], 0, :]
    for index in range(1, len(chain)):
        hops = tables.hop_s[:, list(chain[:index]), chain[index]]  # (n_batches, index)
        arrival = (reach[:, :-1, :index, :] + hops[:, None, :, None]).min(axis=2)
        onward = arrival[..., None] + tables.step_s[:, None, chain[index]]
        reach[:, 1:, index, :] = onward.min(axis=2)
    return reach


def _walk_back(
    tables: Tables, reach: Seconds, chain: Sequence[int], batch: int, n_stages: int, last: int
) -> tuple[int, ...]:
    order, stop = [chain[last]], tables.n_layers
    for before in range(n_stages - 1, -1, -1):
        hops = tables.hop_s[batch, list(chain[:last]), chain[last], None]
        through = reach[batch, before, :last] + hops + tables.step_s[batch, chain[last], :, stop]
        last, stop = (int(axis) for axis in np.unravel_index(int(through.argmin()), through.shape))
        order.append(chain[last])
    return tuple(reversed(order))
