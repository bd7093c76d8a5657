"""The joint optimiser of the multi-vendor P-D paper (arXiv 2509.17542): strategies by phase, then numbers of instances.

From the paper, in two steps:

1. For every kind of GPU and each phase, the parallel strategy (TP x PP): those that fit in memory and keep the limit of
   their phase, TTFT for prefill and TPOT for decode.
2. How many prefill and decode instances of which kind, by an integer program: the target rate at least cost, or else
   the highest rate (and the least cost for that).

       minimise the hosts' price    subject to  sum of prefill rates >= target    sum of decode rates >= target

The paper's assumptions hold: an instance stays inside one kind of host, prefill and decode instances are apart (no
mixed replicas), layers are dealt out evenly, and the network carries any handoff.
What differs: hosts are filled as wholes (the program counts hosts by what stands on them), and cost what they cost,
whereas the paper counts GPUs; kinds of devices take the place of vendors; rates are this score's closed forms, where
the paper has a simulator; an instance spans hosts of its kind where one is too small for any. Of strategies of one
phase that take as many devices of a kind, the fastest alone is of use. What is found is judged like every draft, wires
included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hexmesh.cluster import Role
from hexmesh.papers.hexgen_layout import even_layers
from hexmesh.planner.layouts import Layout
from hexmesh.planner.objective import LeastCost
from hexmesh.planner.pools import Part, Pool
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.run import Run

BY = "joint"
PHASES: tuple[Role, Role] = ("prefill", "decode")
MOST_NODES = 20_000
"""Of the integer program's tree."""
_SLACK = 1e-7
"""What of a rate that is to be met may be missing, for rounding."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Like places for instances: pools of one host each, or of a few where one is too small for an instance."""

    places: tuple[tuple[int, ...], ...]
    """Each with its pools."""
    n_devices: int
    """Of a place."""
    price_per_h: float
    """Of a place."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How an instance of a phase stands on a kind, and what it does."""

    role: Role
    tp: int
    n_stages: int
    requests_per_s: float

    @property
    def n_devices(self) -> int:
        return self.tp * self.n_stages


@dataclass(frozen=True, slots=True)
class Filling:
    """What stands on one place of a kind."""

    kind: int
    instances: tuple[Strategy, ...]

    def rate(self, role: Role) -> float:
        """Of all its instances of a phase."""
        return sum(one.requests_per_s for one in self.instances if one.role == role)


def search(run: Run) -> None:
    """Offers one draft."""
    problem = run.problem
    if not set(PHASES) <= problem.roles:
        run.notes.append("joint: needs prefill and decode replicas, which were not asked for")
        return
    kinds = kinds_of(problem)
    every = [
        filling for at, kind in enumerate(kinds) for filling in fillings(at, kind, strategies(problem, kind))
    ]
    wanted = problem.objective.requests_per_s if isinstance(problem.objective, LeastCost) else None
    chosen = None if wanted is None else cheapest(kinds, every, wanted)
    if chosen is None:
        if wanted is not None:
            run.notes.append(
                f"joint: {wanted:.4g} requests/s are out of reach, planned for the most there is"
            )
        chosen = cheapest(kinds, every, highest_rate(kinds, every))
    draft = draft_of(problem, kinds, chosen or [])
    if draft:
        run.offer(draft, BY)


def kinds_of(problem: Problem) -> list[Kind]:
    """Pools that are alike and at one site. A host's price is shared by its devices."""
    alike = defaultdict[object, list[int]](list)
    for at, pool in enumerate(problem.pools):
        node = pool.node
        alike[
            pool.device,
            pool.size,
            pool.degrees,
            pool.roles,
            (node.fabric, node.launch_s, node.step_s, node.site, _price_per_h(pool)),
        ].append(at)
    return [_kind(problem, pools) for pools in alike.values()]


def _kind(problem: Problem, pools: Sequence[int]) -> Kind:
    """With as few hosts to a place as some instance needs."""
    first = problem.pools[pools[0]]
    kinds = [
        Kind(
            places=tuple(
                tuple(pools[at : at + n_hosts]) for at in range(0, len(pools) - n_hosts + 1, n_hosts)
            ),
            n_devices=first.size * n_hosts,
            price_per_h=_price_per_h(first) * n_hosts,
        )
        for n_hosts in range(1, len(pools) + 1)
    ]
    return next((kind for kind in kinds if strategies(problem, kind)), kinds[0])


def _price_per_h(pool: Pool) -> float:
    return (pool.node.price_per_h or 0.0) * pool.size / len(pool.node.devices)


