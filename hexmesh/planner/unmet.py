"""What was asked for and cannot be had: in bytes, seconds or requests per second, with the nearest that can."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from hexmesh.cluster import Role
from hexmesh.errors import HexmeshError, InvalidInput, NoRoom, NotReady
from hexmesh.planner.front import Found
from hexmesh.planner.layouts import Layout
from hexmesh.planner.objective import Latency, LeastCost, Throughput
from hexmesh.planner.pools import ROLES, Team
from hexmesh.planner.problem import Problem
from hexmesh.units import show_bytes, show_duration

_MAX_TEAM = 64
"""Devices of a team that the least times are looked for in."""


def why_nothing(problem: Problem, found: Found) -> HexmeshError:
    """The error that a search found no plan at all."""
    if not problem.pools:
        return InvalidInput(
            "no device has known speed", next_step="give flops and bandwidth, or measure them"
        )
    needed, room = least_bytes(problem), sum(pool.device.budget_bytes * pool.size for pool in problem.pools)
    if needed > room:
        return NoRoom(
            f"the model with KV for one request needs {show_bytes(needed)}, all devices have {show_bytes(room)}",
            needed_bytes=needed,
            room_bytes=room,
            next_step=f"add {show_bytes(needed - room)}, or plan for a smaller model or dtype",
        )
    free = replace(problem, objective=Throughput())
    slow = [line for line in _too_slow(problem, free)]
    if slow:
        return NotReady("; ".join(slow), next_step="relax the limits of the workload, or add faster devices")
    if problem.roles != frozenset(ROLES) or any(pool.roles != frozenset(ROLES) for pool in problem.pools):
        return NotReady(
            "no replicas of the allowed roles hold the model", next_step="allow mixed replicas: --roles free"
        )
    if found.was_cut_off:
        return NotReady(f"nothing found in {found.elapsed_s:.1f} s", next_step="give more time: --budget-s")
    return NoRoom(
        f"the {show_bytes(needed)} of the model and one request do not fit the {show_bytes(room)} of all devices, "
        "layer by layer, over the links that are known",
        needed_bytes=needed,
        room_bytes=room,
        next_step="add memory to the smallest devices, or links between the hosts",
    )


def unmet(problem: Problem, found: Found) -> Iterator[str]:
    """What the best plan misses."""
    if found.best is None or not isinstance(problem.objective, LeastCost | Latency):
        return
    asked, rate = problem.objective.requests_per_s, found.best.flow.requests_per_s
    if rate < asked * (1 - 1e-6):
        bound = f"no plan serves more than {found.bound_requests_per_s:.4g}"
        yield f"{asked:g} requests/s asked, the best plan serves {rate:.4g}; {bound}"


def least_bytes(problem: Problem) -> int:
    """Weights and workspace of the whole model in one stage, and KV of one mean request."""
    costs = problem.capacities.costs
    n_tokens = problem.workload.prompt_tokens + problem.workload.output_tokens
    kind = problem.pools[0].device.kind
    return costs.needed_bytes(0, problem.spec.n_layers, costs.blocks_of(n_tokens), kind)


def _too_slow(problem: Problem, free: Problem) -> Iterator[str]:
    slo = problem.capacities.workload.slo
    if slo.ttft_s is not None:
        found = _quickest(free, "prefill")
        if found is not None and found.prefill_latency_s > slo.ttft_s:
            yield _asked("time to the first token", slo.ttft_s, found.prefill_latency_s)
    if slo.tpot_s is not None:
        found = _quickest(free, "decode")
        least_s = None if found is None else _alone_tpot_s(free, found)
        if least_s is not None and least_s > slo.tpot_s:
            yield _asked("time per output token", slo.tpot_s, least_s)


def _asked(what: str, asked_s: float, least_s: float) -> str:
    return f"{what} of {show_duration(asked_s)} asked, the least found is {show_duration(least_s)}"


def _alone_tpot_s(problem: Problem, layout: Layout) -> float:
    return problem.capacities.tpot_at(problem.pipeline(layout.parts), 1e-9, computes_prompts=False)


def _quickest(problem: Problem, role: Role) -> Layout | None:
    found = [
        layout
        for team in _teams(problem)
        if problem.may_be(team, role) and (layout := problem.layouts.quickest(team, role)) is not None
    ]
    return min(found, key=lambda layout: layout.alone_s, default=None)


def _teams(problem: Problem) -> Iterator[Team]:
    """Each kind of host on its own, each site, and all."""
    hosts, sites = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for at, pool in enumerate(problem.pools):
        hosts[pool.node.id].append(at)
        sites[pool.node.site].append(at)
    kinds = {
        tuple((problem.pools[at].device, problem.pools[at].size) for at in members): members
        for members in hosts.values()
    }
    for members in (*kinds.values(), *sites.values(), range(len(problem.pools))):
        team = tuple((at, problem.pools[at].size) for at in members)
        if sum(n for _, n in team) <= _MAX_TEAM:
            yield team
