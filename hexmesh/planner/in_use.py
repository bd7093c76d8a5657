"""What of a draft is used: a plan has no replicas that serve nothing, and neither has its account."""

from __future__ import annotations

from hexmesh.planner.problem import Judged, Problem


def in_use(problem: Problem, judged: Judged) -> Judged:
    """The draft without replicas that no request goes through, so that its names are those of the plan."""
    while True:
        used = {name for pair in judged.flow.flows for name in pair}
        if len(used) in (0, len(judged.draft)):
            return judged
        judged = problem.judge(tuple(layout for at, layout in enumerate(judged.draft) if f"r{at}" in used))
