"""The front door: every search is asked for in the same way and answers in the same way, with a bound beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hexmesh.errors import InvalidInput
from hexmesh.planner.algorithms import (
    alone,
    annealing,
    auto,
    colocated,
    columns,
    distserve,
    exhaustive,
    genetic,
    greedy,
    helix,
    hexgen2,
    joint,
    petals,
    uniform,
)
from hexmesh.planner.bounds import bound_for
from hexmesh.planner.naming import named_by_use
from hexmesh.planner.objective import Goodput, Latency, LeastCost, Throughput
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.run import Run, Step

Search = Callable[[Run], None]
"""Offers drafts to the run until it has no better ones or the time is over."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    algorithm: str
    best: Judged | None
    """None: nothing that fits was found."""
    bound_requests_per_s: float
    """No plan of any kind serves more, by this score."""
    bound: float
    """No plan does better in what the objective is about: requests per second, price per hour or seconds."""
    gap: float
    """How far the best draft is from that bound, as a share of the greater of the two; 0 is optimal."""
    trace: tuple[Step, ...]
    notes: tuple[str, ...]
    elapsed_s: float
    n_judged: int
    was_cut_off: bool
    """Whether time ended the search before it was done."""


def search(
    problem: Problem,
    algorithm: str = "auto",
    *,
    seed: int,
    clock: Callable[[], float],
    budget_s: float = 60.0,
    current: Draft | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Found:
    """The best draft that an algorithm finds. Raises InvalidInput for a name that is none.

    The same seed gives the same draft, unless time cut the search off.
    """
    run = Run(
        problem=problem,
        rng=random.Random(seed),
        clock=clock,
        budget_s=budget_s,
        current=current,
        on_step=on_step,
    )
    asked = _named(algorithm)
    if problem.pools:
        asked(run)
    best = None if run.best is None else named_by_use(problem, run.best)
    bound = bound_for(problem)
    return Found(
        algorithm=algorithm,
        best=best,
        bound_requests_per_s=_most_served(problem),
        bound=bound,
        gap=_gap(problem, best, bound),
        trace=tuple(run.trace),
        notes=tuple(run.notes),
        elapsed_s=run.elapsed_s,
        n_judged=run.n_judged,
        was_cut_off=run.is_over,
    )


ALGORITHMS: Mapping[str, Search] = {
    "auto": auto.search,
    "exhaustive": exhaustive.search,
    "columns": columns.search,
    "annealing": annealing.search,
    "genetic": genetic.search,
    "alone": alone.search,
    "joint": joint.search,
    "hexgen2": hexgen2.search,
    "hexgen2-wide": hexgen2.search_widely,
    "uniform": uniform.search,
    "distserve": distserve.search,
    "petals": petals.search,
    "helix": helix.search,
    "colocated": colocated.search,
    "greedy": greedy.search,
}
"""All searches by name, the portfolio first."""


def _most_served(problem: Problem) -> float:
    is_objective = isinstance(problem.objective, Throughput | Goodput)
    return problem.near_bound_requests_per_s if is_objective else problem.bound_requests_per_s


def _gap(problem: Problem, best: Judged | None, bound: float) -> float:
    if best is None:
        return 1.0
    match problem.objective:
        case LeastCost():
            here, there = bound, best.figures.price_per_h
        case Latency():
            here, there = bound, best.figures.latency_s
        case Throughput() | Goodput():
            here, there = best.figures.requests_per_s, bound
    return max(0.0, 1.0 - here / there) if there > 0 else 0.0


def _named(algorithm: str) -> Search:
    if algorithm not in ALGORITHMS:
        raise InvalidInput(
            f"no algorithm is called {algorithm!r}", next_step=f"choose one of {', '.join(ALGORITHMS)}"
        )
    return ALGORITHMS[algorithm]
