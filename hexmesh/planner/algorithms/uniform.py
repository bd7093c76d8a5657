"""Symmetric TP x PP: every replica alike in shape, whatever it runs on.

What people configure by hand, and what HexGen (arXiv 2311.11514) compares its asymmetric plans to: one TP degree and
one number of stages for the whole fleet, layers dealt out evenly, groups taken in the order of the hosts. Every pair
of the two is tried. Without mixed replicas, those with the least decode for their prefill do prefill, as many as
balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from hexmesh.papers.hexgen_layout import even_layers
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part, team_of
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run

MAX_STAGES = 16

Parts = tuple[Part, ...]


def search(run: Run) -> None:
    """Offers a draft for every TP degree and number of stages."""
    run.offer_all(_drafts(run.problem), "uniform")


def _drafts(problem: Problem) -> Iterator[Draft]:
    for tp in sorted({tp for pool in problem.pools for tp in pool.degrees}):
        slots = _slots(problem, tp)
        for n_stages in range(1, min(MAX_STAGES, len(slots), problem.spec.n_layers) + 1):
            replicas = list(_replicas(problem, slots, tp, n_stages))
            draft = _mixed(problem, replicas) if "mixed" in problem.roles else two_phases(problem, replicas)
            if draft:
                yield draft


def _slots(problem: Problem, tp: int) -> list[int]:
    """The pool of every group of `tp` devices, hosts of a site one after the other."""
    order = sorted(range(len(problem.pools)), key=lambda at: (problem.pools[at].node.site, at))
    return [
        at for at in order if tp in problem.pools[at].degrees for _ in range(problem.pools[at].size // tp)
    ]


def _replicas(problem: Problem, slots: list[int], tp: int, n_stages: int) -> Iterator[Parts]:
    bounds = list(accumulate(even_layers(problem.spec.n_layers, n_stages), initial=0))
    for first in range(0, len(slots) - n_stages + 1, n_stages):
        own = slots[first : first + n_stages]
        yield tuple(
            Part(pool=pool, tp=tp, start=start, stop=stop)
            for pool, (start, stop) in zip(own, pairwise(bounds), strict=True)
        )


def _mixed(problem: Problem, replicas: list[Parts]) -> Draft:
    layouts = (
        problem.layouts.rated(parts, "mixed") for parts in replicas if problem.may_be(team_of(parts), "mixed")
    )
    return tuple(layout for layout in layouts if layout is not None)


def two_phases(problem: Problem, replicas: list[Parts]) -> Draft:
    """The same replicas as prefill and decode ones, cut where the slower phase is fastest."""
    pairs = [
        (_in_phase(problem, parts, "prefill"), _in_phase(problem, parts, "decode")) for parts in replicas
    ]
    pairs.sort(key=lambda pair: _rate(pair[1]) / max(_rate(pair[0]), 1e-30))
    cuts = range(1, len(pairs))
    at = max(cuts, key=lambda cut: _slower(pairs, cut), default=0)
    chosen = [p for p, _ in pairs[:at]] + [d for _, d in pairs[at:]]
    return tuple(layout for layout in chosen if layout is not None)


def _in_phase(problem: Problem, parts: Parts, phase: str) -> Layout | None:
    role = "prefill" if phase == "prefill" else "decode"
    return problem.layouts.rated(parts, role) if problem.may_be(team_of(parts), role) else None  # type: ignore[arg-type]


def _slower(pairs: list[tuple[Layout | None, Layout | None]], cut: int) -> float:
    return min(sum(_rate(p) for p, _ in pairs[:cut]), sum(_rate(d) for _, d in pairs[cut:]))


def _rate(layout: Layout | None) -> float:
    return 0.0 if layout is None else layout.requests_per_s
