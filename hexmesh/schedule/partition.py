"""Which devices make which replicas: disjoint subsets of a few places with the greatest sum of rates, exactly.

What a replica gives depends on its own places alone, so the best sum over a set T of places is

    f[T] = max of f[T - t] and of rate(S) + f[T - S] over all subsets S of T that contain t, the first place of T

O(3^n). f is kept for each (replicas, stages), because among sums that are about equal more replicas win: one may
die without the others. Then fewer stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hexmesh.schedule.held_karp import SAME
from hexmesh.schedule.tables import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Disjoint subsets, each a replica."""

    subsets: tuple[int, ...]
    rate: float
    """Sum over the subsets."""
    best_rate: float
    """The greatest sum of all partitions."""
    rate_with: tuple[tuple[float, int], ...]
    """The greatest sum in which each place has a part (0: there is none), and how many stages that takes."""


def best_partition(rates: Seconds, tolerance: float) -> Partition | None:
    """The replicas to make, given every subset's rate (0: it holds no replica); None if there is no replica.

    A sum counts as good if it is at most the fraction `tolerance` below the best.
    """
    if not rates.any():
        return None
    sums = _Sums(rates)
    whole = len(rates) - 1
    best = float(sums.table[whole].max())
    good = np.argwhere(sums.table[whole] >= best * (1.0 - max(tolerance, SAME)))
    n_replicas, n_stages = min(good.tolist(), key=lambda state: (-state[0], state[1]))
    return Partition(
        subsets=tuple(sums.walk_back(whole, n_replicas, n_stages)),
        rate=float(sums.table[whole][n_replicas, n_stages]),
        best_rate=best,
        rate_with=tuple(sums.with_place(place) for place in range(whole.bit_length())),
    )


class _Sums:
    """f of the module's text. `table[T][r, s]`: the best sum of r replicas with s stages in all, inside T."""

    def __init__(self, rates: Seconds) -> None:
        n = (len(rates) - 1).bit_length()
        self._rates = rates
        self._wanted = _undominated(rates)
        self.table = np.full((len(rates), n + 1, n + 1), -np.inf)
        self.table[0, 0, 0] = 0.0
        for whole in range(1, len(rates)):
            best = self.table[whole]
            best[:] = self.table[whole & (whole - 1)]
            for subset in self._choices(whole):
                n_stages = subset.bit_count()
                added = self.table[whole ^ subset][:-1, : n + 1 - n_stages] + rates[subset]
                np.maximum(best[1:, n_stages:], added, out=best[1:, n_stages:])

    def walk_back(self, whole: int, n_replicas: int, n_stages: int) -> Iterator[int]:
        """The subsets that give table[whole][n_replicas, n_stages]."""
        while n_replicas:
            wanted = self.table[whole][n_replicas, n_stages]
            subset = next(
                (
                    subset
                    for subset in self._choices(whole)
                    if subset.bit_count() <= n_stages
                    and self.table[whole ^ subset][n_replicas - 1, n_stages - subset.bit_count()]
                    + self._rates[subset]
                    == wanted
                ),
                None,
            )
            if subset is None:
                whole &= whole - 1  # its first place has no part
                continue
            yield subset
            whole, n_replicas, n_stages = whole ^ subset, n_replicas - 1, n_stages - subset.bit_count()

    def with_place(self, place: int) -> tuple[float, int]:
        whole = len(self._rates) - 1
        options = [(0.0, 0)]
        for subset in range(1, whole + 1):
            if subset >> place & 1 and self._rates[subset] > 0.0:
                rest = self.table[whole ^ subset]
                at = int(rest.argmax())
                total = float(rest.flat[at] + self._rates[subset])
                options.append((total, -(subset.bit_count() + at % rest.shape[1])))
        rate, fewer = max(options)
        return rate, -fewer

    def _choices(self, whole: int) -> Iterator[int]:
        """The subsets of `whole` with its first place that are worth a look."""
        first = whole & -whole
        rest = whole ^ first
        part = 0
        while True:
            if self._wanted[first | part]:
                yield first | part
            if part == rest:
                return
            part = (part - rest) & rest


def _undominated(rates: Seconds) -> list[bool]:
    """Subsets that are faster than every subset of theirs: others could do without one of their places."""
    best_inside = [0.0] * len(rates)
    wanted = [False] * len(rates)
    for subset in range(1, len(rates)):
        places = subset
        while places:
            place = places & -places
            best_inside[subset] = max(best_inside[subset], best_inside[subset ^ place])
            places ^= place
        if rates[subset] > best_inside[subset]:
            wanted[subset] = True
            best_inside[subset] = float(rates[subset])
    return wanted
