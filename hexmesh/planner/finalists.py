"""The last word on drafts that the score cannot tell apart: a simulation with the daemon's own batcher and router.

The score is a steady state: no queues, no chance, no prompts that come in a bad moment. Drafts within CLOSE of the best
are put through the same requests, and the one that does best there is chosen, unless the score's own favourite does
as well within what the simulation can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec.structs import replace

from hexmesh.planner.finish import finish
from hexmesh.planner.objective import ONE_AT_A_TIME, Figures, Goodput, Latency, Worth
from hexmesh.planner.problem import Judged, Problem
from hexmesh.planner.run import Run
from hexmesh.sim import SimResult, simulate
from hexmesh.workload import PoissonArrivals

CLOSE = 0.03
"""How far below the best a draft's figure may be."""
OVERLAP = 0.3
"""As far below may the best draft of mixed replicas be: the score adds what prompts and outputs take of a step, whose
memory and arithmetic in truth overlap."""
MAX_FINALISTS = 3
N_REQUESTS = 2000
TELLS = 0.01
"""What two runs of one plan differ by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A draft, who found it, and what it did."""

    judged: Judged
    by: str
    result: SimResult
    worth: Worth


def choose_finalist(run: Run, *, seed: int) -> tuple[Trial, ...]:
    """Simulates the best drafts and makes the winner the run's best; the trials, the score's favourite first."""
    trials = tuple(_tried(run.problem, judged, by, seed) for judged, by in _finalists(run) if not run.is_over)
    if len(trials) > 1:
        winner = max(trials, key=lambda trial: trial.worth)
        if _is_clearly_better(winner.worth, trials[0].worth):
            run.best = winner.judged
            run.notes.append(
                f"the draft of {winner.by} did better in simulation than the score's favourite, of {trials[0].by}: "
                f"{winner.result.requests_per_s:.4g} against {trials[0].result.requests_per_s:.4g} requests/s"
            )
    return trials


def simulated(problem: Problem, judged: Judged, *, seed: int, n_requests: int = N_REQUESTS) -> SimResult:
    """A draft at its highest rate; for the latency objective at the rate that is asked for."""
    plan = finish(
        problem,
        judged,
        model_id="",
        model_name="",
        max_model_tokens=problem.spec.max_position_tokens,
        hosts={node.id: 0 for node in problem.cluster.nodes},
    )
    return simulate(
        plan,
        problem.cluster,
        problem.spec,
        replace(problem.workload, arrivals=_arrivals(problem)),
        n_requests=n_requests,
        seed=seed,
    )


def _arrivals(problem: Problem) -> PoissonArrivals | None:
    objective = problem.objective
    if isinstance(objective, Latency) and objective.requests_per_s > ONE_AT_A_TIME:
        return PoissonArrivals(requests_per_s=objective.requests_per_s)
    return None


def _finalists(run: Run) -> list[tuple[Judged, str]]:
    """Different drafts about as good as the best, the best first, and the best of those that hand nothing over."""
    if run.best is None:
        return []
    best = run.best.worth
    ranked = sorted(run.best_by.items(), key=lambda item: item[1].worth, reverse=True)
    drafts = {judged.draft: (judged, by) for by, judged in reversed(ranked)}
    close = [one for one in drafts.values() if _is_close(one[0].worth, best, CLOSE)][::-1]
    together = [
        one
        for one in drafts.values()
        if one not in close and _hands_nothing_over(one[0]) and _is_close(one[0].worth, best, OVERLAP)
    ][::-1]
    return [*close[:MAX_FINALISTS], *together[:1]]


def _hands_nothing_over(judged: Judged) -> bool:
    return all(layout.role == "mixed" for layout in judged.draft)


def _is_close(worth: Worth, best: Worth, share: float) -> bool:
    """In both of the figures that decide."""
    return all(a >= b - share * abs(b) for a, b in zip(worth[:2], best[:2], strict=True))


def _is_clearly_better(worth: Worth, than: Worth) -> bool:
    first, other = worth[0] - than[0], TELLS * abs(than[0])
    return first > other or (abs(first) <= other and worth[1] > than[1] + TELLS * abs(than[1]))


def _tried(problem: Problem, judged: Judged, by: str, seed: int) -> Trial:
    result = simulated(problem, judged, seed=seed)
    is_in_time = isinstance(problem.objective, Goodput)
    figures = Figures(
        requests_per_s=result.goodput_requests_per_s if is_in_time else result.requests_per_s,
        latency_s=result.end_to_end_s.mean,
        price_per_h=judged.figures.price_per_h,
        n_devices=judged.figures.n_devices,
    )
    return Trial(judged=judged, by=by, result=result, worth=problem.objective.worth(figures))
