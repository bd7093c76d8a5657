"""Replicas over any number of devices: exact for a few, in groups of near ones beyond.

Many devices are sorted into groups of GROUP_PLACES that are near each other (by the hop at the smallest batch),
and each group is partitioned exactly. What a round leaves over is grouped again, until a round finds nothing.
Models that no group holds get long pipelines, one after the other (see `chains`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hexmesh.schedule.chains import good_orders, rate_with_one_more
from hexmesh.schedule.cuts import best_cycle_s
from hexmesh.schedule.held_karp import MAX_PLACES, Option, Subsets
from hexmesh.schedule.partition import best_partition
from hexmesh.schedule.tables import Tables

GROUP_PLACES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One replica's places and the orders to choose its cut from."""

    options: tuple[Option, ...]
    """The fastest orders, best first; at least one."""
    least_rate: float
    """What its cut must give, in tokens per second, for the sum of all replicas to be about the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search over some places gives."""

    replicas: tuple[Found, ...]
    best_rate: float
    """Tokens per second of all replicas together, at best."""
    rate_with: dict[int, tuple[float, int]]
    """Of each place that the search knows it of: as in `Partition`."""


def find_replicas(
    tables: Tables, places: Sequence[int], *, max_exact: int, tolerance: float
) -> Search | None:
    """The replicas to make over some of the tables' places; None when those hold none.

    With more than `max_exact` places the search is not exact. Sums of rates that are at most the fraction
    `tolerance` below the best count as equal.
    """
    if len(places) <= max_exact:
        return _exact(tables, places, tolerance)
    left, parts = list(places), list[Search]()
    while left:
        is_few = len(left) <= max_exact
        groups = [left] if is_few else list(_groups(tables, left, min(GROUP_PLACES, max_exact)))
        found = [part for group in groups if (part := _exact(tables, group, tolerance)) is not None]
        if not found and not is_few:
            found = [part for part in [_one_long(tables, left, tolerance)] if part is not None]
        if not found:
            break
        parts += found
        used = {place for part in found for one in part.replicas for place in one.options[0].order}
        left = [place for place in left if place not in used]
    if not parts:
        return None
    replicas = tuple(one for part in parts for one in part.replicas)
    total = sum(part.best_rate for part in parts)
    with_unused = {place: _with_one_more(tables, replicas, place, total) for place in left}
    return Search(replicas=replicas, best_rate=total, rate_with=with_unused)


def _exact(tables: Tables, places: Sequence[int], tolerance: float) -> Search | None:
    if not places:
        return None
    assert len(places) <= MAX_PLACES
    subsets = Subsets(tables.only(places))
    partition = best_partition(subsets.rates, tolerance)
    if partition is None:
        return None
    share = partition.best_rate * (1.0 - tolerance) / partition.rate
    replicas = []
    for subset in partition.subsets:
        least_rate = float(subsets.rates[subset]) * min(share, 1.0)
        options = tuple(
            Option(tuple(places[at] for at in option.order), option.batch)
            for option in subsets.options(subset, least_rate)
        )
        replicas.append(Found(options=options, least_rate=least_rate))
    return Search(
        replicas=tuple(replicas),
        best_rate=partition.best_rate,
        rate_with={places[at]: found for at, found in enumerate(partition.rate_with)},
    )


def _one_long(tables: Tables, places: Sequence[int], tolerance: float) -> Search | None:
    found = good_orders(tables.only(places), tolerance)
    if found is None:
        return None
    options = tuple(
        Option(tuple(places[at] for at in option.order), option.batch) for option in found.options
    )
    replica = Found(options=options, least_rate=found.best_rate * (1.0 - tolerance))
    return Search(replicas=(replica,), best_rate=found.best_rate, rate_with={})


def _groups(tables: Tables, places: Sequence[int], size: int) -> Iterator[list[int]]:
    """Groups of `size` places: the first that is left, and those nearest to it, there and back."""
    left = list(places)
    while size and left:
        first = left[0]
        there_and_back = tables.hop_s[0, first] + tables.hop_s[0, :, first]
        nearest = sorted(left[1:], key=lambda place: (float(there_and_back[place]), place))
        group = [first, *nearest[: size - 1]]
        left = [place for place in left if place not in group]
        yield sorted(group)


def _with_one_more(tables: Tables, replicas: Sequence[Found], place: int, total: float) -> tuple[float, int]:
    """The sum of rates with `place` put into the pipeline nearest to it, and the stages in all."""
    orders = [one.options[0] for one in replicas]

    def distance_s(option: Option) -> float:
        return float(np.min(tables.hop_s[0, list(option.order), place]))

    nearest = min(orders, key=distance_s)
    before = total - tables.batches[nearest.batch] / best_cycle_s(tables, nearest.order, nearest.batch)
    longer = rate_with_one_more(tables, nearest.order, place)
    n_stages = sum(len(option.order) for option in orders) + 1
    return (before + longer, n_stages) if longer > 0.0 else (0.0, n_stages)
