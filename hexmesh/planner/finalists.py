"""The last word on drafts that the score cannot tell apart: a simulation with the daemon's own batcher and router.

The score is a steady state: no queues, no chance, no prompts that come in a bad moment. Drafts within CLOSE of the best
are put through the same requests, and the one that does best there is chosen, unless the score's own favourite does
as well within what the simulation can tell.
"""

from __future__ import annotations

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
    finalists = _affordable(run, [_finalist(run.problem, judged, by) for judged, by in _finalists(run)])
    if len(finalists) < 2:
        return
    trials = [_trial(run.problem, finalist, seed) for finalist in finalists]
    winner = max(trials, key=lambda trial: trial.worth)
    if _is_clearly_better(winner.worth, trials[0].worth):
        run.best = winner.judged
        run.notes.append(
            f"the draft of {winner.by} did better in simulation than the score's favourite, of {trials[0].by}: "
            f"{winner.result.requests_per_s:.4g} against {trials[0].result.requests_per_s:.4g} requests/s"
        )


@dataclass(frozen=True, slots=True)
class _Finalist:
    """A draft, who found it, its plan, and how many requests that is to be simulated for."""

    judged: Judged
    by: str
    plan: Plan
    n_requests: int


def _finalist(problem: Problem, judged: Judged, by: str) -> _Finalist:
    plan = finish(
        problem,
        judged,
        model_id="",
        model_name="",
        max_model_tokens=problem.spec.max_position_tokens,
        hosts={node.id: 0 for node in problem.cluster.nodes},
    )
    n_to_end = n_to_settle(plan) if _arrivals(problem) is None else 0
    return _Finalist(judged, by, plan, max(MIN_REQUESTS, n_to_end))


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


def _affordable(run: Run, finalists: list[_Finalist]) -> list[_Finalist]:
    """As many as time allows; of those between, the worst are left out first."""
    token_s = run.problem.workload.output_tokens * TOKEN_S
    while len(finalists) > 1:
        lengths = [one.n_requests for one in finalists]
        if max(lengths) <= MAX_REQUESTS and sum(lengths) * (REQUEST_S + token_s) <= run.left_s:
            break
        finalists = [*finalists[:-2], finalists[-1]] if len(finalists) > 2 else finalists[:1]
    return finalists


def _trial(problem: Problem, finalist: _Finalist, seed: int) -> Trial:
    """At its highest rate; for the latency objective at the rate that is asked for."""
    result = simulate(
        finalist.plan,
        problem.cluster,
        problem.spec,
        replace(problem.workload, arrivals=_arrivals(problem)),
        n_requests=finalist.n_requests,
        seed=seed,
    )
    is_in_time = isinstance(problem.objective, Goodput)
    figures = Figures(
        requests_per_s=result.goodput_requests_per_s if is_in_time else result.requests_per_s,
        latency_s=result.end_to_end_s.mean,
        price_per_h=finalist.judged.figures.price_per_h,
        n_devices=finalist.judged.figures.n_devices,
    )
    return Trial(
        judged=finalist.judged, by=finalist.by, result=result, worth=problem.objective.worth(figures)
    )
