"""The portfolio: every search in the order in which it pays, then an exact judgement of what they found.

A valid plan comes first. Replica columns give a good partition, HexGen-2's partition and HexGen's genetic search give
others, annealing polishes the best, and cuts are aligned where KV crosses links. It stops early where the bound is
reached. Few devices are then searched exhaustively, from what was found; of many, what the score cannot tell apart is
simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hexmesh.planner.algorithms import annealing, colocated, columns, exhaustive, genetic, greedy, hexgen2
from hexmesh.planner.align import align
from hexmesh.planner.finalists import choose_finalist
from hexmesh.planner.objective import Goodput, Throughput
from hexmesh.planner.run import Run
from hexmesh.score import fluid_bound

EXACT_DEVICES = 8
"""So many are searched exhaustively."""
CLOSE = 0.995
"""Of the bound: no search is worth more time."""
PARTITION_DEVICES = 128
"""HexGen-2's and HexGen's searches are worth their time up to so many."""
N_ALIGNED = 3


def search(run: Run) -> None:
    """The best of all searches."""
    if sum(pool.size for pool in run.problem.pools) <= EXACT_DEVICES:
        search_by_score(run)
        exhaustive.search(run)
    else:
        search_large(run)


def search_large(run: Run) -> None:
    """As for many devices, however few there are."""
    search_by_score(run)
    choose_finalist(run, seed=0)


def search_by_score(run: Run) -> None:
    """The same without simulations."""
    greedy.search(run)
    if run.current is not None:
        run.offer(run.current, "current")
    for one in _searches(run):
        if run.is_over or _is_close_to_bound(run):
            break
        one(run)
    for by, judged in sorted(run.best_by.items(), key=lambda item: item[1].worth, reverse=True)[:N_ALIGNED]:
        if not run.is_over:
            align(run, judged, by)


def _searches(run: Run) -> Iterator[Callable[[Run], None]]:
    n_devices = sum(pool.size for pool in run.problem.pools)
    yield columns.search
    if n_devices <= PARTITION_DEVICES:
        yield hexgen2.search_widely
        yield genetic.search
        yield colocated.search
    yield annealing.search


def _is_close_to_bound(run: Run) -> bool:
    if run.best is None or not isinstance(run.problem.objective, Throughput | Goodput):
        return False
    return run.best.flow.requests_per_s >= CLOSE * fluid_bound(run.problem.cluster, run.problem.capacities)
