"""DistServe's placement (OSDI 2024, arXiv 2401.09670): each phase its own TP and PP, then as many instances as balance.

From the paper: a fleet is homogeneous; TP stays in a host, layers are dealt out evenly, and every (TP, PP) of either
phase is rated. Where the network is good (its algorithm 1), instances stand anywhere. Where it is not (its algorithm
2), both phases have the same stages and each stage's instances of both share a host, so that KV stays inside it.

What differs: devices of several kinds or sites are planned kind by kind, site by site, as the method knows no other
way, and what it finds for each is put together. The paper takes the (TP, PP) of each phase by goodput per device and
replicates until a rate is met; a fleet here has a size, so pairs are compared by what their instances give at that
size, which comes to the same where it is large. Rates are closed forms, not simulated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Literal

from hexmesh.papers.hexgen_layout import even_layers
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part, team_of
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run

Phase = Literal["prefill", "decode"]
MAX_STAGES = 8
FINALISTS = 8
"""Pairs that are placed, the best by their rates."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one instance of a phase is laid out, and its rate where it stands as closely as it can."""

    tp: int
    n_stages: int
    rate: float

    @property
    def n_devices(self) -> int:
        return self.tp * self.n_stages


@dataclass(frozen=True, slots=True)
class Mix:
    """So many instances of each phase."""

    rate: float
    prefill: Strategy
    decode: Strategy
    n_prefill: int
    n_decode: int


def search(run: Run) -> None:
    """Offers one draft for good networks and one for others."""
    if not {"prefill", "decode"} <= run.problem.roles:
        run.notes.append("distserve needs prefill and decode replicas, which were not asked for")
        return
    kinds = alike(run.problem)
    for place in (placed_anywhere, placed_together):
        draft = tuple(layout for kind in kinds for layout in place(run.problem, kind))
        if draft:
            run.offer(draft, "distserve")
        if run.is_over:
            return


def alike(problem: Problem) -> list[list[int]]:
    """Pools of each kind in each site."""
    kinds = defaultdict[object, list[int]](list)
    for at, pool in enumerate(problem.pools):
        node = pool.node
        kinds[node.site, pool.device, node.fabric, node.launch_s, node.step_s, pool.degrees].append(at)
    return list(kinds.values())


def placed_anywhere(problem: Problem, kind: Sequence[int]) -> Draft:
    """Algorithm 1: the best draft of the best mixes."""
    phases: tuple[Phase, Phase] = ("prefill", "decode")
    prefill, decode = (list(strategies(problem, kind, phase)) for phase in phases)
    n_devices = sum(problem.pools[pool].size for pool in kind)
    mixes = [mix for p, d in product(prefill, decode) if (mix := best_mix(p, d, n_devices)) is not None]
    mixes.sort(key=lambda mix: -mix.rate)
    drafts = (_instances(problem, kind, mix) for mix in mixes[:FINALISTS])
    return max(drafts, key=balanced_rate, default=())


