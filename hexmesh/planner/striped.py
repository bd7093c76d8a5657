"""Two replicas side by side over the same hosts, cut alike: one prefills, one decodes, and KV stays on its host.

Activations of a prompt are far smaller than its KV, so where NICs are slow it is better to let each replica cross hosts
than to let KV do so. HexGen-2's spectral partition finds such plans now and then; here they are made on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from hexmesh.cluster import Role
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part, Team
from hexmesh.planner.problem import Problem
from hexmesh.score.places import Spans, spans_of

_SHARES = (0.25, 0.4, 0.5, 0.6, 0.75)
"""Of the devices, that prefill."""
_MANY_SPLITS = 32
_DEGREES = (1, 2, 4, 8)
"""Caps on the TP degree that are tried for a replica with given cuts."""


def striped(problem: Problem, team: Team) -> Iterator[tuple[Layout, Layout]]:
    """Pairs of a prefill and a decode replica: some of each pool prefills, the rest decodes.

    Small teams are split in all ways, others by the same share of each pool. The cuts are those that either replica
    likes best, and those of one replica of all the devices.
    """
    for prefill, decode in _splits(team):
        yield from _pairs(problem, team, prefill, decode)


def _pairs(problem: Problem, team: Team, prefill: Team, decode: Team) -> Iterator[tuple[Layout, Layout]]:
    if not problem.may_be(prefill, "prefill") or not problem.may_be(decode, "decode"):
        return
    known = dict.fromkeys(_cuts(problem, team, prefill, decode))
    for spans in known:
        p, d = aligned(problem, prefill, spans, "prefill"), aligned(problem, decode, spans, "decode")
        if p is not None and d is not None:
            yield p, d


def _splits(team: Team) -> Iterator[tuple[Team, Team]]:
    """Each pool's devices in two: all ways where they are few, else by one share, and whole pools for either."""
    pools, sizes = [pool for pool, _ in team], [n for _, n in team]
    if math.prod(n + 1 for n in sizes) <= _MANY_SPLITS:
        chosen = list(product(*(range(n + 1) for n in sizes)))
    else:
        chosen = [tuple(min(max(round(n * share), n > 1), n - (n > 1)) for n in sizes) for share in _SHARES]
    for counts in chosen:
        rest = [n - own for n, own in zip(sizes, counts, strict=True)]
        if any(counts) and any(rest):
            yield _team(pools, counts), _team(pools, rest)


def _team(pools: Sequence[int], counts: Sequence[int]) -> Team:
    return tuple((pool, n) for pool, n in zip(pools, counts, strict=True) if n)


def _cuts(problem: Problem, team: Team, prefill: Team, decode: Team) -> Iterator[Spans]:
    wanted: tuple[tuple[Team, Role], ...] = (
        (prefill, "prefill"),
        (decode, "decode"),
        (team, "decode"),
        (team, "prefill"),
    )
    for part, role in wanted:
        best = problem.layouts.best(part, role) if part else None
        if best is not None:
            yield spans_of(problem.held(best.parts))


def aligned(problem: Problem, team: Team, spans: Spans, role: Role) -> Layout | None:
    """The best of a few layouts of the team that hold on each host what the spans say; None if there is none."""
    found = [
        layout
        for most in _DEGREES
        if (parts := _parts(problem, team, spans, most)) and (layout := problem.layouts.rated(parts, role))
    ]
    return max(found, key=lambda layout: layout.requests_per_s, default=None)


def _parts(problem: Problem, team: Team, spans: Spans, most: int) -> tuple[Part, ...]:
    """Each host's layers dealt out evenly to groups of its largest pool; nothing where a host has none."""
    parts = list[Part]()
    used = set[str]()
    for node, start, stop in spans:
        own = [(n, pool) for pool, n in team if problem.pools[pool].node.id == node]
        if not own or node in used:
            return ()
        used.add(node)
        n, pool = max(own)
        tp = max(tp for tp in problem.pools[pool].degrees if tp <= min(n, most))
        n_groups = min(n // tp, stop - start)
        cuts = [start + (stop - start) * at // n_groups for at in range(n_groups + 1)]
        parts += (Part(pool=pool, tp=tp, start=a, stop=b) for a, b in pairwise(cuts))
    return tuple(parts)
