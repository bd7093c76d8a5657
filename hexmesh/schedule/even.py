"""Among cuts that are about as good: the one whose slowest stage is fastest.

Where the way around sets the rate (few sequences at once, slow links), the search may cut as it likes; an even pipeline
then has most to spare when more requests come, or when a stage turns out slower than measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Judged, Problem


def evened(problem: Problem, judged: Judged, tolerance: float) -> Judged:
    """The draft with its mixed replicas cut evenly, each within `tolerance` of its rate."""
    draft = tuple(
        _evened(problem, layout, layout.requests_per_s * (1 - tolerance))
        if layout.role == "mixed"
        else layout
        for layout in judged.draft
    )
    return judged if draft == judged.draft else problem.judge(draft)


def _evened(problem: Problem, layout: Layout, least: float) -> Layout:
    """Boundaries are moved while that speeds up the slowest stage, by many layers first, at last by one."""
    shift = max(1, problem.spec.n_layers // 4)
    slowest_s = _slowest_s(problem, layout)
    while shift:
        better = [
            (_slowest_s(problem, other), at, other)
            for at, parts in enumerate(_moved(layout.parts, shift))
            if (other := problem.layouts.rated(parts, layout.role)) is not None
            and other.requests_per_s >= least
        ]
        best = min(better, default=None, key=lambda one: one[:2])
        if best is not None and best[0] < slowest_s * (1 - 1e-9):
            slowest_s, _, layout = best
        else:
            shift //= 2
    return layout


def _moved(parts: tuple[Part, ...], shift: int) -> Iterator[tuple[Part, ...]]:
    """Every boundary moved by so many layers, either way."""
    for at in range(len(parts) - 1):
        before, after = parts[at], parts[at + 1]
        for cut in (before.stop - shift, before.stop + shift):
            if before.start < cut < after.stop:
                first = Part(pool=before.pool, tp=before.tp, start=before.start, stop=cut)
                second = Part(pool=after.pool, tp=after.tp, start=cut, stop=after.stop)
                yield (*parts[:at], first, second, *parts[at + 2 :])


def _slowest_s(problem: Problem, layout: Layout) -> float:
    """Of a step of as many sequences as the layout has at once."""
    batch = max(1.0, layout.batch * layout.micro_batches)
    return max(problem.capacities.step_s(problem.seat(part), batch) for part in layout.parts)
