"""Replicas are called what they do: one that was free to do both phases and does one of them has that role."""

from __future__ import annotations

from hexmesh.cluster import Role
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import team_of
from hexmesh.planner.problem import Judged, Problem


def named_by_use(problem: Problem, judged: Judged) -> Judged:
    """The same devices and cuts, at least as good; mixed replicas that do one phase alone are pure ones."""
    draft = tuple(
        _named(problem, layout, judged.flow.prefill[f"r{at}"], judged.flow.decode[f"r{at}"])
        for at, layout in enumerate(judged.draft)
    )
    if draft == judged.draft:
        return judged
    renamed = problem.judge(draft)
    return renamed if renamed.worth >= judged.worth else judged


def _named(problem: Problem, layout: Layout, prompts: float, outputs: float) -> Layout:
    if layout.role != "mixed" or (prompts > 0) == (outputs > 0):
        return layout
    role: Role = "prefill" if prompts > 0 else "decode"
    if not problem.may_be(team_of(layout.parts), role):
        return layout
    return problem.layouts.rated(layout.parts, role) or layout
