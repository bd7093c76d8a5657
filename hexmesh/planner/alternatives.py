"""Why these roles and why these cuts: what the nearest other choice would have given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hexmesh.cluster import Role
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import ROLES, team_of
from hexmesh.planner.problem import Draft
from hexmesh.planner.trials import Trials
from hexmesh.units import show_duration

_DOES = {
    "mixed": ("prefills and decodes", "prefill and decode"),
    "prefill": ("prefills", "prefill"),
    "decode": ("decodes", "decode"),
}
MAX_LINES = 8


def role_lines(trials: Trials) -> Iterator[str]:
    """A line for each kind of replica: what it would give in another role."""
    for at, same in list(trials.kinds())[:MAX_LINES]:
        layout = trials.judged.draft[at]
        others = [role for role in ROLES if role != layout.role]
        tried = [said for role in others if (said := _as_role(trials, at, role)) is not None]
        does = f"{names_of(same)} {_DOES[layout.role][len(same) > 1]}"
        may = [role for role in others if trials.problem.may_be(team_of(layout.parts), role)]
        if tried:
            yield f"{does}: {'; '.join(tried)}"
        elif not may:
            yield f"{does}: no other role is allowed there"
        else:
            yield f"{does}: in another role it keeps no limit, or has no room"


def _as_role(trials: Trials, at: int, role: Role) -> str | None:
    problem, team = trials.problem, team_of(trials.judged.draft[at].parts)
    if not problem.may_be(team, role):
        return None
    layout = problem.layouts.best(team, role)
    judged = None if layout is None else trials.judge(trials.with_layout(at, layout))
    if judged is None:
        return None
    if judged.flow.requests_per_s <= 0:
        return f"as {role} nothing would be served"
    return f"as {role} {trials.than(judged)}"


def cut_lines(trials: Trials) -> Iterator[str]:
    """A line for each kind of replica of several stages: their steps, and what moving a layer costs."""
    kinds = [at for at in trials.kinds() if len(trials.judged.draft[at[0]].parts) > 1]
    for at, same in kinds[:MAX_LINES]:
        layout = trials.judged.draft[at]
        yield f"{names_of(same)}: {_steps(trials, layout)}; {_moved(trials, at)}"


def _steps(trials: Trials, layout: Layout) -> str:
    problem = trials.problem
    if layout.role == "prefill":
        stages = [problem.pipeline((part,)) for part in layout.parts]
        times = [problem.capacities.prefill(stage).latency_s for stage in stages]
    else:
        seats = [problem.seat(part) for part in layout.parts]
        times = [problem.capacities.step_s(seat, max(1.0, layout.batch)) for seat in seats]
    shown = ", ".join(show_duration(time_s) for time_s in times[:6]) + (" ..." if len(times) > 6 else "")
    return f"a {'prompt' if layout.role == 'prefill' else 'token'} takes its stages {shown}"


def _moved(trials: Trials, at: int) -> str:
    best = trials.best(_shifts(trials, at))
    if best is None:
        return "no layer can move: memory is full"
    if trials.is_better(best):
        return f"with one layer moved {trials.than(best)}: a longer search may find that"
    return f"with one layer moved {trials.than(best)} at best"


def _shifts(trials: Trials, at: int) -> Iterator[Draft]:
    """Every boundary moved by a layer, either way."""
    parts = trials.judged.draft[at].parts
    for index in range(len(parts) - 1):
        a, b = parts[index : index + 2]
        for by in (-1, 1):
            cut = a.stop + by
            if a.start < cut < b.stop:
                moved = (replace(a, stop=cut), replace(b, start=cut))
                draft = trials.rated(at, (*parts[:index], *moved, *parts[index + 2 :]))
                if draft is not None:
                    yield draft


def names_of(same: list[int]) -> str:
    """Such as "r0, r1"."""
    shown = ", ".join(f"r{at}" for at in same[:4])
    return shown if len(same) <= 4 else f"{shown} and {len(same) - 4} more"
