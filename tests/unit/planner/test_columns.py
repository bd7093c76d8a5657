"""Replica columns: against exhaustive search and brute force on small fleets, by certificate on large ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Fabric, Link, Nic, Node, Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.planner.algorithms.columns import Listed
from hexmesh.planner.bounds import bound_for
from hexmesh.planner.front import Found, search
from hexmesh.planner.host_classes import host_classes
from hexmesh.planner.objective import Latency, LeastCost, Objective, Throughput
from hexmesh.planner.pools import ROLES, Team
from hexmesh.planner.problem import Draft, Problem, takes_too_much
from hexmesh.planner.roles import best_roles, by_ratio, layouts_of
from hexmesh.planner.run import Run
from hexmesh.score.places import spans_of
from hexmesh.workload import Workload
from tests.unit.planner import small_fleets

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
STRICT: frozenset[Role] = frozenset({"prefill", "decode"})
N_LAYERS = 8


def _search(problem: Problem, algorithm: str = "columns") -> Found:
    return search(problem, algorithm, seed=1, clock=itertools.count().__next__, budget_s=float("inf"))


def _rate(found: Found) -> float:
    return 0.0 if found.best is None else found.best.flow.requests_per_s


def _hosts(
    n_hosts: int, n_devices: int, weights: float, nic_bytes_per_s: float, prices: Iterable[float] = ()
) -> Cluster:
    """Like hosts whose devices have room for that share of the model each."""
    weight_bytes = small_fleets.model(N_LAYERS).params_before()[-1] * 2
    nic = Nic(out_bytes_per_s=nic_bytes_per_s, in_bytes_per_s=nic_bytes_per_s)
    device = Device(
        index=0,
        kind="cuda",
        name="",
        budget_bytes=int(weights * weight_bytes),
        flops_per_s=1e14,
        bytes_per_s=1e12,
    )
    asked = itertools.chain(prices, itertools.repeat(1.0))
    nodes = tuple(
        Node(
            id=f"n{at}",
            name=f"n{at}",
            site="here",
            devices=tuple(replace(device, index=index) for index in range(n_devices)),
            nic=nic,
            fabric=Fabric(kind="any", bytes_per_s=2e11, step_s=1e-5),
            launch_s=1e-5,
            step_s=0.0,
            price_per_h=next(asked),
        )
        for at in range(n_hosts)
    )
    links = tuple(
        Link(
            src=a.id, dst=b.id, rtt_p50_s=1e-4, rtt_p95_s=1e-4, bytes_per_s=nic_bytes_per_s, lower_bound=False
        )
        for a, b in itertools.permutations(nodes, 2)
    )
    return Cluster(nodes=nodes, links=links)


def _with_every_role(problem: Problem, teams: list[Team]) -> Iterable[Draft]:
    options = [[None, *layouts_of(problem, team)] for team in teams]
    for chosen in itertools.product(*options):
        yield tuple(layout for layout in chosen if layout is not None)


@pytest.mark.parametrize("seed", range(8))
def test_roles_are_as_good_as_the_best_of_all_assignments(seed: int) -> None:
    rng = random.Random(seed)
    fleet = small_fleets.cluster(rng, rng.randint(3, 6), N_LAYERS, slow=seed % 2 == 0)
    problem = small_fleets.problem(fleet, N_LAYERS, roles=STRICT if seed % 4 == 3 else frozenset(ROLES))
    teams: list[Team] = [((at, pool.size),) for at, pool in enumerate(problem.pools)]
    best = max(problem.judge(draft).flow.requests_per_s for draft in _with_every_role(problem, teams))
    found = problem.judge(best_roles(problem, teams)).flow.requests_per_s
    assert found == pytest.approx(best, rel=1e-3)


def test_without_links_in_the_way_the_closed_form_finds_the_same_roles() -> None:
    problem = small_fleets.problem(_hosts(3, 4, 1.0, 1e12), N_LAYERS)
    teams: list[Team] = [((at, 4),) for at in range(3)]
    ratio, program = (
        problem.judge(draft) for draft in (by_ratio(problem, teams), best_roles(problem, teams))
    )
    assert ratio.flow.requests_per_s <= program.flow.requests_per_s * (1 + 1e-3)
    assert ratio.flow.requests_per_s >= 0.9 * program.flow.requests_per_s


def test_on_small_fleets_most_are_within_a_hundredth_of_the_exhaustive_optimum() -> None:
    shares = []
    for seed in range(12):
        rng = random.Random(seed)
        fleet = small_fleets.cluster(rng, rng.randint(2, 4), N_LAYERS)
        problem = small_fleets.problem(fleet, N_LAYERS)
        found, best = _rate(_search(problem)), _rate(_search(problem, "exhaustive"))
        assert found <= best * (1 + 1e-6)
        shares.append(found / best if best else 1.0)
    assert sum(share >= 0.99 for share in shares) >= 10
    assert min(shares) >= 0.9


def test_like_hosts_are_one_class_and_what_is_chosen_for_it_can_be_packed() -> None:
    problem = small_fleets.problem(_hosts(6, 4, 0.6, 1e9), N_LAYERS)
    assert [len(one.hosts) for one in host_classes(problem)] == [6]
    found = _search(problem)
    assert found.best is not None
    assert not takes_too_much(found.best.draft, problem.pools)
    assert 0.8 * found.bound_requests_per_s < _rate(found) <= found.bound_requests_per_s * (1 + 1e-9)


def test_slow_nics_and_strict_roles_are_answered_by_stripes() -> None:
    """24 GPUs at 10 Gbit/s: replicas of one host hand all KV over; side by side with the same cuts, none of it."""
    text = (FLEETS / "mixed-24-10g.toml").read_text(encoding="utf-8")
    problem = Problem(
        cluster=cluster_of(read_fleet(text), "float16"),
        spec=small_fleets.model(80),
        dtype="float16",
        workload=Workload(),
        objective=Throughput(),
        roles=STRICT,
    )
    run = Run(problem=problem, rng=random.Random(1), clock=itertools.count().__next__, budget_s=float("inf"))
    listed = Listed(problem=problem)
    listed.add_inside(run)
    apart = problem.judge(listed.draft(None)).flow.requests_per_s
    listed.add_striped(run)
    draft = listed.draft(None)
    beside = problem.judge(draft)
    assert not takes_too_much(draft, problem.pools)
    assert beside.flow.requests_per_s > 1.1 * apart
    spans = {f"r{at}": spans_of(problem.held(layout.parts)) for at, layout in enumerate(draft)}
    assert any(spans[p] == spans[d] and len(spans[p]) > 1 for p, d in beside.flow.flows)


def test_the_least_cost_hires_the_cheap_hosts_and_no_more_than_it_must() -> None:
    fleet = _hosts(4, 2, 1.0, 1e10, prices=(5.0, 1.0, 3.0, 9.0))
    alone = _rate(_search(small_fleets.problem(fleet, N_LAYERS))) / 4
    for n_hosts, price in ((1, 1.0), (2, 4.0), (3, 9.0)):
        problem = small_fleets.problem(fleet, N_LAYERS, objective=LeastCost(alone * (n_hosts - 0.2)))
        found = _search(problem)
        assert found.best is not None
        assert found.best.figures.price_per_h == pytest.approx(price)
        assert bound_for(problem) <= price * (1 + 1e-6)


def test_a_rate_that_no_plan_reaches_has_no_price() -> None:
    fleet = _hosts(2, 2, 1.0, 1e10)
    assert bound_for(small_fleets.problem(fleet, N_LAYERS, objective=LeastCost(1e9))) == float("inf")


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_is_quicker_or_cheaper_than_its_bound(seed: int) -> None:
    rng = random.Random(seed)
    fleet = small_fleets.cluster(rng, rng.randint(2, 4), N_LAYERS)
    rate = _rate(_search(small_fleets.problem(fleet, N_LAYERS), "greedy"))
    objectives: tuple[Objective, ...] = (LeastCost(max(rate, 1e-3) / 2), Latency(1e-9), Throughput())
    for objective in objectives:
        problem = small_fleets.problem(fleet, N_LAYERS, objective=objective)
        best = _search(problem, "exhaustive").best
        if best is None:
            continue
        bound, figures = bound_for(problem), best.figures
        if isinstance(objective, Throughput):
            assert figures.requests_per_s <= bound * (1 + 1e-6)
        elif isinstance(objective, Latency):
            assert 0 < bound <= figures.latency_s
        elif figures.requests_per_s >= objective.requests_per_s:
            assert 0 < bound <= figures.price_per_h * (1 + 1e-6)


def test_a_fleet_that_nothing_fits_has_no_columns() -> None:
    found = _search(small_fleets.problem(_hosts(2, 1, 0.1, 1e9), N_LAYERS))
    assert found.best is None
