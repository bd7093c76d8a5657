"""Cuts of replicas that hand over to each other, moved until their layers lie on the same hosts where that pays.

A layer that both replicas keep on one host crosses no wire. Searches lay each replica out by itself, which costs up to
26 times on slow links. Here replicas take turns: each tries its hosts in its partners' order, its borders between hosts
at theirs, and single cuts moved by some layers; in small drafts also idle devices that take over some layers. The
draft's worth decides. A local search: it may end beside the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from hexmesh.planner.every_layout import stretch
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part, team_of
from hexmesh.planner.problem import Judged, Problem
from hexmesh.planner.run import Run

ROUNDS = 3
MOST_TRIALS = 600
FEW = 8
"""Replicas of a draft in which all are tried, whether or not a wire holds it back."""
_MOST_REPLICAS = 16
_MOST_PARTNERS = 3
_SHIFTS = (8, 4, 2, 1)
_WIRES = frozenset({"nic_out", "nic_in", "link", "line"})


def align(run: Run, judged: Judged, by: str) -> Judged:
    """The draft or a better one, with the same devices in each replica; offered to the run if it is better."""
    best, n_trials = judged, 0
    for _ in range(ROUNDS):
        before = best.worth
        for at in _to_move(run.problem, best):
            for layout in _others(run.problem, best, at):
                if run.is_over or n_trials == MOST_TRIALS:
                    return _kept(run, judged, best, by)
                n_trials += 1
                tried = run.problem.judge((*best.draft[:at], layout, *best.draft[at + 1 :]))
                if tried.worth > best.worth:
                    best = tried
        if best.worth == before:
            break
    return _kept(run, judged, best, by)


def _kept(run: Run, judged: Judged, best: Judged, by: str) -> Judged:
    return run.keep(best, by) if best.worth > judged.worth else judged


def _to_move(problem: Problem, judged: Judged) -> list[int]:
    """Replicas that may gain, those with the most requests first."""
    flow = judged.flow
    rates = {at: flow.prefill[f"r{at}"] + flow.decode[f"r{at}"] for at in range(len(judged.draft))}
    if len(judged.draft) > FEW:
        if not any(limit.kind in _WIRES for limit in flow.shares):
            return []
        handing = {name for pair in flow.flows if pair[0] != pair[1] for name in pair}
        rates = {
            at: rate
            for at, rate in rates.items()
            if f"r{at}" in handing and len(_hosts(problem, judged.draft[at].parts)) > 1
        }
    return sorted(rates, key=lambda at: (-rates[at], at))[:_MOST_REPLICAS]


def _others(problem: Problem, judged: Judged, at: int) -> Iterator[Layout]:
    """Other layouts of one replica, those toward its partners first."""
    own = judged.draft[at]
    tried = {own.parts}
    for parts in (
        *_toward_partners(problem, judged, at),
        *_shifted(own.parts),
        *_with_idle(problem, judged, own.parts),
    ):
        if parts not in tried:
            tried.add(parts)
            layout = problem.layouts.rated(parts, own.role)
            if layout is not None:
                yield layout


def _shifted(parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    cuts = _cuts(parts)
    for shift in _SHIFTS:
        for index in range(1, len(parts)):
            for by in (-shift, shift):
                if cuts[index - 1] < cuts[index] + by < cuts[index + 1]:
                    yield _cut(parts, (*cuts[:index], cuts[index] + by, *cuts[index + 1 :]))


def _with_idle(problem: Problem, judged: Judged, parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
    """One more stage, on an idle device, with some layers of its neighbour's."""
    if len(judged.draft) > FEW:
        return
    idle = {at: pool.size for at, pool in enumerate(problem.pools)}
    for layout in judged.draft:
        for pool, count in team_of(layout.parts):
            idle[pool] -= count
    cuts = _cuts(parts)
    groups = {
        (pool, max(tp for tp in problem.pools[pool].degrees if tp <= most))
        for pool, n in idle.items()
        for most in {min(1, n), n} - {0}
    }
    for pool, tp in sorted(groups):
        added = Part(pool=pool, tp=tp, start=0, stop=0)
        for index, part in enumerate(parts):
            for n in sorted(
                {1, part.n_layers // 4, part.n_layers // 2, part.n_layers - 1} - {0, part.n_layers}
            ):
                yield _cut(
                    (*parts[:index], added, *parts[index:]),
                    (*cuts[: index + 1], part.start + n, *cuts[index + 1 :]),
                )
                yield _cut(
                    (*parts[: index + 1], added, *parts[index + 1 :]),
                    (*cuts[: index + 1], part.stop - n, *cuts[index + 1 :]),
                )


def _toward_partners(problem: Problem, judged: Judged, at: int) -> Iterator[tuple[Part, ...]]:
    name, own = f"r{at}", judged.draft[at].parts
    flows = judged.flow.flows
    partners = {
        other: sum(rate for pair, rate in flows.items() if set(pair) == {name, other})
        for other in {end for pair in flows if name in pair for end in pair} - {name}
    }
    # A partner that a slow wire starves may have no flow yet.
    idle = [f"r{other}" for other in range(len(judged.draft)) if other != at and f"r{other}" not in partners]
    if len(judged.draft) <= FEW:
        partners |= dict.fromkeys(idle, 0.0)
    for partner in sorted(partners, key=lambda other: (-partners[other], other))[:_MOST_PARTNERS]:
        moved = _like(problem, own, judged.draft[int(partner[1:])].parts)
        if moved is not None:
            yield moved


def _like(problem: Problem, own: tuple[Part, ...], partner: Sequence[Part]) -> tuple[Part, ...] | None:
    """The own groups in the partner's order of hosts, with borders at the partner's; None if nothing is shared."""
    theirs, ours = _hosts(problem, partner), _hosts(problem, own)
    if len(ours) < 2 or not set(ours) & set(theirs) or _returns(problem, own):
        return None

    def place(part: Part) -> float:
        start, stop = theirs.get(_host(problem, part), ours[_host(problem, part)])
        return (start + stop) / 2

    ordered = sorted(own, key=lambda part: (place(part), _host(problem, part), part.start))
    n_layers, laid = own[-1].stop, [0]
    for part in ordered:
        laid.append(laid[-1] + part.n_layers)
    borders, places = list[int](), list[int]()
    for index, (a, b) in enumerate(pairwise(ordered), start=1):
        before, after = _host(problem, a), _host(problem, b)
        if before != after:
            borders.append(index)
            wanted = (
                theirs[before][1]
                if before in theirs
                else theirs[after][0]
                if after in theirs
                else laid[index]
            )
            places.append(wanted)
    if not all(a < b for a, b in pairwise([0, *places, n_layers])):
        return tuple(_cut(tuple(ordered), tuple(laid)))
    cuts = stretch(tuple(laid), borders, places)
    return None if cuts is None else _cut(tuple(ordered), cuts)


def _hosts(problem: Problem, parts: Sequence[Part]) -> dict[str, tuple[int, int]]:
    """First and last layer of each host."""
    found = dict[str, tuple[int, int]]()
    for part in parts:
        start, stop = found.get(_host(problem, part), (part.start, part.stop))
        found[_host(problem, part)] = min(start, part.start), max(stop, part.stop)
    return found


def _returns(problem: Problem, parts: Sequence[Part]) -> bool:
    """Whether the pipeline comes back to a host that it has left."""
    visits = [_host(problem, part) for part in parts]
    return sum(a != b for a, b in pairwise(visits)) + 1 != len(set(visits))


def _host(problem: Problem, part: Part) -> str:
    return problem.pools[part.pool].node.id


def _cuts(parts: Sequence[Part]) -> tuple[int, ...]:
    return (0, *(part.stop for part in parts))


def _cut(parts: Sequence[Part], cuts: Sequence[int]) -> tuple[Part, ...]:
    return tuple(
        Part(pool=part.pool, tp=part.tp, start=start, stop=stop)
        for part, (start, stop) in zip(parts, pairwise(cuts), strict=True)
    )
