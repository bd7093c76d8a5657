"""The last word on drafts that the score cannot tell apart: a simulation with the daemon's own batcher and router.

The score is a steady state: no queues, no chance, no prompts that come in a bad moment. Drafts within CLOSE of the best
are put through the same requests, and the one that does best there is chosen, unless the score's own favourite does
as well within what the simulation can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from hexmesh.plan import Plan
from hexmesh.planner.finish import finish
from hexmesh.planner.objective import ONE_AT_A_TIME, Figures, Goodput, Latency, Worth
from hexmesh.planner.problem import Judged, Problem
from hexmesh.planner.run import Run
from hexmesh.sim import SimResult, n_to_settle, simulate
from hexmesh.workload import PoissonArrivals

CLOSE = 0.03
"""How far below the best a draft's figure may be."""
WITHOUT_HANDOFFS = 0.2
"""As far below may the best draft be that hands nothing over: where the score fills a wire, queues in front of it cost
some of what it promises."""
MAX_FINALISTS = 3
MIN_REQUESTS, MAX_REQUESTS = 1_000, 12_000
"""Simulated for a draft. Where drafts hold so many sequences that the rate would not settle, the score decides."""
REQUEST_S, TOKEN_S = 5e-4, 3e-6
"""What a request and an output token take to simulate: what does not fit into the time that is left is not begun."""
TELLS = 0.02
"""What two runs of one plan differ by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A draft, who found it, and what it did."""

    judged: Judged
    by: str
    result: SimResult
    worth: Worth


def choose_finalist(run: Run, *, seed: int) -> None:
    """Simulates the best drafts and makes the winner the run's best."""
    drafts = _finalists(run)
    while len(drafts) > 1 and not (results := _simulated(run, [judged for judged, _ in drafts], seed)):
        del drafts[-2 if len(drafts) > 2 else -1]
    if len(drafts) < 2:
        return
    trials = [_trial(run.problem, *draft, result) for draft, result in zip(drafts, results, strict=True)]
    winner = max(trials, key=lambda trial: trial.worth)
    if _is_clearly_better(winner.worth, trials[0].worth):
        run.best = winner.judged
        run.notes.append(
            f"the draft of {winner.by} did better in simulation than the score's favourite, of {trials[0].by}: "
            f"{winner.result.requests_per_s:.4g} against {trials[0].result.requests_per_s:.4g} requests/s"
        )


def _plan(problem: Problem, judged: Judged) -> Plan:
    return finish(
        problem,
        judged,
        model_id="",
        model_name="",
        max_model_tokens=problem.spec.max_position_tokens,
        hosts={node.id: 0 for node in problem.cluster.nodes},
    )


def _n_requests(problem: Problem, plan: Plan) -> int:
    """That a draft is simulated for."""
    return max(MIN_REQUESTS, n_to_settle(plan) if _arrivals(problem) is None else 0)


def _arrivals(problem: Problem) -> PoissonArrivals | None:
    objective = problem.objective
    if isinstance(objective, Latency) and objective.requests_per_s > ONE_AT_A_TIME:
        return PoissonArrivals(requests_per_s=objective.requests_per_s)
    return None


def _finalists(run: Run) -> list[tuple[Judged, str]]:
    """Different drafts about as good as the best, the best first, and last the best that hands nothing over."""
    if run.best is None:
        return []
    best = run.best.worth
    ranked = sorted(run.best_by.items(), key=lambda item: item[1].worth, reverse=True)
    drafts = list({judged.draft: (judged, by) for by, judged in reversed(ranked)}.values())[::-1]
    close = [one for one in drafts if _is_close(one[0].worth, best, CLOSE)][:MAX_FINALISTS]
    apart = [one for one in drafts if one not in close and _hands_nothing_over(one[0])]
    return close + [one for one in apart[:1] if _is_close(one[0].worth, best, WITHOUT_HANDOFFS)]


def _hands_nothing_over(judged: Judged) -> bool:
    return all(layout.role == "mixed" for layout in judged.draft)


def _is_close(worth: Worth, best: Worth, share: float) -> bool:
    """In both of the figures that decide."""
    return all(a >= b - share * abs(b) for a, b in zip(worth[:2], best[:2], strict=True))


def _is_clearly_better(worth: Worth, than: Worth) -> bool:
    first, other = worth[0] - than[0], TELLS * abs(than[0])
    return first > other or (abs(first) <= other and worth[1] > than[1] + TELLS * abs(than[1]))


def _simulated(run: Run, drafts: Sequence[Judged], seed: int) -> list[SimResult]:
    """Each at its highest rate, for the latency objective at the rate that is asked for. None if it takes too long."""
    problem = run.problem
    plans = [_plan(problem, judged) for judged in drafts]
    n_requests = [_n_requests(problem, plan) for plan in plans]
    seconds = sum(n_requests) * (REQUEST_S + problem.workload.output_tokens * TOKEN_S)
    if max(n_requests) > MAX_REQUESTS or seconds > run.left_s:
        return []
    workload = replace(problem.workload, arrivals=_arrivals(problem))
    return [
        simulate(plan, problem.cluster, problem.spec, workload, n_requests=n, seed=seed)
        for plan, n in zip(plans, n_requests, strict=True)
    ]


def _trial(problem: Problem, judged: Judged, by: str, result: SimResult) -> Trial:
    is_in_time = isinstance(problem.objective, Goodput)
    figures = Figures(
        requests_per_s=result.goodput_requests_per_s if is_in_time else result.requests_per_s,
        latency_s=result.end_to_end_s.mean,
        price_per_h=judged.figures.price_per_h,
        n_devices=judged.figures.n_devices,
    )
    return Trial(judged=judged, by=by, result=result, worth=problem.objective.worth(figures))
