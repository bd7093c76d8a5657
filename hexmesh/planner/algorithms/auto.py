"""The portfolio: every search in the order in which it pays, then an exact judgement of what they found.

A valid plan comes first. Replica columns give a good partition, HexGen-2's partition and HexGen's genetic search give
others, annealing polishes the best, cuts are aligned where KV crosses links, and plans of few replicas are refined with
all their layouts chosen together. It stops early where the bound is reached. Few devices are then searched
exhaustively, from what was found; of many, what the score cannot tell apart is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hexmesh.planner.algorithms import annealing, colocated, columns, exhaustive, genetic, greedy, hexgen2
from hexmesh.planner.align import align
from hexmesh.planner.finalists import choose_finalist
from hexmesh.planner.objective import Goodput, Throughput
from hexmesh.planner.problem import Judged
from hexmesh.planner.refine import Refiner
from hexmesh.planner.run import Run

EXACT_DEVICES = 8
"""So many are searched exhaustively."""
CLOSE = 0.995
"""Of the bound: no search is worth more time."""
PARTITION_DEVICES = 128
"""HexGen-2's and HexGen's searches are worth their time up to so many."""
N_ALIGNED = 3
"""Drafts, each of another search, whose cuts are aligned; and that are refined."""
SEARCHED, ALIGNED = 0.55, 0.6
"""Of the time, for searching, and for aligning and refining; the rest is for simulations."""
COLUMNS, SLICE = 0.25, 0.08
"""Of the time, for the first search and for each that only gives annealing other starts."""


def search(run: Run) -> None:
    """The best of all searches."""
    search_by_score(run)
    conclude(run)


def conclude(run: Run) -> None:
    """Few devices are searched exhaustively; of drafts for many the simulator chooses."""
    if sum(pool.size for pool in run.problem.pools) <= EXACT_DEVICES:
        exhaustive.search(run)
    else:
        choose_finalist(run, seed=0)


def search_by_score(run: Run) -> None:
    """As for many devices, however few there are."""
    greedy.search(run)
    if run.current is not None:
        run.offer(run.current, "current")
    for one, share in _searches(run):
        with run.slice(share=share, until=SEARCHED):
            if run.is_over or _is_close_to_bound(run):
                break
            one(run)
    with run.slice(until=ALIGNED):
        _refine(run)


def _refine(run: Run) -> None:
    """The best drafts of several searches with other layouts, of other cuts and of other teams near by."""
    refiner = Refiner(run)
    for by, judged in _best(run, N_ALIGNED):
        if not run.is_over and not _is_close_to_bound(run):
            refiner.refine(align(run, judged, by))
    for by, judged in _best(run, 1):
        if not run.is_over:
            align(run, judged, by)


def _searches(run: Run) -> Iterator[tuple[Callable[[Run], None], float]]:
    """In order, with the share of the time that each may take."""
    n_devices = sum(pool.size for pool in run.problem.pools)
    yield columns.search, COLUMNS
    if n_devices <= PARTITION_DEVICES:
        yield hexgen2.search_widely, SLICE
        yield colocated.search, SLICE
        yield genetic.search, SLICE
    yield annealing.search, 1.0


def _best(run: Run, n: int) -> list[tuple[str, Judged]]:
    return sorted(run.best_by.items(), key=lambda item: item[1].worth, reverse=True)[:n]


def _is_close_to_bound(run: Run) -> bool:
    if run.best is None or not isinstance(run.problem.objective, Throughput | Goodput):
        return False
    return run.best.flow.requests_per_s >= CLOSE * run.problem.bound_requests_per_s
