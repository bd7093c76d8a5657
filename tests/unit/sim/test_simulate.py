"""Whole runs: what goes in comes out once, the same for the same seed, and hosts may die."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from msgspec.structs import replace

from hexmesh.cluster import Cluster, Role
from hexmesh.errors import InvalidInput
from hexmesh.plan import Plan
from hexmesh.sim import Failure, SimResult, simulate
from hexmesh.sim import replica as replica_module
from hexmesh.sim.simulate import Scenario, Simulation
from hexmesh.workload import ConstantLengths, LognormalLengths, PoissonArrivals, Slo, TraceArrivals, Workload
from tests.unit.sim.plans import LLAMA_2_70B, capacities_of, fleet, pipelines_by_host, plan_of

LENGTHS = LognormalLengths(prompt=512, output=128, prompt_cv=0.6, output_cv=0.6)
SPLIT: dict[str, Role] = {"h100": "prefill", "l40": "prefill", "a100": "decode"}


def _plan(hosts: Sequence[str], roles: dict[str, Role] | None = None) -> tuple[Plan, Cluster]:
    """A replica on each of these hosts of a fleet with NICs of 100 Gbit/s."""
    cluster, capacities = fleet("mixed-24"), capacities_of(LLAMA_2_70B, Workload.of(LENGTHS))
    replicas = [one for one in pipelines_by_host(cluster, capacities, roles, 2) if one.id in hosts]
    return plan_of(replicas, LLAMA_2_70B, cluster, capacities if roles else None), cluster


def _rate(requests_per_s: float, slo: Slo | None = None) -> Workload:
    return Workload.of(LENGTHS, PoissonArrivals(requests_per_s=requests_per_s), slo)


def _run(
    plan: Plan, cluster: Cluster, workload: Workload, n_requests: int, failures: Sequence[Failure] = ()
) -> tuple[Simulation, SimResult]:
    scenario = Scenario(
        plan=plan, cluster=cluster, spec=LLAMA_2_70B, workload=workload, n_requests=n_requests, warm_up=0.1
    )
    simulation = Simulation(scenario, random.Random(5), failures, None)
    return simulation, simulation.run()


def _held_blocks(simulation: Simulation) -> list[tuple[int, int]]:
    pools = [replica.batcher.pool for replica in simulation.mesh.whole()]
    return [(pool.n_used, pool.n_leased) for pool in pools]


def test_every_request_ends_once_and_nothing_is_left() -> None:
    plan, cluster = _plan(("h100", "l40", "a100"), SPLIT)
    simulation, found = _run(plan, cluster, _rate(10.0), 300)
    assert (found.served, found.refused, found.lost, found.replayed) == (300, 0, 0, 0)
    assert _held_blocks(simulation) == [(0, 0)] * 3
    assert simulation.network.is_idle


def test_kv_crosses_nics_once_for_every_prompt() -> None:
    plan, cluster = _plan(("h100", "l40", "a100"), SPLIT)
    lengths = ConstantLengths(prompt=512, output=64)
    workload = Workload.of(lengths, PoissonArrivals(requests_per_s=10.0))
    scenario = Scenario(
        plan=plan, cluster=cluster, spec=LLAMA_2_70B, workload=workload, n_requests=100, warm_up=0.0
    )
    simulation = Simulation(scenario, random.Random(5), (), None)
    found = simulation.run()
    prompt_bytes = 512 * 80 * 2 * 8 * 128 * 2
    assert found.handoffs.n == 100
    assert found.handoffs.n_bytes == pytest.approx(100 * prompt_bytes)
    carried = {(resource.kind, resource.name): kv for resource, _, kv in simulation.network.resources()}
    assert carried["nic_in", "a100"] == pytest.approx(100 * prompt_bytes)
    assert carried["nic_out", "h100"] + carried["nic_out", "l40"] == pytest.approx(100 * prompt_bytes)


def test_one_request_alone_takes_the_time_of_its_steps_and_its_kv() -> None:
    plan, cluster = _plan(("h100", "a100"), SPLIT)
    workload = Workload.of(ConstantLengths(prompt=200, output=50), TraceArrivals(times=(0.0, 1000.0)))
    found = simulate(plan, cluster, LLAMA_2_70B, workload, n_requests=2, seed=1, warm_up=0.0)
    kv_s = 200 * 80 * 2 * 8 * 128 * 2 / 12.5e9 + 1e-4
    assert found.handoffs.seconds.p50 == pytest.approx(kv_s, rel=1e-6)
    assert found.end_to_end_s.p50 == pytest.approx(found.ttft_s.p50 + 49 * found.tpot_s.p50)
    assert found.requests_per_s == pytest.approx(1 / 1000.0)


def test_so_many_requests_at_once_are_all_that_there_are() -> None:
    plan, cluster = _plan(("h100", "a100"))
    assert all(replica.predicted_batch > 10 for replica in plan.replicas)
    workload = Workload.of(ConstantLengths(prompt=200, output=50))
    found = simulate(plan, cluster, LLAMA_2_70B, workload, n_requests=400, seed=1, warm_up=0.2, n_at_once=10)
    assert sum(replica.running_mean for replica in found.replicas) == pytest.approx(10, rel=0.05)
    assert all(replica.running_max <= 10 for replica in found.replicas)
    assert found.requests_per_s * found.end_to_end_s.mean == pytest.approx(10, rel=0.05)


def test_the_seed_alone_decides() -> None:
    plan, cluster = _plan(("h100", "l40", "a100"), SPLIT)
    first, again, other = (
        simulate(plan, cluster, LLAMA_2_70B, _rate(12.0), n_requests=150, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.ttft_s != other.ttft_s


def test_a_result_is_json_and_its_timeline_is_bounded() -> None:
    plan, cluster = _plan(("h100",))
    found = simulate(plan, cluster, LLAMA_2_70B, _rate(1.0), n_requests=200, seed=1)
    assert msgspec.json.decode(msgspec.json.encode(found), type=SimResult) == found
    assert 100 <= len(found.timeline) <= 400
    n_tokens = sum(
        point.tokens_per_s * (point.at_s - before)
        for before, point in zip(
            [0.0, *(point.at_s for point in found.timeline)], found.timeline, strict=False
        )
    )
    assert n_tokens == pytest.approx(128 * 200, rel=0.1)


def test_goodput_counts_who_kept_both_limits() -> None:
    plan, cluster = _plan(("a100",))
    no_limit = simulate(plan, cluster, LLAMA_2_70B, _rate(5.0), n_requests=200, seed=1)
    median = Slo(ttft_s=no_limit.ttft_s.p50)
    half = simulate(plan, cluster, LLAMA_2_70B, _rate(5.0, median), n_requests=200, seed=1)
    never = simulate(plan, cluster, LLAMA_2_70B, _rate(5.0, Slo(tpot_s=1e-6)), n_requests=200, seed=1)
    assert no_limit.goodput_share == 1.0
    assert half.goodput_share == pytest.approx(0.5, abs=0.02)
    assert (never.goodput_share, never.goodput_requests_per_s) == (0.0, 0.0)


def test_more_than_can_be_served_is_refused_and_still_all_end() -> None:
    plan, cluster = _plan(("h100",))
    simulation, found = _run(plan, cluster, _rate(200.0), 800)
    assert found.refused > 100
    assert found.served + found.refused == 800
    assert found.goodput_share < 0.9
    assert _held_blocks(simulation) == [(0, 0)]


def test_a_request_longer_than_the_model_takes_is_refused() -> None:
    plan, cluster = _plan(("a100",))
    workload = Workload.of(ConstantLengths(prompt=5000, output=8), PoissonArrivals(requests_per_s=1.0))
    found = simulate(plan, cluster, LLAMA_2_70B, workload, n_requests=5, seed=1)
    assert (found.served, found.refused) == (0, 5)


def test_what_ran_over_a_dead_host_runs_on_elsewhere() -> None:
    plan, cluster = _plan(("a100", "l40"))
    simulation, found = _run(plan, cluster, _rate(6.0), 300, [Failure(at_s=20.0, node="a100")])
    assert found.replayed > 5
    assert (found.served, found.lost, found.refused) == (300, 0, 0)
    assert _held_blocks(simulation) == [(0, 0)]


@pytest.mark.parametrize("node", ["h100", "a100"])
def test_kv_under_way_when_a_host_dies_leaks_nothing(node: str) -> None:
    plan, cluster = _plan(("h100", "l40", "a100", "a6000-0"), {**SPLIT, "a6000-0": "decode"})
    failures = [Failure(at_s=at_s, node=node, back_s=at_s + 0.4) for at_s in (5.0, 10.1, 15.2)]
    failures.append(Failure(at_s=20.0, node=node, back_s=24.0))
    simulation, found = _run(plan, cluster, _rate(14.0), 400, failures)
    assert found.replayed > 5
    assert found.served + found.refused == 400
    assert found.lost == 0
    assert _held_blocks(simulation) == [(0, 0)] * 4
    assert simulation.network.is_idle


def test_with_nothing_left_requests_wait_for_the_host_to_come_back() -> None:
    plan, cluster = _plan(("a100",))
    _, found = _run(plan, cluster, _rate(4.0), 100, [Failure(at_s=10.0, node="a100", back_s=60.0)])
    assert found.replayed > 5
    assert found.lost == 0
    assert found.served + found.refused == 100
    assert found.refused > 20  # new ones, while nothing was there
    assert found.end_to_end_s.p99 > 50.0


def test_with_nothing_left_for_good_requests_are_lost_at_their_deadline() -> None:
    plan, cluster = _plan(("a100",))
    _, found = _run(plan, cluster, _rate(4.0), 100, [Failure(at_s=10.0, node="a100")])
    assert found.lost > 5
    assert found.served + found.refused + found.lost == 100
    assert found.seconds == pytest.approx(610.0, abs=12.0)


def test_skipping_rounds_changes_nothing_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cluster = _plan(("h100",))
    workload = Workload.of(LENGTHS, PoissonArrivals(requests_per_s=0.3))
    skipping = simulate(plan, cluster, LLAMA_2_70B, workload, n_requests=40, seed=1)
    monkeypatch.setattr(replica_module, "_WORTH_SKIPPING", 10**9)
    stepping = simulate(plan, cluster, LLAMA_2_70B, workload, n_requests=40, seed=1)
    assert skipping.n_events < stepping.n_events / 3
    for one, other in ((skipping.ttft_s, stepping.ttft_s), (skipping.tpot_s, stepping.tpot_s)):
        assert one.mean == pytest.approx(other.mean, rel=0.01)
    assert skipping.stages[0].busy == pytest.approx(stepping.stages[0].busy, rel=0.01)
    assert skipping.n_steps == pytest.approx(stepping.n_steps, rel=0.02)


def test_progress_is_told_to_the_end() -> None:
    plan, cluster = _plan(("a100",))
    told: list[tuple[int, int]] = []
    simulate(
        plan,
        cluster,
        LLAMA_2_70B,
        _rate(8.0),
        n_requests=200,
        seed=1,
        progress=lambda n, of: told.append((n, of)),
    )
    assert told[-1] == (200, 200)
    assert len(told) == 100


def test_too_few_requests_are_refused_with_a_next_step() -> None:
    plan, cluster = _plan(("a100",))
    with pytest.raises(InvalidInput, match="nothing to measure"):
        simulate(plan, cluster, LLAMA_2_70B, _rate(8.0), n_requests=1, seed=1)


def test_a_plan_over_a_missing_link_is_refused() -> None:
    plan, cluster = _plan(("h100", "a100"), SPLIT)
    cut = replace(cluster, links=tuple(link for link in cluster.links if link.dst != "a100"))
    with pytest.raises(InvalidInput, match="no link from h100 to a100"):
        simulate(plan, cut, LLAMA_2_70B, _rate(8.0), n_requests=10, seed=1)
