"""The simulator: how quick it is, how steady short runs are, and how near the score comes to it.

    python -m tools.bench.simulate [--quick] [--json]

Plans are those of `columns` (a few seconds each) for Llama-2-70B, with lognormal prompts of 512 and outputs of 128
tokens, with any roles and with mixed replicas alone. CPU seconds, for the machine may be shared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.model_spec.known import known_config
from hexmesh.plan import Plan
from hexmesh.planner import front
from hexmesh.planner.finish import finish
from hexmesh.planner.objective import Throughput
from hexmesh.planner.problem import Problem
from hexmesh.sim import SimResult, n_to_settle, simulate
from hexmesh.workload import LognormalLengths, PoissonArrivals, Workload
from tools.bench.report import Report, bench_arguments, print_report, progress

FLEETS = Path(__file__).resolve().parents[2] / "docs" / "fleets"
WORKLOAD = Workload.of(LognormalLengths(prompt=512, output=128, prompt_cv=0.6, output_cv=0.6))
ROLES: dict[str, frozenset[Role]] = {
    "any roles": frozenset[Role](("mixed", "prefill", "decode")),
    "mixed alone": frozenset[Role](("mixed",)),
}
COMPARED = ("mixed-24", "mixed-24-10g", "hexgen2-1", "hexgen2-3", "helix-24", "hexgen-58", "mixed-64")
THIRTY_TWO = """
name = "a100-32"
[[host]]
name = "a100"
count = 4
devices = [{ type = "A100-SXM-80GB", count = 8 }]
nic = "100Gbit/s"
"""
LENGTHS = (0.5, 1, 2)
"""Lengths of runs, in those that it takes to settle."""
N_SPEED = 100_000
LOAD = 0.8
SEEDS = (1, 2, 3)
BUDGET_S = 20.0


def main() -> None:
    """Print the tables."""
    args = bench_arguments(__doc__ or "").parse_args()
    report = Report("simulator", "plans at work in virtual time against their score; CPU seconds of one core")
    for name in COMPARED[: 2 if args.quick else None]:
        cluster = cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8")), "float16")
        for roles in ROLES:
            _compare(report, f"{name}, {roles}", cluster, roles)
    if args.quick:
        report.not_run += [*COMPARED[2:], f"{N_SPEED} requests on 32 devices", "runs of other lengths"]
    else:
        _precision(report)
        _speed(report)
    print_report(report, "json" if args.json else "text")


def _compare(report: Report, name: str, cluster: Cluster, roles: str) -> None:
    progress(name)
    planned = _planned(cluster, roles)
    if planned is None:
        report.not_run.append(f"{name}: no plan")
        return
    plan, score = planned
    report.add(f"{name}: score", score, "requests/s")
    runs = [found for found, _ in _runs(plan, cluster, WORKLOAD, n_to_settle(plan), SEEDS[:2])]
    report.add(f"{name}: simulated / score", [found.requests_per_s / score for found in runs], "")


def _precision(report: Report) -> None:
    progress("precision")
    cluster = _thirty_two()
    plan, score = _planned(cluster, "any roles") or (None, 0.0)
    assert plan is not None
    for n in (round(share * n_to_settle(plan)) for share in LENGTHS):
        runs = list(_runs(plan, cluster, WORKLOAD, n, SEEDS))
        rates = [found.requests_per_s / score for found, _ in runs]
        report.add(f"peak of 32 A100, {n} requests: simulated / score", rates, "")
        report.add(f"peak of 32 A100, {n} requests: CPU", [cpu_s for _, cpu_s in runs], "s")


def _speed(report: Report) -> None:
    progress("speed")
    cluster = _thirty_two()
    for roles in ROLES:
        plan, score = _planned(cluster, roles) or (None, 0.0)
        assert plan is not None
        workload = replace(WORKLOAD, arrivals=PoissonArrivals(requests_per_s=LOAD * score))
        ((found, cpu_s),) = _runs(plan, cluster, workload, N_SPEED, SEEDS[:1])
        where = f"32 A100, {roles}, {N_SPEED} requests at {LOAD:.0%} of the score"
        report.add(f"{where}: CPU", cpu_s, "s", at_most=75.0)
        report.add(f"{where}: TTFT p50", found.ttft_s.p50, "s")
        report.add(f"{where}: TPOT p50", found.tpot_s.p50, "s")


def _runs(
    plan: Plan, cluster: Cluster, workload: Workload, n_requests: int, seeds: tuple[int, ...]
) -> Iterator[tuple[SimResult, float]]:
    """The result for each seed, and what it took."""
    for seed in seeds:
        started_s = time.process_time()
        found = simulate(plan, cluster, _spec(), workload, n_requests=n_requests, seed=seed)
        yield found, time.process_time() - started_s


def _planned(cluster: Cluster, roles: str) -> tuple[Plan, float] | None:
    problem = Problem(
        cluster=cluster,
        spec=_spec(),
        dtype="float16",
        workload=WORKLOAD,
        objective=Throughput(),
        roles=ROLES[roles],
    )
    found = front.search(problem, "columns", seed=0, clock=time.monotonic, budget_s=BUDGET_S)
    if found.best is None:
        return None
    hosts = {node.id: 0 for node in cluster.nodes}
    plan = finish(problem, found.best, model_id="m", model_name="m", max_model_tokens=4096, hosts=hosts)
    return plan, found.best.flow.requests_per_s


def _thirty_two() -> Cluster:
    return cluster_of(read_fleet(THIRTY_TWO), "float16")


def _spec() -> ModelSpec:
    config = known_config("Llama-2-70B")
    assert config is not None
    return model_spec_from_config(config)


if __name__ == "__main__":
    main()
