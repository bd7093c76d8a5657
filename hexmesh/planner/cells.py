"""Partitions with their roles, looked into layout by layout: the best first, until none promises enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hexmesh.planner.cell import Cell, Prices
from hexmesh.planner.changes import Grouped
from hexmesh.planner.every_layout import EveryLayout
from hexmesh.planner.handoff_caps import HandoffCaps
from hexmesh.planner.problem import Draft, Judged, Problem
from hexmesh.score.plan_score import kv_layer_bytes

Floats = npt.NDArray[np.float64]


class Cells:
    """Cells of one problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.layouts = EveryLayout(problem)
        self._wires = HandoffCaps(problem.cluster, kv_layer_bytes(problem.capacities))
        self._caps = dict[tuple[Grouped, Grouped], Floats]()
        self._prices = dict[tuple[Grouped, ...], list[Prices]]()

    def of(self, grouped: tuple[Grouped, ...]) -> Cell | None:
        """With the prices of what was judged of it before; None where a team cannot have its role."""
        choices = [self.layouts.of(team).get(role) for team, role in grouped]
        if None in choices:
            return None
        n, roles = len(grouped), [role for _, role in grouped]
        return Cell(
            self._problem,
            self._wires,
            [choice for choice in choices if choice is not None],
            roles,
            {
                (p, d): self._cap(grouped[p], grouped[d])
                for p in range(n)
                for d in range(n)
                if p != d and roles[p] != "decode" and roles[d] != "prefill"
            },
            self._prices.setdefault(grouped, []),
        )

    def _cap(self, source: Grouped, target: Grouped) -> Floats:
        """By placements of both."""
        key = source, target
        if key not in self._caps:
            a, b = (self.layouts.of(team)[role] for team, role in key)
            self._caps[key] = self._wires.of(a.placements[0], b.placements[0])
        return self._caps[key]


def look_into(
    cell: Cell,
    judge: Callable[[Draft], Judged],
    enough: Callable[[], float],
    chosen: Mapping[int, int] | None = None,
) -> None:
    """Judges drafts of the cell, the most promising first, while any promises more than is enough by then.

    What is judged on the way tells what need not be looked into.
    """
    chosen = chosen or {}
    if len(chosen) == len(cell.choices):
        draft = cell.draft(chosen)
        if draft is not None:
            cell.learn(judge(draft))
        return
    at = next(at for at in cell.order if at not in chosen)
    bounds, n_known = cell.bounds(chosen, at), 0
    while True:
        least = enough()
        bounds = cell.lowered(bounds, chosen, at, enough=least, n_known=n_known)
        n_known, layout = len(cell.prices), int(bounds.argmax())
        if bounds[layout] <= least:
            return
        look_into(cell, judge, enough, {**chosen, at: layout})
        bounds[layout] = -np.inf
