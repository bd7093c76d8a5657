"""Which drafts the simulator judges, and when its word counts. A fake simulator says what a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from hexmesh.cluster import Role
from hexmesh.plan import Plan
from hexmesh.planner import finalists
from hexmesh.planner.front import search
from hexmesh.planner.problem import Judged, Problem
from hexmesh.planner.run import Run
from tests.unit.planner.named_fleets import named_problem


@cache
def _problem() -> Problem:
    return named_problem("mixed-24")


@cache
def _judged(*roles: Role) -> Judged:
    problem = named_problem("mixed-24", roles=frozenset(roles))
    algorithm = "greedy" if roles == ("mixed",) else "hexgen2-wide"
    found = search(problem, algorithm, seed=1, clock=lambda: 0.0, budget_s=float("inf")).best
    assert found is not None
    return found


def _split(rate: float) -> Judged:
    """Requests cross between replicas."""
    return _at(_judged("prefill", "decode"), rate)


def _together(rate: float) -> Judged:
    return _at(_judged("mixed"), rate)


def _at(judged: Judged, rate: float) -> Judged:
    return replace(judged, worth=(rate, *judged.worth[1:]))


def _run(drafts: dict[str, Judged], budget_s: float = float("inf")) -> Run:
    run = Run(problem=_problem(), rng=random.Random(1), clock=lambda: 0.0, budget_s=budget_s)
    run.best_by = drafts
    run.best = max(drafts.values(), key=lambda judged: judged.worth)
    return run


def _simulating(monkeypatch: pytest.MonkeyPatch, rate_of: Callable[[Plan], float]) -> list[bool]:
    """Tells for each simulated plan whether it hands over."""
    seen = list[bool]()

    def fake(plan: Plan, *_: object, **__: object) -> SimpleNamespace:
        seen.append(_hands_over(plan))
        return SimpleNamespace(requests_per_s=rate_of(plan), end_to_end_s=SimpleNamespace(mean=1.0))

    monkeypatch.setattr(finalists, "simulate", fake)
    return seen


def _hands_over(plan: Plan) -> bool:
    return any(replica.role != "mixed" for replica in plan.replicas)


def test_the_two_drafts_differ_in_handing_over() -> None:
    assert any(layout.role != "mixed" for layout in _split(1.0).draft)
    assert all(layout.role == "mixed" for layout in _together(1.0).draft)


@pytest.mark.parametrize(("together", "simulated", "wins"), [(98.0, 103.0, True), (98.0, 101.0, False)])
def test_a_draft_that_is_close_wins_if_it_does_clearly_better(
    monkeypatch: pytest.MonkeyPatch, together: float, simulated: float, wins: bool
) -> None:
    _simulating(monkeypatch, lambda plan: 100.0 if _hands_over(plan) else simulated)
    run = _run({"hexgen2-wide": _split(100.0), "greedy": _together(together)})
    finalists.choose_finalist(run, seed=0)
    assert run.best is not None
    assert (run.best.worth[0] == together) is wins
    assert bool(run.notes) is wins


@pytest.mark.parametrize(("rate", "is_tried"), [(85.0, True), (75.0, False)])
def test_one_that_hands_nothing_over_is_tried_from_further_below(
    monkeypatch: pytest.MonkeyPatch, rate: float, is_tried: bool
) -> None:
    seen = _simulating(monkeypatch, lambda plan: 60.0 if _hands_over(plan) else 80.0)
    run = _run({"hexgen2-wide": _split(100.0), "greedy": _together(rate)})
    finalists.choose_finalist(run, seed=0)
    assert seen == ([True, False] if is_tried else [])
    assert run.best is not None
    assert run.best.worth[0] == (rate if is_tried else 100.0)


def test_one_that_hands_over_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _simulating(monkeypatch, lambda plan: 1.0)
    finalists.choose_finalist(_run({"greedy": _together(100.0), "hexgen2-wide": _split(85.0)}), seed=0)
    assert seen == []


def test_without_time_the_score_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _simulating(monkeypatch, lambda plan: 1.0)
    run = _run({"hexgen2-wide": _split(100.0), "greedy": _together(99.0)}, budget_s=0.5)
    finalists.choose_finalist(run, seed=0)
    assert seen == []
    assert run.best is not None
    assert run.best.worth[0] == 100.0
