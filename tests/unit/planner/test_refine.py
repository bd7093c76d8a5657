"""Drafts a change away, laid out together, beside exhaustive search on clusters with slow links."""

from __future__ import annotations

import random

import pytest

from hexmesh.planner.algorithms import auto, exhaustive
from hexmesh.planner.objective import Latency
from hexmesh.planner.pools import ROLES, team_of
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.planner.refine import MOST_REPLICAS, Refiner
from hexmesh.planner.run import Run
from tests.unit.planner.small_fleets import cluster, other_objective, problem

STRICT = frozenset(ROLES) - {"mixed"}


def _case(seed: int) -> Problem:
    fleet = cluster(random.Random(seed), 6, 6, slow=True)
    return problem(fleet, 6, roles=STRICT)


def _run(given: Problem) -> Run:
    return Run(problem=given, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)


def _exact(given: Problem) -> Judged:
    run = _run(given)
    exhaustive.search(run)
    assert run.best is not None
    return run.best


def _each_by_itself(given: Problem, draft: Draft) -> Draft:
    """The same teams and roles with the layouts that are best alone."""
    found = (given.layouts.best(team_of(layout.parts), layout.role) for layout in draft)
    return tuple(layout for layout in found if layout is not None)


@pytest.mark.parametrize("seed", [821, 827, 835, 839])
def test_layouts_of_a_draft_are_chosen_together(seed: int) -> None:
    given = _case(seed)
    best = _exact(given)
    apart = given.judge(_each_by_itself(given, best.draft))
    assert apart.flow.requests_per_s < 0.99 * best.flow.requests_per_s
    run = _run(given)
    Refiner(run).refine(apart)
    assert run.best is not None
    assert run.best.flow.requests_per_s >= best.flow.requests_per_s * (1 - 2e-4)


@pytest.mark.parametrize("seed", [722, 724, 727, 732])
def test_teams_that_only_fitting_cuts_make_good_are_found(seed: int) -> None:
    """By the way that large fleets are planned: searches that take each team's own best layout miss them."""
    given, run = _case(seed), _run(_case(seed))
    auto.search_by_score(run)
    assert run.best is not None
    assert run.best.flow.requests_per_s >= 0.99 * _exact(given).flow.requests_per_s


def test_the_same_seed_refines_to_the_same_draft() -> None:
    given = _case(722)
    start = given.judge(_each_by_itself(given, _exact(given).draft))
    runs = [_run(_case(722)) for _ in range(2)]
    for run in runs:
        Refiner(run).refine(start)
    assert runs[0].best is not None
    assert runs[1].best is not None
    assert runs[0].best.draft == runs[1].best.draft
    assert runs[0].n_judged == runs[1].n_judged


def test_drafts_of_many_replicas_and_least_latency_are_left_as_they_are() -> None:
    given = _case(722)
    best = _exact(given)
    many = given.judge(best.draft * MOST_REPLICAS)
    quick = other_objective(given, Latency(1e-9))
    for one, judged in ((given, many), (quick, quick.judge(best.draft))):
        run = _run(one)
        Refiner(run).refine(judged)
        assert run.n_judged == 0
