"""Plans for a running mesh: the planner's search, within what a mesh that serves must hold to.

The search (`hexmesh.planner.front`) makes the rate as high as it can be. Beside that a running mesh wants

- room in every replica for one sequence of prompt and output, and for one of the model's full length, or its half,
  quarter and so on, where that keeps LONG_CONTEXT_COST of the rate;
- more replicas and fewer devices among drafts that are about as good (`spread`), and even pipelines (`even`);
- what serves now left where it is, unless another plan is KEEP_GAIN faster or has more replicas (`present`);
- no more KV than can be used, and a word for every device that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from hexmesh.cluster import Cluster
from hexmesh.cost import STEP_TOKENS
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName, Plan
from hexmesh.planner.algorithms import alone
from hexmesh.planner.front import search
from hexmesh.planner.objective import Objective, Throughput
from hexmesh.planner.problem import Judged, Problem
from hexmesh.schedule.even import evened
from hexmesh.schedule.explain import explain
from hexmesh.schedule.misfit import NoFit, misfit
from hexmesh.schedule.present import Present, carried, present_replicas, without
from hexmesh.schedule.spread import TOLERANCE, spread
from hexmesh.schedule.wish import Wish
from hexmesh.schedule.writing import Choice, write_plan
from hexmesh.workload import Workload

KEEP_GAIN = 1.05
"""New replicas must be this much faster than the present ones to be worth moving layers."""
KEEP_GAIN_AFTER_LOSS = 2.0
"""The same while a loss is being made good: what still serves shall go on, and may be moved later."""
LONG_CONTEXT_COST = 0.8
"""A layout with room for longer sequences is taken if it keeps this share of the best rate."""
BUDGET_S = 60.0
"""For all searches of a planning, where the caller has a clock."""
_LEAST_SEARCH_S = 0.2
"""What the last ones get in any case."""
_MOST_TRIES = 9
"""Ways to keep some of the present replicas that are looked at."""
_SEED = 0


def lay_out(
    cluster: Cluster,
    spec: ModelSpec,
    dtype: DtypeName,
    workload: Workload,
    *,
    model_id: str,
    model_name: str,
    hosts: Mapping[str, int],
    max_model_tokens: int,
    objective: Objective = Throughput(),  # noqa: B008 - it has no state
    algorithm: str = "auto",
    block_tokens: int = 16,
    step_tokens: int = STEP_TOKENS,
    reason: str = "",
    current: Plan | None = None,
    keep_gain: float = KEEP_GAIN,
    tolerance: float = TOLERANCE,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = lambda: 0.0,
) -> Plan | NoFit:
    """The plan over the devices of `hosts`, or why there is none.

    With an infinite `keep_gain` present replicas are kept at any price. The same input gives the same plan, unless
    `clock` passes `budget_s` in a search.
    """
    wish = Wish(
        everywhere=cluster,
        hosts=hosts,
        spec=spec,
        dtype=dtype,
        workload=workload,
        objective=objective,
        max_model_tokens=max_model_tokens,
        block_tokens=block_tokens,
        step_tokens=step_tokens,
    )
    searcher = _Searcher(
        wish=wish,
        algorithm=algorithm,
        keep_gain=keep_gain,
        tolerance=tolerance,
        deadline_s=clock() + budget_s,
        clock=clock,
    )
    best = searcher.longest()
    if best is None:
        return misfit(cluster, wish.costs, wish.floors[0], wish.places, hosts)
    present = present_replicas(current, wish, best.problem, model_id)
    kept = searcher.keep(best, present)
    chosen = _recognised(best, present) if kept is None else kept
    plan = write_plan(wish, chosen, model_id=model_id, model_name=model_name, reason=reason)
    notes = () if kept is None else (_kept_note(wish, best, kept, present, keep_gain),)
    return msgspec.structs.replace(plan, explanation=(*explain(plan, cluster, spec, wish.asked), *notes))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Searcher:
    """Searches of one planning."""

    wish: Wish
    algorithm: str
    keep_gain: float
    tolerance: float
    deadline_s: float
    clock: Callable[[], float]

    def longest(self) -> Choice | None:
        """The best draft for the longest sequences that are worth their cost; None if nothing fits."""
        floors = self.wish.floors
        shortest = self._at(floors[0])
        if shortest is None:
            return None
        least = LONG_CONTEXT_COST * shortest.requests_per_s
        longest, low, high = shortest, 1, len(floors) - 1
        middle = high  # most often the model's full length is to be had
        while low <= high:
            found = self._at(floors[middle])
            if found is not None and found.requests_per_s >= least:
                longest, low = found, middle + 1
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return Choice(
            problem=longest.problem,
            judged=self._settled(longest.problem, longest.judged),
            floor_tokens=longest.floor_tokens,
            stays={},
        )

    def keep(self, best: Choice, present: Sequence[Present]) -> Choice | None:
        """A draft with present replicas as they are, all or all but one, if it is about as good as `best`."""
        tries = [list(present), *([one for one in present if one is not left] for left in present)]
        for kept in tries[:_MOST_TRIES] if present else []:
            if kept is not tries[0] and self.clock() >= self.deadline_s:
                break
            choice = self._around(best, kept) if kept else None
            if (
                choice is not None
                and choice.requests_per_s * self.keep_gain > best.requests_per_s
                and (choice.n_replicas >= best.n_replicas or math.isinf(self.keep_gain))
            ):
                return choice
        return None

    def _around(self, best: Choice, kept: Sequence[Present]) -> Choice:
        """`kept`, and the best replicas over the devices that those leave."""
        left = self.wish.problem(best.floor_tokens, without(self.wish.cluster, kept))
        found = self._search(left) if left.pools else None
        more = [] if found is None else carried(self._settled(left, found).draft, left, best.problem)
        draft = (*(one.layout for one in kept), *more)
        return Choice(
            problem=best.problem,
            judged=best.problem.judge(draft),
            floor_tokens=best.floor_tokens,
            stays={at: one.replica for at, one in enumerate(kept)},
        )

    def _at(self, floor_tokens: int) -> Choice | None:
        problem = self.wish.problem(floor_tokens)
        judged = self._search(problem) if problem.pools else None
        if judged is None:
            return None
        return Choice(problem=problem, judged=judged, floor_tokens=floor_tokens, stays={})

    def _settled(self, problem: Problem, judged: Judged) -> Judged:
        return evened(problem, spread(problem, judged, self.tolerance), self.tolerance)

    def _search(self, problem: Problem) -> Judged | None:
        budget_s = max(_LEAST_SEARCH_S, (self.deadline_s - self.clock()) / 2)
        found = (
            search(problem, algorithm, seed=_SEED, clock=self.clock, budget_s=budget_s).best
            for algorithm in self._algorithms(problem)
        )
        return max(
            (judged for judged in found if judged is not None),
            key=lambda judged: judged.worth,
            default=None,
        )

    def _algorithms(self, problem: Problem) -> tuple[str, ...]:
        """Where nothing is handed over the portfolio has nothing to weigh, and would take its time over it."""
        if self.algorithm != "auto" or problem.hands_over:
            return (self.algorithm,)
        return ("alone",) if alone.suits(problem) else ("greedy", "colocated")


def _recognised(choice: Choice, present: Sequence[Present]) -> Choice:
    """Layouts that are laid out like a present replica are that replica."""
    stays = {}
    for one in present:
        for at, layout in enumerate(choice.judged.draft):
            if at not in stays and (layout.role, layout.parts) == (one.layout.role, one.layout.parts):
                stays[at] = one.replica
                break
    return replace(choice, stays=stays)


def _kept_note(wish: Wish, best: Choice, kept: Choice, present: Sequence[Present], keep_gain: float) -> str:
    n_stay = len(kept.stays)
    is_as_before = n_stay == len(present) == kept.n_replicas
    if _is_like(best, kept):
        return "the layout is as before" if is_as_before else f"{n_stay} of the replicas stay where they are"
    what = "kept the present layout" if is_as_before else f"kept {n_stay} of the replicas where they are"
    tokens = wish.asked.output_tokens
    least = "" if math.isinf(keep_gain) else f", less than {round((keep_gain - 1) * 100)} % more"
    return (
        f"{what}: another layout would give {_show(best.requests_per_s * tokens)} instead of "
        f"{_show(kept.requests_per_s * tokens)} tokens/s{least}"
    )


def _is_like(one: Choice, other: Choice) -> bool:
    def parts(choice: Choice) -> list[str]:
        return sorted(repr((layout.role, layout.parts)) for layout in choice.judged.draft)

    return parts(one) == parts(other)


def _show(rate: float) -> str:
    return f"{rate:.4g}" if rate < 1e4 else f"{rate:.0f}"
