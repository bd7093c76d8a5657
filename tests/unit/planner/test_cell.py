"""Bounds on plans whose layouts are chosen in part, against all the plans that they are of."""

from __future__ import annotations

import random
from itertools import product

import pytest

from hexmesh.cluster import Role
from hexmesh.planner.cell import Cell
from hexmesh.planner.every_layout import EveryLayout
from hexmesh.planner.handoff_caps import HandoffCaps
from hexmesh.planner.partitions import partitions, teams_within
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Judged, Problem
from hexmesh.score.plan_score import kv_layer_bytes
from tests.unit.planner.small_fleets import cluster, problem

STRICT = frozenset(ROLES) - {"mixed"}
MOST_PLANS = 80


def _cells(given: Problem, n_teams: int, roles: tuple[Role, ...]) -> list[Cell]:
    """Of every partition into so many teams, in such roles."""
    sizes, layouts = tuple(pool.size for pool in given.pools), EveryLayout(given)
    caps = HandoffCaps(given.cluster, kv_layer_bytes(given.capacities))
    teams = [team for team in teams_within(sizes) if layouts.of(team)]
    found = []
    for chosen in partitions(sizes, teams):
        by_role = [layouts.of(teams[at]) for at in chosen]
        if len(chosen) == n_teams and all(role in own for own, role in zip(by_role, roles, strict=True)):
            choices = [own[role] for own, role in zip(by_role, roles, strict=True)]
            pair_caps = {
                (p, d): caps.of(choices[p].placements[0], choices[d].placements[0])
                for p in range(n_teams)
                for d in range(n_teams)
                if p != d and roles[p] != "decode" and roles[d] != "prefill"
            }
            found.append(Cell(given, caps, choices, roles, pair_caps, []))
    return found


def _plans(given: Problem, cell: Cell, rng: random.Random) -> dict[tuple[int, ...], Judged]:
    """All of a cell, or some drawn ones of many."""
    every = list(product(*(range(len(choice.parts)) for choice in cell.choices)))
    chosen = every if len(every) <= MOST_PLANS else rng.sample(every, MOST_PLANS)
    drafts = {layouts: cell.draft(dict(enumerate(layouts))) for layouts in chosen}
    return {layouts: given.judge(draft) for layouts, draft in drafts.items() if draft is not None}


@pytest.mark.parametrize(
    "roles", [("prefill", "decode"), ("prefill", "decode", "decode"), ("mixed", "mixed")]
)
@pytest.mark.parametrize("seed", [103, 116, 122, 126])
def test_no_plan_is_above_the_bound_of_any_choice_that_it_completes(
    seed: int, roles: tuple[Role, ...]
) -> None:
    """At the prices of any other plan: fewest choices, most choices, and each team compared."""
    rng = random.Random(seed)
    given = problem(cluster(random.Random(seed), 5, 4, slow=True), 4)
    cells = _cells(given, len(roles), roles)
    n_plans = 0
    for cell in rng.sample(cells, min(4, len(cells))):
        plans = _plans(given, cell, rng)
        for priced in rng.sample(list(plans.values()), min(4, len(plans))):
            cell.prices.clear()
            cell.learn(priced)
            for layouts, judged in plans.items():
                order = rng.sample(range(len(roles)), len(roles))
                for n_chosen in range(len(roles)):
                    at = order[n_chosen]
                    chosen = {team: layouts[team] for team in order[:n_chosen]}
                    bounds = cell.lowered(cell.bounds(chosen, at), chosen, at, enough=0.0)
                    assert bounds[layouts[at]] >= judged.flow.requests_per_s * (1 - 1e-6)
                    n_plans += 1
    assert n_plans > 100


@pytest.mark.parametrize("seed", [103, 116, 122, 126])
def test_at_its_own_prices_a_plan_is_bounded_by_what_it_serves(seed: int) -> None:
    """However many partners share a wire."""
    rng = random.Random(seed)
    given = problem(cluster(random.Random(seed), 5, 4, slow=True), 4, roles=STRICT)
    n_shared = 0
    for cell in _cells(given, 3, ("prefill", "decode", "decode")):
        for layouts, judged in list(_plans(given, cell, rng).items())[:10]:
            if judged.flow.requests_per_s == 0:
                continue
            cell.prices.clear()
            cell.learn(judged)
            chosen = {0: layouts[0], 1: layouts[1]}
            by_caps = cell.bounds(chosen, 2)[layouts[2]]
            bound = cell.lowered(cell.bounds(chosen, 2), chosen, 2, enough=0.0)[layouts[2]]
            assert bound == pytest.approx(judged.flow.requests_per_s, rel=1e-5)
            n_shared += by_caps > 1.1 * bound
    assert n_shared > 0
