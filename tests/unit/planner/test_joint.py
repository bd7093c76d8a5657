"""The P-D paper's joint optimiser against all numbers of instances."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import msgspec
import pytest

from hexmesh.planner.algorithms import joint
from hexmesh.planner.algorithms.joint import Filling, Kind, Strategy, fillings, kinds_of, strategies
from hexmesh.planner.finish import finish
from hexmesh.planner.objective import LeastCost
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.schedule.check import check_plan
from hexmesh.workload import Slo
from tests.unit.planner.small_fleets import cluster, other_objective, problem


def _searched(given: Problem) -> Run:
    run = Run(problem=given, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)
    joint.search(run)
    return run


def _fast_wires(given: Problem) -> Problem:
    fleet = given.cluster
    nodes = tuple(msgspec.structs.replace(node, nic=None, site="east") for node in fleet.nodes)
    links = tuple(msgspec.structs.replace(link, bytes_per_s=1e15, rtt_p50_s=1e-6) for link in fleet.links)
    fleet = msgspec.structs.replace(fleet, nodes=nodes, links=links, site_links=())
    return replace(given, cluster=fleet)


def _every_way(kinds: Sequence[Kind], given: Problem) -> Iterator[tuple[Filling, ...]]:
    """Each place filled in every way, or left empty."""
    ways = list[list[Filling]]()
    for at, kind in enumerate(kinds):
        own = list(fillings(at, kind, strategies(given, kind)))
        ways += [[*own, Filling(at, ())] for _ in kind.places]
    yield from product(*ways)


def _price(kinds: Sequence[Kind], chosen: Sequence[Filling]) -> float:
    return sum(kinds[filling.kind].price_per_h for filling in chosen if filling.instances)


def _rate(chosen: Sequence[Filling]) -> float:
    return min(sum(filling.rate(role) for filling in chosen) for role in joint.PHASES)


@pytest.mark.parametrize("seed", range(20))
def test_numbers_of_instances_are_the_best_of_all(seed: int) -> None:
    given = _fast_wires(problem(cluster(random.Random(seed), 4, 6), 6, slo=Slo(ttft_s=0.5, tpot_s=0.05)))
    kinds = kinds_of(given)
    every = list(_every_way(kinds, given))
    most = max(map(_rate, every))
    best = _searched(given).best
    assert (0.0 if best is None else best.flow.requests_per_s) == pytest.approx(most, rel=1e-6)
    if best is None:
        return
    wanted = 0.5 * most
    cheapest = min(_price(kinds, chosen) for chosen in every if _rate(chosen) >= wanted)
    found = _searched(other_objective(given, LeastCost(wanted))).best
    assert found is not None
    assert found.flow.requests_per_s >= wanted * (1 - 1e-6)
    chosen = joint.cheapest(
        kinds,
        [one for at, kind in enumerate(kinds) for one in fillings(at, kind, strategies(given, kind))],
        wanted,
    )
    assert chosen is not None
    assert _price(kinds, chosen) == pytest.approx(cheapest)


@pytest.mark.parametrize("seed", range(12))
def test_strategies_keep_memory_and_limits(seed: int) -> None:
    """Tighter limits leave no strategy that the wider ones do not have."""
    fleet = cluster(random.Random(seed), 6, 6)
    wide, tight = (
        problem(fleet, 6, slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s))
        for ttft_s, tpot_s in ((1.0, 0.1), (0.05, 0.01))
    )
    for kind in kinds_of(wide):
        allowed = {(one.role, one.n_devices): one.requests_per_s for one in strategies(wide, kind)}
        for one in strategies(tight, kind):
            assert one.requests_per_s <= allowed[one.role, one.n_devices] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_the_draft_is_a_sound_plan_without_mixed_replicas(seed: int) -> None:
    given = problem(cluster(random.Random(seed), 6, 6), 6)
    best = _searched(given).best
    if best is None:
        pytest.skip("no instance fits")
    assert {layout.role for layout in best.draft} == {"prefill", "decode"}
    plan = finish(
        given,
        best,
        model_id="m",
        model_name="m",
        max_model_tokens=1024,
        hosts={node.id: 1 for node in given.cluster.nodes},
    )
    assert check_plan(plan, given.cluster, given.spec, given.workload) == []


def test_a_place_is_filled_in_every_way_once() -> None:
    kind = Kind(places=((0,), (1,)), n_devices=3, price_per_h=1.0)
    one, two = Strategy("prefill", 1, 1, 5.0), Strategy("decode", 2, 1, 4.0)
    assert [filling.instances for filling in fillings(0, kind, [one, two])] == [
        (one,),
        (one, one),
        (one, one, one),
        (one, two),
        (two,),
    ]


def test_a_rate_out_of_reach_is_said() -> None:
    run = _searched(other_objective(problem(cluster(random.Random(3), 4, 6), 6), LeastCost(1e6)))
    assert run.notes == ["joint: 1e+06 requests/s are out of reach, planned for the most there is"]
