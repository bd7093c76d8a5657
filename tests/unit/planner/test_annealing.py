"""Annealing improves on what it is given, reaches the optimum of small fleets, and keeps to roles and objectives."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import pytest

from hexmesh.planner.algorithms import annealing, exhaustive, genetic
from hexmesh.planner.finish import finish
from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Draft, Judged, Problem, takes_too_much
from hexmesh.planner.run import Run
from hexmesh.schedule.check import check_plan
from hexmesh.workload import Slo
from tests.unit.planner.small_fleets import cluster, problem

STRICT = frozenset(ROLES) - {"mixed"}
N_LAYERS = 6


def _run(given: Problem, seed: int = 0, current: Draft | None = None) -> Run:
    return Run(problem=given, rng=random.Random(seed), clock=lambda: 0.0, budget_s=1.0, current=current)


def _annealed(given: Problem, seed: int = 0, current: Draft | None = None) -> Judged | None:
    run = _run(given, seed, current)
    annealing.search(run)
    return run.best


def _case(seed: int, n_devices: int = 5) -> Problem:
    fleet = cluster(random.Random(seed), n_devices, N_LAYERS, slow=seed % 2 == 1)
    if seed % 3 == 0:
        return problem(fleet, N_LAYERS)
    if seed % 3 == 1:
        return problem(fleet, N_LAYERS, roles=STRICT)
    return problem(fleet, N_LAYERS, slo=Slo(tpot_s=0.0015 * N_LAYERS, ttft_s=0.5))


def _rate(judged: Judged | None) -> float:
    return 0.0 if judged is None else judged.flow.requests_per_s


def test_most_small_fleets_get_their_best_plan() -> None:
    ratios = list[float]()
    for seed in range(12):
        run = _run(_case(seed))
        exhaustive.search(run)
        if run.best is not None:
            ratios.append(_rate(_annealed(_case(seed))) / _rate(run.best))
    assert len(ratios) >= 8
    assert sum(ratio > 0.99 for ratio in ratios) >= len(ratios) - 1


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_plan_for_a_rate_is_found(seed: int) -> None:
    free = _case(3 * seed, 6)
    rate = 0.4 * _rate(_annealed(free))
    given = replace(free, objective=LeastCost(rate))
    run = _run(given)
    exhaustive.search(run)
    found = _annealed(given)
    assert found is not None
    assert run.best is not None
    assert found.worth[:2] == pytest.approx(run.best.worth[:2], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_single_request_is_served_about_as_soon_as_it_can_be(seed: int) -> None:
    given = replace(_case(3 * seed, 4), objective=Latency(1e-9))
    run = _run(given)
    exhaustive.search(run)
    found = _annealed(given)
    assert found is not None
    assert run.best is not None
    # Layouts between the quickest and the highest rate, which exhaustive search has, may be a little better.
    assert found.figures.latency_s <= 1.1 * run.best.figures.latency_s


def test_the_same_seed_gives_the_same_draft() -> None:
    first, again = _annealed(_case(0, 6), 7), _annealed(_case(0, 6), 7)
    assert first is not None
    assert again is not None
    assert first.draft == again.draft


def test_what_serves_now_is_never_made_worse() -> None:
    given = _case(1, 6)
    run = _run(given)
    exhaustive.search(run)
    assert run.best is not None
    found = _annealed(given, current=run.best.draft)
    assert found is not None
    assert found.worth >= run.best.worth


def test_hosts_do_only_what_they_may() -> None:
    """One host only prefills, and no replica may be mixed."""
    given = _case(10, 6)
    first, *others = given.cluster.nodes
    nodes = (msgspec.structs.replace(first, roles=("prefill",)), *others)
    given = replace(given, cluster=msgspec.structs.replace(given.cluster, nodes=nodes))
    found = _annealed(given)
    assert found is not None
    assert not takes_too_much(found.draft, given.pools)
    roles = {(given.pools[part.pool].node.id, layout.role) for layout in found.draft for part in layout.parts}
    assert {role for _, role in roles} == {"prefill", "decode"}
    assert {role for node, role in roles if node == first.id} <= {"prefill"}


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_certified(seed: int) -> None:
    given = _case(seed, 7)
    found = _annealed(given)
    assert found is not None
    plan = finish(
        given,
        found,
        model_id="m",
        model_name="m",
        max_model_tokens=512,
        hosts={node.id: 1 for node in given.cluster.nodes},
    )
    assert check_plan(plan, given.cluster, given.spec, given.workload) == []


def test_time_cuts_off_and_says_so() -> None:
    """The clock stands at the end of the budget from the second look on."""
    times = iter([0.0])
    run = Run(
        problem=_case(0, 6),
        rng=random.Random(0),
        clock=lambda: next(times, 2.0),
        budget_s=1.0,
    )
    annealing.search(run)
    assert run.best is not None
    assert run.notes == ["annealing was cut off by time"]


def test_genetic_plans_are_mixed_and_reproducible() -> None:
    given = _case(0, 6)
    runs = [_run(given, 3) for _ in range(2)]
    for run in runs:
        genetic.search(run)
    first, again = (run.best for run in runs)
    assert first is not None
    assert again is not None
    assert first.draft == again.draft
    assert {layout.role for layout in first.draft} == {"mixed"}


def test_genetic_says_that_it_needs_mixed_replicas() -> None:
    run = _run(_case(1))
    genetic.search(run)
    assert run.best is None
    assert "without the role mixed" in run.notes[0]
