"""Aligned cuts against those that exhaustive search finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hexmesh.planner.algorithms import exhaustive
from hexmesh.planner.align import align
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import ROLES, team_of
from hexmesh.planner.problem import Judged, Problem, takes_too_much
from hexmesh.planner.run import Run
from tests.unit.planner.small_fleets import cluster, problem

STRICT = frozenset(ROLES) - {"mixed"}


def _run(given: Problem, clock: Callable[[], float] = lambda: 0.0) -> Run:
    return Run(problem=given, rng=random.Random(0), clock=clock, budget_s=1.0)


def _cases() -> list[tuple[Problem, Judged, Judged]]:
    """Slow links: the best plan, and the same replicas with each one's own fastest layout."""
    found = []
    for seed in range(40):
        fleet = cluster(random.Random(seed), 4, 6, slow=True)
        given = problem(fleet, 6, roles=STRICT)
        run = _run(given)
        exhaustive.search(run)
        if run.best is not None and len(fleet.nodes) > 1:
            alone = [given.layouts.best(team_of(layout.parts), layout.role) for layout in run.best.draft]
            layouts = tuple(layout for layout in alone if isinstance(layout, Layout))
            found.append((given, run.best, given.judge(layouts)))
    return found


@pytest.fixture(scope="module")
def cases() -> list[tuple[Problem, Judged, Judged]]:
    return _cases()


def test_it_finds_most_of_what_layouts_alone_lose(cases: list[tuple[Problem, Judged, Judged]]) -> None:
    lost, left = 0, 0
    for given, best, start in cases:
        aligned = align(_run(given), start, "align")
        assert aligned.worth >= start.worth
        assert aligned.flow.requests_per_s <= best.flow.requests_per_s * (1 + 2e-6)
        assert not takes_too_much(aligned.draft, given.pools)
        lost += start.flow.requests_per_s < 0.99 * best.flow.requests_per_s
        left += aligned.flow.requests_per_s < 0.99 * best.flow.requests_per_s
    assert lost >= 6
    assert left <= lost / 4


def test_it_offers_what_is_better_and_nothing_else(cases: list[tuple[Problem, Judged, Judged]]) -> None:
    for given, best, start in cases:
        run = _run(given)
        aligned = align(run, start, "align")
        assert (run.best is aligned) == (aligned.worth > start.worth)
        again = _run(given)
        assert align(again, best, "align") is best
        assert again.best is None


def test_it_ends_when_the_time_is_over(cases: list[tuple[Problem, Judged, Judged]]) -> None:
    given, _, start = cases[0]
    run = _run(given, clock=iter([0.0, *[2.0] * 1000]).__next__)
    assert align(run, start, "align") is start
