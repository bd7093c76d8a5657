"""Exhaustive search against every plan there is, on clusters small enough for that."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import msgspec
import pytest

from hexmesh.cluster import Cluster
from hexmesh.planner.algorithms import alone, exhaustive
from hexmesh.planner.every_layout import EveryLayout, every_cut, n_layouts, sequences
from hexmesh.planner.finish import finish
from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.partitions import n_teams_within, partitions, teams_within
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Judged, Problem, takes_too_much
from hexmesh.planner.run import Run
from hexmesh.schedule.check import check_plan
from hexmesh.score import fluid_bound
from hexmesh.workload import Slo
from tests.unit.planner.everything import best_rate
from tests.unit.planner.small_fleets import cluster, other_objective, problem

STRICT = frozenset(ROLES) - {"mixed"}


def _searched(given: Problem) -> Run:
    run = Run(problem=given, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)
    exhaustive.search(run)
    return run


def _rate(given: Problem) -> float:
    best = _searched(given).best
    return 0.0 if best is None else best.flow.requests_per_s


def _case(seed: int, n_devices: int, n_layers: int) -> Problem:
    """Free roles, strict roles and limits of time in turn, every other with slow links."""
    fleet = cluster(random.Random(seed), n_devices, n_layers, slow=seed % 2 == 1)
    if seed % 3 == 0:
        return problem(fleet, n_layers)
    if seed % 3 == 1:
        return problem(fleet, n_layers, roles=STRICT)
    return problem(fleet, n_layers, slo=Slo(tpot_s=0.0015 * n_layers, ttft_s=0.5))


@pytest.mark.parametrize("seed", range(36))
def test_it_is_as_good_as_every_plan_of_three_devices(seed: int) -> None:
    given = _case(seed, 3, 4)
    assert _rate(given) == pytest.approx(best_rate(given), rel=2e-6)


@pytest.mark.parametrize("seed", [101, 102, 106, 107, 109, 110, 118, 126])
def test_it_is_as_good_as_every_plan_of_four_devices(seed: int) -> None:
    given = _case(seed, 4, 4)
    assert _rate(given) == pytest.approx(best_rate(given), rel=2e-6)


@pytest.mark.parametrize("seed", [103, 106, 115, 120, 124, 126, 132, 135, 144, 175])
def test_it_aligns_cuts_as_well_as_can_be_where_a_wire_decides(seed: int) -> None:
    """Two replicas over several hosts each: which layers lie where is worth more than how fast either is."""
    given = problem(cluster(random.Random(seed), 4, 4, slow=True), 4, roles=STRICT)
    best = _searched(given).best
    assert best is not None
    assert best.flow.bottleneck is not None
    assert best.flow.bottleneck.kind in ("nic_out", "nic_in", "link", "line")
    assert best.flow.requests_per_s == pytest.approx(best_rate(given), rel=2e-6)


@pytest.mark.parametrize("seed", range(600, 612))
def test_replicas_that_hand_nothing_over_are_as_good_as_can_be(seed: int) -> None:
    """Hosts that say "mixed" alone, beside the search that is made for them."""
    fleet = cluster(random.Random(seed), 5, 6)
    nodes = tuple(msgspec.structs.replace(node, roles=("mixed",)) for node in fleet.nodes)
    given = problem(msgspec.structs.replace(fleet, nodes=nodes), 6)
    other = Run(problem=given, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)
    alone.search(other)
    assert _rate(given) == pytest.approx(other.best.flow.requests_per_s if other.best else 0.0, rel=2e-6)


def _more(fleet: Cluster, rng: random.Random) -> Iterator[Cluster]:
    """The cluster with one more device, faster wires, and another fast link."""
    at = rng.randrange(len(fleet.nodes))
    node = fleet.nodes[at]
    added = msgspec.structs.replace(rng.choice(node.devices), index=len(node.devices))
    larger = msgspec.structs.replace(node, devices=(*node.devices, added))
    yield msgspec.structs.replace(fleet, nodes=(*fleet.nodes[:at], larger, *fleet.nodes[at + 1 :]))
    yield msgspec.structs.replace(
        fleet,
        nodes=tuple(
            msgspec.structs.replace(
                one, nic=None if one.nic is None else msgspec.structs.replace(one.nic, out_bytes_per_s=1e10)
            )
            for one in fleet.nodes
        ),
        links=tuple(
            msgspec.structs.replace(link, bytes_per_s=link.bytes_per_s * 3, rtt_p50_s=link.rtt_p50_s / 2)
            for link in fleet.links
        ),
        site_links=tuple(
            msgspec.structs.replace(line, bytes_per_s=line.bytes_per_s * 3) for line in fleet.site_links
        ),
    )


@pytest.mark.parametrize("seed", range(200, 224))
def test_more_devices_and_faster_links_never_hurt(seed: int) -> None:
    given = _case(seed, 4, 5)
    before = _rate(given)
    for fleet in _more(given.cluster, random.Random(seed)):
        assert _rate(replace(given, cluster=fleet)) >= before * (1 - 2e-6)


@pytest.mark.parametrize("seed", range(200, 212))
def test_a_link_more_never_hurts(seed: int) -> None:
    given = _case(seed, 4, 5)
    links = given.cluster.links
    without = replace(given, cluster=msgspec.structs.replace(given.cluster, links=links[1:]))
    assert _rate(given) >= _rate(without) * (1 - 2e-6)


@pytest.mark.parametrize("seed", range(300, 324))
def test_the_best_is_a_sound_plan_within_the_bound(seed: int) -> None:
    given = _case(seed, 5, 6)
    run = _searched(given)
    if run.best is None:
        pytest.skip("no plan holds the model within the limits")
    assert not takes_too_much(run.best.draft, given.pools)
    assert run.best.flow.requests_per_s <= fluid_bound(given.cluster, given.capacities) * (1 + 1e-6)
    plan = finish(
        given,
        run.best,
        model_id="m",
        model_name="m",
        max_model_tokens=1024,
        hosts={node.id: 1 for node in given.cluster.nodes},
    )
    assert check_plan(plan, given.cluster, given.spec, given.workload) == []


def test_the_same_again_is_the_same_draft() -> None:
    given = _case(303, 6, 6)
    first, second = _searched(given), _searched(given)
    assert first.best is not None
    assert second.best is not None
    assert first.best.draft == second.best.draft
    assert first.n_judged == second.n_judged


def _hosts_alone(given: Problem, names: tuple[str, ...]) -> Problem:
    fleet = given.cluster
    return replace(
        given,
        cluster=Cluster(
            nodes=tuple(node for node in fleet.nodes if node.id in names),
            links=tuple(link for link in fleet.links if link.src in names and link.dst in names),
            site_links=fleet.site_links,
        ),
    )


@pytest.mark.parametrize("seed", range(400, 416))
def test_least_cost_is_the_cheapest_set_of_hosts_that_serves_the_rate(seed: int) -> None:
    base = problem(cluster(random.Random(seed), 4, 4), 4, slo=Slo(ttft_s=2.0))
    names = [node.id for node in base.cluster.nodes]
    subsets = [chosen for n in range(1, len(names) + 1) for chosen in combinations(names, n)]
    rates = {chosen: _rate(_hosts_alone(base, chosen)) for chosen in subsets}
    wanted = 0.6 * max(rates.values())
    if wanted == 0:
        pytest.skip("the model does not fit")
    prices = {node.id: node.price_per_h or 0.0 for node in base.cluster.nodes}
    cheapest = min(sum(prices[name] for name in chosen) for chosen, rate in rates.items() if rate >= wanted)
    best = _searched(other_objective(base, LeastCost(wanted))).best
    assert best is not None
    assert best.figures.requests_per_s >= wanted * (1 - 1e-6)
    assert best.figures.price_per_h == pytest.approx(cheapest)


@pytest.mark.parametrize("seed", range(400, 408))
def test_a_rate_beyond_all_is_met_as_far_as_can_be(seed: int) -> None:
    base = problem(cluster(random.Random(seed), 4, 4), 4, slo=Slo(ttft_s=2.0))
    best = _searched(other_objective(base, LeastCost(1e6))).best
    assert (0.0 if best is None else best.figures.requests_per_s) == pytest.approx(_rate(base), rel=2e-6)


@pytest.mark.parametrize("seed", range(500, 512))
def test_least_latency_of_one_request_is_that_of_the_quickest_replica_or_pair(seed: int) -> None:
    given = problem(cluster(random.Random(seed), 4, 4), 4, objective=Latency(1e-9))
    best = _searched(given).best
    sizes = tuple(pool.size for pool in given.pools)
    tried = list[Judged]()
    for team in teams_within(sizes):
        alone = given.layouts.quickest(team, "mixed")
        if alone is not None:
            tried.append(given.judge((alone,)))
    if best is None:
        assert tried == []
        return
    assert best.figures.latency_s <= min(one.figures.latency_s for one in tried) * (1 + 1e-9)


def test_partitions_of_like_devices_are_counted_once() -> None:
    """Without the empty one."""
    counts = {(4,): 11, (2, 2): 25, (2, 1, 1): 35, (3, 3): 108, (4, 4): 423, (2, 2, 2, 2): 3273}
    found = {sizes: sum(1 for _ in partitions(sizes, list(teams_within(sizes)))) for sizes in counts}
    assert {sizes: n_teams_within(sizes) for sizes in [(4,), (2, 1, 1)]} == {(4,): 4, (2, 1, 1): 11}
    assert found == counts


def test_layouts_are_counted_as_they_are_made() -> None:
    team = [(0, 2, (1, 2)), (3, 3, (1, 2))]
    every = [
        (sequence, tuple(cut)) for sequence in sequences(team) for cut in every_cut(6, len(sequence)).tolist()
    ]
    assert len(set(every)) == len(every) == n_layouts(team, 6)


def test_a_team_of_too_many_layouts_keeps_the_best_in_each_role(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(cluster(random.Random(7), 6, 8), 8)
    team = given.whole
    monkeypatch.setattr("hexmesh.planner.every_layout.MOST_LAYOUTS", 10)
    some = EveryLayout(given).of(team)
    assert not any(choice.is_complete for choice in some.values())
    for role, choice in some.items():
        best = given.layouts.best(team, role)
        assert best is not None
        rate = {"prefill": choice.prefill, "decode": choice.decode, "mixed": choice.reach[:, 32] * 2}[
            role
        ].max()
        assert rate >= best.requests_per_s * (1 - 1e-9)