def strategies(problem: Problem, kind: Sequence[int], phase: Phase) -> Iterator[Strategy]:
    """Every (TP, PP) that fits, with its rate on empty hosts."""
    for tp in problem.pools[kind[0]].degrees:
        slots = sum(problem.pools[pool].size // tp for pool in kind)
        for n_stages in range(1, min(MAX_STAGES, slots, problem.spec.n_layers) + 1):
            seats = take(_room(problem, kind), tp, n_stages)
            layout = None if seats is None else _rated(problem, seats, tp, phase)
            if layout is not None and layout.requests_per_s > 0:
                yield Strategy(tp, n_stages, layout.requests_per_s)


def best_mix(prefill: Strategy, decode: Strategy, n_devices: int) -> Mix | None:
    """The numbers of instances that serve most on so many devices; None if there is not room for one of each."""
    best = None
    for n_prefill in range(1, (n_devices - decode.n_devices) // prefill.n_devices + 1):
        n_decode = (n_devices - n_prefill * prefill.n_devices) // decode.n_devices
        rate = min(n_prefill * prefill.rate, n_decode * decode.rate)
        if best is None or rate > best.rate:
            best = Mix(rate, prefill, decode, n_prefill, n_decode)
    return best


def _instances(problem: Problem, kind: Sequence[int], mix: Mix) -> Draft:
    """As many of a mix's instances as find room, those of larger TP groups first."""
    room, found = _room(problem, kind), list[Layout]()
    phases = [("prefill", mix.prefill)] * mix.n_prefill + [("decode", mix.decode)] * mix.n_decode
    for phase, strategy in sorted(phases, key=lambda one: -one[1].tp):
        seats = take(room, strategy.tp, strategy.n_stages)
        layout = None if seats is None else _rated(problem, seats, strategy.tp, phase)  # type: ignore[arg-type]
        if layout is not None:
            found.append(layout)
    return tuple(found)


def take(room: dict[int, int], tp: int, n_stages: int) -> list[int] | None:
    """The pool of each stage, one host if one has room, the tightest such; takes them from `room`."""
    if sum(free // tp for free in room.values()) < n_stages:
        return None
    seats = list[int]()
    while len(seats) < n_stages:
        wanted = n_stages - len(seats)
        enough = [pool for pool in room if room[pool] // tp >= wanted]
        pool = min(enough, key=lambda at: room[at]) if enough else max(room, key=lambda at: room[at] // tp)
        n_here = min(wanted, room[pool] // tp)
        room[pool] -= n_here * tp
        seats += [pool] * n_here
    return seats


def placed_together(problem: Problem, kind: Sequence[int]) -> Draft:
    """Algorithm 2: slots of a prefill and b decode groups; slot i of a unit holds the same layers of all of them."""
    drafts = (
        _units(problem, kind, n_stages, (p_tp, a), (d_tp, b))
        for p_tp, d_tp in product(problem.pools[kind[0]].degrees, repeat=2)
        for n_stages in range(1, min(MAX_STAGES, problem.spec.n_layers) + 1)
        for a, b in _shares(max(problem.pools[pool].size for pool in kind), p_tp, d_tp)
    )
    return max(drafts, key=balanced_rate, default=())


def _shares(host_size: int, p_tp: int, d_tp: int) -> Iterator[tuple[int, int]]:
    for a in range(1, (host_size - d_tp) // p_tp + 1):
        for b in range(1, (host_size - a * p_tp) // d_tp + 1):
            if a == 1 or b == 1:
                yield a, b


def _units(
    problem: Problem, kind: Sequence[int], n_stages: int, prefill: tuple[int, int], decode: tuple[int, int]
) -> Draft:
    (p_tp, a), (d_tp, b) = prefill, decode
    slots = [at for at in kind for _ in range(problem.pools[at].size // (a * p_tp + b * d_tp))]
    found = list[Layout]()
    for first in range(0, len(slots) - n_stages + 1, n_stages):
        seats = slots[first : first + n_stages]
        p, d = _rated(problem, seats, p_tp, "prefill"), _rated(problem, seats, d_tp, "decode")
        if p is None or d is None:
            return ()
        found += [p] * a + [d] * b
    return tuple(found)


def balanced_rate(draft: Draft) -> float:
    """What the phases give together, the network apart."""
    return min(sum(layout.prefill for layout in draft), sum(layout.decode for layout in draft))


def _room(problem: Problem, kind: Sequence[int]) -> dict[int, int]:
    return {pool: problem.pools[pool].size for pool in kind}


def _rated(problem: Problem, seats: Sequence[int], tp: int, phase: Phase) -> Layout | None:
    bounds = accumulate(even_layers(problem.spec.n_layers, len(seats)), initial=0)
    parts = tuple(
        Part(pool=pool, tp=tp, start=start, stop=stop)
        for pool, (start, stop) in zip(seats, pairwise(bounds), strict=True)
    )
    return problem.layouts.rated(parts, phase) if problem.may_be(team_of(parts), phase) else None
