"""Why devices are left out: what the plan would give if they were forced into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from hexmesh.cost import CostModel
from hexmesh.planner.objective import LeastCost
from hexmesh.planner.pools import ROLES, Part, Pool, Team, team_of
from hexmesh.planner.problem import Draft, Problem
from hexmesh.planner.trials import Trials
from hexmesh.units import show_bytes

_WIDTHS = (1, 2, 4, 8, 16)
"""Layers that a device is tried with in somebody else's pipeline."""
_MAX_PARTNERS = 6


def spare_reasons(trials: Trials) -> Mapping[tuple[str, tuple[int, ...]], str]:
    """By (node, devices); devices alike of one host together."""
    problem = trials.problem
    taken = Counter[int]()
    for layout in trials.judged.draft:
        taken.update(dict(team_of(layout.parts)))
    reasons, known = {}, dict[object, str]()
    for at, pool in enumerate(problem.pools):
        left = pool.devices[taken[at] :]
        if left:
            like = (pool.device, pool.node.site, pool.node.roles, len(left), taken[at] > 0)
            if like not in known:
                known[like] = _reason(trials, at, pool, len(left))
            reasons[pool.node.id, left] = known[like]
    return reasons | _unmeasured(problem)


def _unmeasured(problem: Problem) -> dict[tuple[str, tuple[int, ...]], str]:
    planned = {(pool.node.id, index) for pool in problem.pools for index in pool.devices}
    left = {
        node.id: tuple(device.index for device in node.devices if (node.id, device.index) not in planned)
        for node in problem.cluster.nodes
    }
    return {(node, devices): "its speed is not known" for node, devices in left.items() if devices}


def _reason(trials: Trials, at: int, pool: Pool, n: int) -> str:
    best = trials.best(forced_drafts(trials, at, n))
    if best is None:
        return _no_way(trials.problem, pool)
    objective, mine = trials.problem.objective, trials.judged
    if isinstance(objective, LeastCost) and mine.flow.requests_per_s >= objective.requests_per_s * (1 - 1e-9):
        more = best.figures.price_per_h - mine.figures.price_per_h
        return f"{objective.requests_per_s:g} requests/s are served without it, for {more:.2f} an hour less"
    if trials.is_better(best):
        return f"with it {trials.than(best)}: a longer search may find that"
    return f"with it {trials.than(best)} at best"


def forced_drafts(trials: Trials, at: int, n: int) -> Iterator[Draft]:
    """The draft with n devices of a pool put to use: on their own, added to a replica, or as a stage of one."""
    problem, draft = trials.problem, trials.judged.draft
    for count in dict.fromkeys((n, 1)):
        yield from _on_their_own(problem, draft, ((at, count),))
    for where in _partners(problem, draft, at):
        yield from _added(trials, where, at, n)
        yield from _as_stage(trials, where, at)


def _on_their_own(problem: Problem, draft: Draft, team: Team) -> Iterator[Draft]:
    for role in ROLES:
        if problem.may_be(team, role) and (layout := problem.layouts.best(team, role)) is not None:
            yield (*draft, layout)


def _partners(problem: Problem, draft: Draft, at: int) -> list[int]:
    """Replicas to join: those of the same host, then of the same site."""
    node = problem.pools[at].node

    def nearness(where: int) -> tuple[bool, bool, int]:
        nodes = [problem.pools[part.pool].node for part in draft[where].parts]
        return all(n.id != node.id for n in nodes), all(n.site != node.site for n in nodes), where

    return sorted(range(len(draft)), key=nearness)[:_MAX_PARTNERS]


def _added(trials: Trials, where: int, at: int, n: int) -> Iterator[Draft]:
    """The replica laid out anew with them, where its best layout uses them."""
    problem, layout = trials.problem, trials.judged.draft[where]
    counts = Counter(dict(team_of(layout.parts)))
    before = counts[at]
    counts[at] += n
    team = tuple(sorted(counts.items()))
    if problem.may_be(team, layout.role):
        found = problem.layouts.best(team, layout.role)
        if found is not None and dict(team_of(found.parts)).get(at, 0) > before:
            yield trials.with_layout(where, found)


def _as_stage(trials: Trials, where: int, at: int) -> Iterator[Draft]:
    """One of them with a few layers of its own at every place of the replica's pipeline."""
    problem, layout = trials.problem, trials.judged.draft[where]
    parts = layout.parts
    if not problem.may_be((*team_of(parts), (at, 1)), layout.role):
        return
    for index, part in enumerate(parts):
        for width in _WIDTHS:
            if width < part.n_layers:
                first = Part(pool=at, tp=1, start=part.start, stop=part.start + width)
                last = Part(pool=at, tp=1, start=part.stop - width, stop=part.stop)
                options = [(first, replace(part, start=first.stop)), (replace(part, stop=last.start), last)]
                for option in options:
                    draft = trials.rated(where, (*parts[:index], *option, *parts[index + 1 :]))
                    if draft is not None:
                        yield draft


def _no_way(problem: Problem, pool: Pool) -> str:
    """It can do nothing at all here: too small, or nobody is near."""
    costs, device = problem.capacities.costs, pool.device
    least = _least_bytes(costs, problem, pool)
    if least > device.budget_bytes:
        room = show_bytes(device.budget_bytes)
        return f"too small: one layer with KV for one request needs {show_bytes(least)}, it has {room}"
    reachable = {link.dst for link in problem.cluster.links if link.src == pool.node.id}
    if not reachable and len(problem.cluster.nodes) > 1:
        return "no link from its host to another is known"
    return "it cannot hold the model alone, and no replica can spare it a layer within the limits"


def _least_bytes(costs: CostModel, problem: Problem, pool: Pool) -> int:
    """Of one layer, where that is least."""
    n_tokens = problem.workload.prompt_tokens + problem.workload.output_tokens
    blocks, kind = costs.blocks_of(n_tokens), pool.device.kind
    return min(costs.needed_bytes(at, at + 1, blocks, kind) for at in range(problem.spec.n_layers))
