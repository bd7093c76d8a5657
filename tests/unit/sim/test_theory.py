"""Simulated plans against what theory says of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Link, Nic, Node, Role
from hexmesh.plan import Plan
from hexmesh.score import pipeline_of, score_replicas
from hexmesh.serving.batcher import BatchLimits
from hexmesh.sim import n_to_settle, simulate
from hexmesh.sim.step_time import Attended, StageTimes, StepLoad
from hexmesh.workload import ConstantLengths, LognormalLengths, PoissonArrivals, Workload
from tests.unit.sim.plans import (
    LLAMA_2_70B,
    SMALL,
    at_rate,
    capacities_of,
    fleet,
    pipelines_by_host,
    plan_of,
    replica,
)


def _hosts(n: int, rtt_s: float, link_bytes_per_s: float = 1e9) -> Cluster:
    """Hosts with one device each."""
    device = Device(index=0, kind="cuda", name="", budget_bytes=2**32, flops_per_s=2e13, bytes_per_s=4e11)
    names = [f"n{at}" for at in range(n)]
    return Cluster(
        nodes=tuple(Node(id=name, name=name, site="here", devices=(device,)) for name in names),
        links=tuple(
            Link(
                src=a,
                dst=b,
                rtt_p50_s=rtt_s,
                rtt_p95_s=rtt_s,
                bytes_per_s=link_bytes_per_s,
                lower_bound=False,
            )
            for a in names
            for b in names
            if a != b
        ),
    )


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_stage_with_equal_prompts_is_an_m_d_1_queue(load: float) -> None:
    """Prompts of a whole step each, answered with one token: the mean wait is rho D / (2 (1 - rho))."""
    cluster = _hosts(1, 0.0)
    lengths = ConstantLengths(prompt=256, output=1)
    capacities = capacities_of(SMALL, Workload.of(lengths))
    one = replica("r", "mixed", [("n0", (0,), 0, 8)], cluster, capacities)
    times = StageTimes(pipeline_of(one.stages, cluster).seats[0], SMALL, "float16")
    service_s = times.seconds(StepLoad(1, 256, 1, {None: Attended(0, 0, 256 * 256 / 2)}))
    workload = Workload.of(lengths, PoissonArrivals(requests_per_s=load / service_s))
    found = simulate(plan_of([one], SMALL, cluster), cluster, SMALL, workload, n_requests=8000, seed=3)
    wait_s = load * service_s / (2 * (1 - load))
    assert found.ttft_s.mean - service_s == pytest.approx(wait_s, rel=0.08)
    assert found.stages[0].busy == pytest.approx(load, rel=0.03)
    assert found.served == 8000


@pytest.mark.parametrize(("n_hosts", "rtt_s"), [(1, 0.0), (3, 2e-3), (4, 0.04), (4, 0.2)])
def test_a_full_pipeline_draws_at_the_rate_of_the_period_formula(n_hosts: int, rtt_s: float) -> None:
    """Nearly all work is decoding, by as many sequences as a driver runs at once."""
    cluster = _hosts(n_hosts, rtt_s)
    workload = Workload.of(ConstantLengths(prompt=1, output=400))
    capacities = capacities_of(SMALL, workload)
    seats = [(f"n{at}", (0,), 8 * at // n_hosts, 8 * (at + 1) // n_hosts) for at in range(n_hosts)]
    one = replica("r", "mixed", seats, cluster, capacities, kv_blocks=9000)
    pipeline = pipeline_of(one.stages, cluster)
    n_held = BatchLimits().max_running + 64

    def rate(n_groups: int) -> float:
        batch = n_held / n_groups
        steps = [capacities.step_s(seat, batch) for seat in pipeline.seats]
        sends = [hop.send_s(batch * capacities.model.hidden_bytes) for hop in pipeline.hops]
        delays_s = sum(hop.delay_s for hop in pipeline.hops) + pipeline.back.delay_s
        return batch / max(*steps, *sends, (sum(steps) + sum(sends) + delays_s) / n_groups)

    best = max(rate(n_groups) for n_groups in range(1, 33))
    one = replace(one, predicted_tokens_per_s=best, predicted_batch=BatchLimits().max_running)
    plan = plan_of([one], SMALL, cluster)
    found = simulate(plan, cluster, SMALL, workload, n_requests=1000, seed=1, warm_up=0.5)
    assert found.output_tokens_per_s == pytest.approx(best, rel=0.04)
    assert found.replicas[0].running_mean == pytest.approx(n_held, rel=0.01)


def test_prompts_go_through_a_pipeline_at_the_rate_of_its_slowest_stage() -> None:
    """Of a whole step each, several in flight: they queue where most layers are."""
    cluster, workload = _hosts(2, 1e-4), Workload.of(ConstantLengths(prompt=256, output=1))
    capacities = capacities_of(SMALL, workload)
    one = replica("r", "mixed", [("n0", (0,), 0, 6), ("n1", (0,), 6, 8)], cluster, capacities, kv_blocks=9000)
    expected = capacities.prefill(pipeline_of(one.stages, cluster)).requests_per_s
    found = simulate(plan_of([one], SMALL, cluster), cluster, SMALL, workload, n_requests=500, seed=1)
    assert found.requests_per_s == pytest.approx(expected, rel=0.03)


def _planned(name: str, roles: dict[str, Role] | None, tp: int) -> tuple[Plan, Cluster, float]:
    """A plan with the score's flows and rates, and the score."""
    cluster, workload = fleet(name), Workload.of(LENGTHS)
    capacities = capacities_of(LLAMA_2_70B, workload)
    replicas = pipelines_by_host(cluster, capacities, roles, tp)
    score = score_replicas(replicas, cluster, capacities)
    replicas = [at_rate(one, cluster, capacities, score.decode[one.id]) for one in replicas]
    return plan_of(replicas, LLAMA_2_70B, cluster, capacities), cluster, score.requests_per_s


