"""The way from a problem to a plan: judging, searching, the portfolio's promises, the finished plan."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from msgspec.structs import replace

from hexmesh.cluster import Role
from hexmesh.errors import InvalidInput
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import known_config
from hexmesh.planner.algorithms import auto
from hexmesh.planner.finish import finish
from hexmesh.planner.front import ALGORITHMS, Found, search
from hexmesh.planner.naming import named_by_use
from hexmesh.planner.objective import Goodput, Latency, LeastCost, Throughput, objective_named
from hexmesh.planner.pools import ROLES, team_of
from hexmesh.planner.problem import Problem, takes_too_much
from hexmesh.planner.run import Run
from hexmesh.schedule.check import check_plan
from hexmesh.workload import ConstantLengths, PoissonArrivals, Slo, Workload
from tests.unit.planner import small_fleets

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"


def _problem(name: str, *, model: str = "Llama-2-70B", **changes: object) -> Problem:
    spec = model_spec_from_config(known_config(model))
    cluster = cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text()), "float16")
    facts = {"workload": Workload(), "objective": Throughput(), **changes}
    return Problem(cluster=cluster, spec=spec, dtype="float16", **facts)  # type: ignore[arg-type]


def _search(problem: Problem, algorithm: str = "auto", seed: int = 1) -> Found:
    return search(problem, algorithm, seed=seed, clock=itertools.count().__next__, budget_s=float("inf"))


def test_a_plan_of_every_fleet_can_be_finished_and_certified_at_once() -> None:
    for name in ("hexgen2-5", "mixed-24", "helix-24", "hexgen-58", "mixed-320"):
        problem = _problem(name)
        found = _search(problem, "greedy")
        assert found.best is not None, name
        assert 0.0 <= found.gap < 1.0
        plan = finish(
            problem,
            found.best,
            model_id="m",
            model_name="m",
            max_model_tokens=4096,
            hosts={node.id: 1 for node in problem.cluster.nodes},
        )
        assert check_plan(plan, problem.cluster, problem.spec, problem.workload) == []
        assert sum(flow.share for flow in plan.flows) == pytest.approx(1.0)
        n_used = sum(len(stage.devices) for replica in plan.replicas for stage in replica.stages)
        assert n_used + len(plan.unused) == sum(len(node.devices) for node in problem.cluster.nodes)


def test_replicas_without_requests_are_left_out_and_their_devices_are_unused() -> None:
    problem = _problem("hexgen2-h100")
    prompts, outputs = (problem.layouts.best(((0, 4),), role) for role in ("prefill", "decode"))
    assert prompts is not None
    assert outputs is not None
    alone = problem.judge((prompts,))
    assert alone.flow.requests_per_s == 0
    judged = problem.judge((prompts, outputs))
    plan = finish(problem, judged, model_id="", model_name="", max_model_tokens=100, hosts={"h100": 1})
    assert [(replica.id, replica.role) for replica in plan.replicas] == [("r0", "prefill"), ("r1", "decode")]
    assert [(flow.src, flow.dst, flow.share) for flow in plan.flows] == [("r0", "r1", pytest.approx(1.0))]


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS.keys() - {"alone"}))
def test_every_algorithm_gives_a_certified_plan_twice_the_same_and_never_above_the_bound(
    algorithm: str,
) -> None:
    rng = random.Random(4)
    cluster = small_fleets.cluster(rng, 5, 6)
    problem = Problem(
        cluster=cluster,
        spec=small_fleets.model(6),
        dtype="float16",
        workload=Workload(),
        objective=Throughput(),
    )
    found, again = _search(problem, algorithm), _search(problem, algorithm)
    assert found.best is not None
    assert again.best is not None
    assert found.best.draft == again.best.draft
    assert found.best.flow.requests_per_s <= found.bound_requests_per_s * (1 + 1e-9)
    assert not takes_too_much(found.best.draft, problem.pools)
    plan = finish(
        problem,
        found.best,
        model_id="",
        model_name="",
        max_model_tokens=4096,
        hosts={node.id: 1 for node in cluster.nodes},
    )
    assert check_plan(plan, cluster, problem.spec, problem.workload) == []


@pytest.mark.parametrize("seed", range(8))
def test_the_portfolio_is_as_good_as_every_search_of_its_own_on_few_devices(seed: int) -> None:
    rng = random.Random(seed)
    problem = Problem(
        cluster=small_fleets.cluster(rng, rng.randint(2, 5), 6, slow=seed % 2 == 1),
        spec=small_fleets.model(6),
        dtype="float16",
        workload=Workload(),
        objective=Throughput(),
    )
    best = _search(problem).best
    others = {name: _search(problem, name).best for name in ALGORITHMS if name != "auto"}
    for name, other in others.items():
        if other is not None:
            assert best is not None, name
            assert best.worth[0] >= other.worth[0] * (1 - 1e-9), name


def test_a_search_out_of_time_keeps_what_it_has_and_says_so() -> None:
    clock = itertools.chain([0.0] * 8, itertools.repeat(100.0)).__next__
    found = search(_problem("mixed-24"), seed=0, clock=clock, budget_s=10.0)
    assert found.best is not None
    assert found.was_cut_off


def test_what_serves_now_is_where_a_search_begins() -> None:
    problem = _problem("hexgen2-1")
    layout = problem.layouts.best(problem.whole, "mixed")
    assert layout is not None
    run = Run(problem=problem, rng=random.Random(0), clock=lambda: 0.0, budget_s=0.0, current=(layout,))
    auto.search(run)
    assert run.best_by["current"].draft == (layout,)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize("roles", [frozenset(ROLES), frozenset({"mixed"}), frozenset({"prefill", "decode"})])
@pytest.mark.parametrize("budget_bytes", [None, 10**6])
def test_where_nothing_fits_or_there_is_nothing_no_search_finds_or_breaks_anything(
    algorithm: str, roles: frozenset[Role], budget_bytes: int | None
) -> None:
    cluster = small_fleets.cluster(random.Random(3), 3, 6)
    nodes = tuple(
        replace(node, devices=tuple(replace(device, budget_bytes=budget_bytes) for device in node.devices))
        for node in cluster.nodes
        if budget_bytes is not None
    )
    links = cluster.links if nodes else ()
    problem = small_fleets.problem(replace(cluster, nodes=nodes, links=links, site_links=()), 6, roles=roles)
    found = _search(problem, algorithm)
    assert (found.best, found.gap) == (None, 1.0)


def test_replicas_are_called_what_they_do() -> None:
    problem = _problem("hexgen2-1")
    found = _search(problem, "columns").best
    assert found is not None
    done = [
        (found.flow.prefill[f"r{at}"] > 0, found.flow.decode[f"r{at}"] > 0) for at in range(len(found.draft))
    ]
    says = {"mixed": (True, True), "prefill": (True, False), "decode": (False, True)}
    assert done == [says[layout.role] for layout in found.draft]
    both = tuple(problem.layouts.best(team, "mixed") for team in (((0, 2),), ((1, 6),)))
    judged = problem.judge(tuple(layout for layout in both if layout is not None))
    renamed = named_by_use(problem, judged)
    assert renamed.worth >= judged.worth


def test_a_name_that_is_no_algorithm_is_refused_with_those_that_are() -> None:
    with pytest.raises(InvalidInput, match="no algorithm is called 'magic'") as refused:
        _search(_problem("hexgen2-h100"), "magic")
    assert "columns" in str(refused.value.next_step)


def test_least_cost_takes_the_cheapest_hosts_that_serve_the_rate() -> None:
    workload = Workload.of(
        ConstantLengths(prompt=512, output=128), PoissonArrivals(requests_per_s=5.0), Slo()
    )
    problem = _problem("hexgen2-1", workload=workload, objective=LeastCost(5.0))
    answer = _search(problem, "columns")
    found = answer.best
    assert found is not None
    assert 0 < answer.bound <= found.figures.price_per_h
    assert answer.gap == pytest.approx(1 - answer.bound / found.figures.price_per_h)
    assert found.flow.requests_per_s >= 5.0
    prices = {node.id: node.price_per_h or 0.0 for node in problem.cluster.nodes}
    alone = {
        pool.node.id: problem.layouts.best(((at, pool.size),), "mixed")
        for at, pool in enumerate(problem.pools)
    }
    enough = [prices[node] for node, layout in alone.items() if layout and layout.requests_per_s >= 5.0]
    assert enough
    assert found.figures.price_per_h <= min(enough)


def test_least_latency_at_a_rate_serves_the_rate_and_is_no_slower_than_greedy() -> None:
    workload = Workload.of(ConstantLengths(prompt=512, output=32), PoissonArrivals(requests_per_s=1.0), Slo())
    problem = _problem("hexgen2-h100", workload=workload, objective=objective_named("latency", workload))
    assert problem.objective == Latency(1.0)
    greedy, best = _search(problem, "greedy").best, _search(problem, "genetic").best
    assert greedy is not None
    assert best is not None
    assert best.flow.requests_per_s >= 1.0
    assert best.figures.latency_s <= greedy.figures.latency_s
    layout = best.draft[0]
    alone_s = layout.prefill_latency_s + 31 * problem.capacities.tpot_at(
        problem.pipeline(layout.parts), 1e-9, computes_prompts=True
    )
    assert best.figures.latency_s >= alone_s * (1 - 1e-9)


def test_limits_of_time_bind_goodput_and_not_throughput() -> None:
    workload = Workload(slo=Slo(ttft_s=2.0, tpot_s=0.1))
    free = _search(_problem("hexgen2-h100", workload=workload), "columns").best
    bound = _search(_problem("hexgen2-h100", workload=workload, objective=Goodput()), "columns").best
    assert free is not None
    assert bound is not None
    assert all(layout.tpot_s <= 0.1 for layout in bound.draft)
    assert max(layout.tpot_s for layout in free.draft) > 0.1
    assert bound.flow.requests_per_s < free.flow.requests_per_s


def test_no_objective_without_what_it_needs() -> None:
    with pytest.raises(InvalidInput, match="no rate to serve at least cost"):
        objective_named("cost", Workload())
    with pytest.raises(InvalidInput, match="no objective is called 'joy'"):
        objective_named("joy", Workload())


def test_teams_are_what_layouts_take() -> None:
    problem = _problem("mixed-24")
    layout = problem.layouts.best(((1, 6),), "mixed")
    assert layout is not None
    assert team_of(layout.parts)[0][0] == 1
    assert takes_too_much((layout, layout), problem.pools)
    assert not takes_too_much((layout,), problem.pools)