def strategies(problem: Problem, kind: Kind) -> list[Strategy]:
    """Step 1: of each phase and number of devices the fastest that fits and keeps its limit."""
    best = dict[tuple[Role, int], Strategy]()
    first = problem.pools[kind.places[0][0]]
    for role in PHASES:
        if role not in first.roles:
            continue
        for tp in first.degrees:
            for n_stages in range(1, min(kind.n_devices // tp, problem.spec.n_layers) + 1):
                layout = _layout(problem, kind.places[0], role, tp, n_stages, [0] * len(kind.places[0]))
                if layout is None:
                    continue
                found = Strategy(role, tp, n_stages, layout.requests_per_s)
                known = best.get((role, found.n_devices))
                if known is None or found.requests_per_s > known.requests_per_s:
                    best[role, found.n_devices] = found
    return list(best.values())


def _layout(
    problem: Problem, place: Sequence[int], role: Role, tp: int, n_stages: int, taken: Sequence[int]
) -> Layout | None:
    """An instance on the place's devices that are not taken, layers dealt out evenly; None if it does nothing."""
    free = [(problem.pools[pool].size - n) // tp for pool, n in zip(place, taken, strict=True)]
    seats = [pool for pool, n in zip(place, free, strict=True) for _ in range(n)][:n_stages]
    if len(seats) < n_stages:
        return None
    parts, start = [], 0
    for pool, n_layers in zip(seats, even_layers(problem.spec.n_layers, n_stages), strict=True):
        parts.append(Part(pool=pool, tp=tp, start=start, stop=start + n_layers))
        start += n_layers
    return problem.layouts.rated(tuple(parts), role)


def fillings(at: int, kind: Kind, every: Sequence[Strategy]) -> Iterator[Filling]:
    """All ways to fill a place; where it spans hosts, with one instance."""

    def further(left: int, first: int) -> Iterator[tuple[Strategy, ...]]:
        for index in range(first, len(every)):
            if every[index].n_devices <= left:
                yield (every[index],)
                for rest in further(left - every[index].n_devices, index):
                    yield (every[index], *rest)

    if len(kind.places[0]) > 1:
        yield from (Filling(at, (strategy,)) for strategy in every)
    else:
        yield from (Filling(at, found) for found in further(kind.n_devices, 0))


def highest_rate(kinds: Sequence[Kind], every: Sequence[Filling]) -> float:
    """Step 2 without a target: the most that all places serve."""
    rates = np.array([[filling.rate(role) for filling in every] for role in PHASES]).reshape(2, -1)
    found = milp(
        np.append(np.zeros(len(every)), -1.0),
        constraints=[
            LinearConstraint(np.hstack([rates, -np.ones((2, 1))]), lb=0.0),
            LinearConstraint(
                np.hstack([_places(kinds, every), np.zeros((len(kinds), 1))]), ub=_n_places(kinds)
            ),
        ],
        integrality=np.append(np.ones(len(every)), 0),
        bounds=Bounds(0, np.inf),
        options={"node_limit": MOST_NODES},
    )
    return 0.0 if found.x is None else float(-found.fun)


def cheapest(kinds: Sequence[Kind], every: Sequence[Filling], requests_per_s: float) -> list[Filling] | None:
    """Step 2: the fillings, as often as they are used, that serve the rate at least cost; None if none do."""
    if not every:
        return None
    rates = np.array([[filling.rate(role) for filling in every] for role in PHASES])
    # Among equals in price, fewer instances.
    price = [kinds[filling.kind].price_per_h + 1e-6 * (1 + len(filling.instances)) for filling in every]
    found = milp(
        np.array(price),
        constraints=[
            LinearConstraint(rates, lb=requests_per_s * (1 - _SLACK)),
            LinearConstraint(_places(kinds, every), ub=_n_places(kinds)),
        ],
        integrality=np.ones(len(every)),
        bounds=Bounds(0, np.inf),
        options={"node_limit": MOST_NODES},
    )
    if found.x is None:
        return None
    return [filling for filling, n in zip(every, found.x, strict=True) for _ in range(round(n))]


def _places(
    kinds: Sequence[Kind], every: Sequence[Filling]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    found = np.zeros((len(kinds), len(every)))
    for at, filling in enumerate(every):
        found[filling.kind, at] = 1.0
    return found


def _n_places(kinds: Sequence[Kind]) -> list[int]:
    return [len(kind.places) for kind in kinds]


def draft_of(problem: Problem, kinds: Sequence[Kind], chosen: Sequence[Filling]) -> Draft:
    """The fillings on the places of their kinds, one after the other."""
    left = [iter(kind.places) for kind in kinds]
    return tuple(
        layout for filling in chosen for layout in _placed(problem, next(left[filling.kind]), filling)
    )


def _placed(problem: Problem, place: Sequence[int], filling: Filling) -> Iterator[Layout]:
    taken = [0] * len(place)
    for one in filling.instances:
        layout = _layout(problem, place, one.role, one.tp, one.n_stages, taken)
        if layout is not None:
            yield layout
            for part in layout.parts:
                taken[place.index(part.pool)] += part.tp