LENGTHS = LognormalLengths(prompt=512, output=128, prompt_cv=0.6, output_cv=0.6)
SPLIT: dict[str, Role] = {
    "h100": "prefill",
    "l40": "prefill",
    "a100": "decode",
    "a6000-0": "prefill",
    "a6000-1": "prefill",
    "a6000-2": "prefill",
}


@pytest.mark.parametrize("name", ["mixed-24", "mixed-24-10g"])
def test_peak_rates_of_split_plans_are_those_of_the_score(name: str) -> None:
    """One is held up by a replica that computes prompts, the other by NICs."""
    plan, cluster, score = _planned(name, SPLIT, 2)
    found = simulate(plan, cluster, LLAMA_2_70B, Workload.of(LENGTHS), n_requests=2000, seed=1)
    assert found.is_saturated
    assert found.requests_per_s == pytest.approx(score, rel=0.1)


def test_mixed_replicas_do_what_the_score_says_once_they_have_settled() -> None:
    plan, cluster, score = _planned("mixed-24", None, 1)
    found = simulate(plan, cluster, LLAMA_2_70B, Workload.of(LENGTHS), n_requests=n_to_settle(plan), seed=1)
    assert found.requests_per_s == pytest.approx(score, rel=0.08)


def test_twice_the_network_never_hurts_by_more_than_noise() -> None:
    plan, cluster, _ = _planned("mixed-24-10g", SPLIT, 2)
    rates = []
    for factor in (0.5, 1.0, 2.0, 4.0):
        nodes = []
        for node in cluster.nodes:
            assert node.nic is not None
            nic = Nic(
                out_bytes_per_s=node.nic.out_bytes_per_s * factor,
                in_bytes_per_s=node.nic.in_bytes_per_s * factor,
            )
            nodes.append(replace(node, nic=nic))
        links = tuple(replace(link, bytes_per_s=link.bytes_per_s * factor) for link in cluster.links)
        faster = replace(cluster, nodes=tuple(nodes), links=links)
        found = simulate(plan, faster, LLAMA_2_70B, Workload.of(LENGTHS), n_requests=500, seed=1)
        rates.append(found.requests_per_s)
    assert all(after > 0.95 * before for before, after in pairwise(rates))
    assert rates[1] > 1.5 * rates[0]  # NICs are what this plan lacks
