"""A draft becomes a plan: devices get their names, stages their KV blocks and bytes, flows their shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hexmesh.plan import Flow, Plan, Replica, Stage, Unused
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Judged, Problem


def finish(
    problem: Problem,
    judged: Judged,
    *,
    model_id: str,
    model_name: str,
    max_model_tokens: int,
    hosts: Mapping[str, int],
    reason: str = "",
) -> Plan:
    """The plan that `judged` stands for. Replicas that no request goes through are left out.

    Devices are taken in the order of their indices.
    """
    free = [list(pool.devices) for pool in problem.pools]
    flow = judged.flow
    used = {name for pair in flow.flows for name in pair}
    names = {name: f"r{n}" for n, name in enumerate(sorted(used, key=lambda name: int(name[1:])))}
    replicas = tuple(
        _replica(problem, names[f"r{at}"], layout, free, flow.decode[f"r{at}"])
        for at, layout in enumerate(judged.draft)
        if f"r{at}" in names
    )
    return Plan(
        model_id=model_id,
        model_name=model_name,
        n_layers=problem.spec.n_layers,
        dtype=problem.dtype,
        max_model_tokens=max_model_tokens,
        hosts=dict(hosts),
        replicas=replicas,
        flows=_flows(judged, names),
        unused=tuple(_unused(problem, free)),
        reason=reason,
    )


def _replica(
    problem: Problem, name: str, layout: Layout, free: list[list[int]], requests_per_s: float
) -> Replica:
    stages = []
    for part in layout.parts:
        devices = tuple(free[part.pool][: part.tp])
        del free[part.pool][: part.tp]
        stages.append(stage_of(problem, part, devices, part_room_blocks(problem, part), layout))
    return Replica(
        id=name,
        role=layout.role,
        stages=tuple(stages),
        block_tokens=problem.block_tokens,
        predicted_tokens_per_s=requests_per_s * problem.workload.output_tokens,
        predicted_batch=_sequences(problem, layout, requests_per_s),
    )


def _sequences(problem: Problem, layout: Layout, requests_per_s: float) -> int:
    """How many decode together at that rate."""
    if layout.role == "prefill":
        return 1
    most = layout.batch * layout.micro_batches
    tpot_s = problem.capacities.tpot_at(
        problem.pipeline(layout.parts), requests_per_s, computes_prompts=layout.role == "mixed"
    )
    return max(1, int(min(most, requests_per_s * problem.workload.output_tokens * tpot_s)))


def part_room_blocks(problem: Problem, part: Part) -> int:
    """KV blocks that fit on each device of a part."""
    device = problem.pools[part.pool].device
    return problem.capacities.costs.room_blocks(part.start, part.stop, device, part.tp)


def stage_of(problem: Problem, part: Part, devices: tuple[int, ...], kv_blocks: int, layout: Layout) -> Stage:
    """A part of a layout on its devices."""
    costs, pool = problem.capacities.costs, problem.pools[part.pool]
    return Stage(
        node=pool.node.id,
        devices=devices,
        start=part.start,
        stop=part.stop,
        kv_blocks=kv_blocks,
        needed_bytes=costs.needed_bytes(part.start, part.stop, kv_blocks, pool.device.kind, part.tp),
        room_bytes=pool.device.budget_bytes,
        predicted_step_s=problem.capacities.step_s(problem.seat(part), max(1.0, layout.batch)),
    )


def _flows(judged: Judged, names: Mapping[str, str]) -> tuple[Flow, ...]:
    """Shares that sum to one; a replica that serves its own prompts flows into itself."""
    total = sum(judged.flow.flows.values())
    flows = [
        Flow(src=names[p], dst=names[d], share=rate / total) for (p, d), rate in judged.flow.flows.items()
    ]
    return tuple(sorted(flows, key=lambda flow: (flow.src, flow.dst)))


def _unused(problem: Problem, free: list[list[int]]) -> Iterator[Unused]:
    for pool, left in zip(problem.pools, free, strict=True):
        for device in left:
            yield Unused(node=pool.node.id, device=device, reason="the plan is no better with it")
