"""Exact for few devices whose hosts hand nothing over: which of them make which replicas, each serving its own prompts.

Then a replica's rate depends on its own devices alone, so the best sum over a vector T of devices, counted by pool, is

    f[T] = max of f[T - one of the first pool] and of rate(S) + f[T - S] over all S within T that take of that pool

with the exact rates of `Layouts`. It is what a small mesh plans with each time that it changes, so it must be quick:
exhaustive search, which also weighs roles and handoffs, takes a hundred times as long.
After Rothkopf, Pekec and Harstad (1998), who find the best disjoint subsets in O(3^n); differs: like devices are
counted.
"""

from __future__ import annotations

from functools import cache
from itertools import product

from hexmesh.planner.layouts import Layout
from hexmesh.planner.partitions import Counts, n_teams_within
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run

MOST_TEAMS = 300


def suits(problem: Problem) -> bool:
    """Whether this search is exact for the problem, and quick."""
    sizes = tuple(pool.size for pool in problem.pools)
    return not problem.hands_over and "mixed" in problem.roles and n_teams_within(sizes) <= MOST_TEAMS


def search(run: Run) -> None:
    """Offers the best draft."""
    if not suits(run.problem):
        run.notes.append("alone: for few devices whose hosts hand nothing over")
        return
    draft = _best(run.problem)
    if draft:
        run.offer(draft, "alone")


def _best(problem: Problem) -> Draft:
    @cache
    def layout(counts: Counts) -> Layout | None:
        team = tuple((pool, count) for pool, count in enumerate(counts) if count)
        return problem.layouts.best(team, "mixed") if problem.may_be(team, "mixed") else None

    @cache
    def best(counts: Counts) -> tuple[float, Draft]:
        first = next((pool for pool, count in enumerate(counts) if count), None)
        if first is None:
            return 0.0, ()
        found: tuple[float, Draft] = 0.0, ()
        for taken in product(*(range(count, -1, -1) for count in counts)):
            one = layout(taken) if taken[first] else None
            if one is not None:
                rate, others = best(tuple(n - m for n, m in zip(counts, taken, strict=True)))
                if one.requests_per_s + rate > found[0] * (1 + 1e-12):
                    found = one.requests_per_s + rate, (one, *others)
        without = best(tuple(count - (pool == first) for pool, count in enumerate(counts)))
        return without if without[0] > found[0] * (1 + 1e-12) else found

    return best(tuple(pool.size for pool in problem.pools))[1]
