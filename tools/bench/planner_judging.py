"""Plans of the planner's benchmark at work in the simulator: at peak, and under a rate that two plans share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec
from msgspec.structs import replace

from hexmesh.sim import n_to_settle, simulate
from hexmesh.workload import PoissonArrivals
from tools.bench.planner_fleets import Planned, plan_of, problem_of

N_REQUESTS, MOST_REQUESTS = 2_000, 12_000
SEEDS = (1, 2)
"""The second, where there is one class of workload to show it by, shows what the first is worth."""
NOISE_SHOWN_BY = "HPLD"
MODELS_SIMULATED = ("Llama-2-70B", "OPT-30B")
"""Llama-3-70B has the same layers as Llama-2-70B, and another vocabulary."""
CONTENDERS = 2
"""Per problem, beside `auto`: those that come nearest to it by the score, and no further below than NEAR."""
NEAR = 0.9
LOAD = 0.75
"""Of the lower peak of two plans: what both are given to compare latencies."""


class Peak(msgspec.Struct, frozen=True, kw_only=True, tag="peak"):
    """A plan given as much as it can serve."""

    of: str
    """The cell's key."""
    seed: int
    requests_per_s: float
    scored_requests_per_s: float

    @property
    def key(self) -> str:
        return peak_key(self.of, self.seed)


class Online(msgspec.Struct, frozen=True, kw_only=True, tag="online"):
    """A plan under a rate of Poisson arrivals; seconds from a request's arrival to its last token."""

    of: str
    against: str
    """The cell whose plan is given the same."""
    arrivals_per_s: float
    p50_s: float
    p90_s: float
    p99_s: float

    @property
    def key(self) -> str:
        return online_key(self.of, self.against)


def peak_key(of: str, seed: int) -> str:
    return f"peak/{of}/{seed}"


def online_key(of: str, against: str) -> str:
    return f"online/{of} against {against}"


def peak(planned: Planned, seed: int) -> Peak:
    """Simulate a cell's plan with its queues kept full."""
    cell = planned.cell
    problem = problem_of(cell.fleet, cell.workload, cell.model)
    plan = plan_of(problem, planned)
    found = simulate(
        plan,
        problem.cluster,
        problem.spec,
        problem.workload,
        n_requests=max(N_REQUESTS, min(MOST_REQUESTS, n_to_settle(plan))),
        seed=seed,
    )
    return Peak(
        of=cell.key,
        seed=seed,
        requests_per_s=found.requests_per_s,
        scored_requests_per_s=planned.requests_per_s,
    )


def online(planned: Planned, against: Planned) -> Online:
    """Simulate a cell's plan at the rate that it shares with another."""
    cell = planned.cell
    problem = problem_of(cell.fleet, cell.workload, cell.model)
    rate = LOAD * min(planned.requests_per_s, against.requests_per_s)
    found = simulate(
        plan_of(problem, planned),
        problem.cluster,
        problem.spec,
        replace(problem.workload, arrivals=PoissonArrivals(requests_per_s=rate)),
        n_requests=N_REQUESTS,
        seed=SEEDS[0],
    )
    spread = found.end_to_end_s
    return Online(
        of=cell.key,
        against=against.cell.key,
        arrivals_per_s=rate,
        p50_s=spread.p50,
        p90_s=spread.p90,
        p99_s=spread.p99,
    )


def finalists(planned: Iterable[Planned]) -> Iterator[tuple[Planned, int]]:
    """(cell, seed) of all that are simulated at peak: `auto`, and each other plan that comes near it."""
    problems = dict[str, list[Planned]]()
    for one in planned:
        if not one.cell.is_speed and one.requests_per_s > 0 and one.cell.model in MODELS_SIMULATED:
            problems.setdefault(one.cell.problem, []).append(one)
    for members in problems.values():
        yield from _finalists(members)


def _finalists(members: list[Planned]) -> Iterator[tuple[Planned, int]]:
    by_name: Mapping[str, Planned] = {one.cell.algorithm: one for one in members}
    auto = by_name.get("auto")
    if auto is None:
        return
    yield from ((auto, seed) for seed in SEEDS[: 2 if auto.cell.workload == NOISE_SHOWN_BY else 1])
    seen = {auto.draft}
    for one in sorted(members, key=lambda one: -one.requests_per_s):
        if one.draft not in seen and one.requests_per_s >= NEAR * auto.requests_per_s:
            seen.add(one.draft)
            if len(seen) <= CONTENDERS + 1:
                yield one, SEEDS[0]
