"""Limits of the flow program in words, with the figures behind them."""

from __future__ import annotations

from itertools import pairwise

from hexmesh.plan import Plan, Stage
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Judged, Problem
from hexmesh.score.flows import Limit
from hexmesh.units import show_bit_rate, show_bytes, show_duration


def limit_text(problem: Problem, judged: Judged, plan: Plan, limit: Limit) -> str:
    """One limit with its figures."""
    match limit.kind:
        case "mixed":
            name, _, row = limit.name.partition("/")
            at = int(name.removeprefix("r"))
            return _row_text(problem, judged, plan, at, int(row))
        case "prefill" | "decode":
            at = int(limit.name.removeprefix("r"))
            return _phase_text(problem, judged, plan, at, limit.kind)
        case "nic_out" | "nic_in":
            node = problem.cluster.node(limit.name)
            assert node.nic is not None
            rate = node.nic.out_bytes_per_s if limit.kind == "nic_out" else node.nic.in_bytes_per_s
            way = "sends" if limit.kind == "nic_out" else "receives"
            return f"the network card of {node.name} {way} KV at its {show_bit_rate(rate)}"
        case _:
            return f"the {limit.kind} from {_ends(problem, limit)} is full of KV"


def _ends(problem: Problem, limit: Limit) -> str:
    src, _, dst = limit.name.partition(" to ")
    names = {node.id: node.name for node in problem.cluster.nodes}
    return f"{names.get(src, src)} to {names.get(dst, dst)}"


def _row_text(problem: Problem, judged: Judged, plan: Plan, at: int, row: int) -> str:
    """Of a mixed replica: its stages, its hops, its round trip, in this order."""
    layout, name = judged.draft[at], f"r{at}"
    n = len(layout.parts)
    prompts, outputs = judged.flow.prefill[name], judged.flow.decode[name]
    does = f"{name} prefills {prompts:.3g} and decodes {outputs:.3g} requests/s"
    if row < n:
        prompt_s, output_s = layout.uses[row]
        split = f"prompts {prompts * prompt_s:.0%}, tokens {outputs * output_s:.0%} of its time"
        return f"{does}: {_stage_text(problem, plan, at, row)} is never idle ({split}); {_kv_text(plan, at, layout)}"
    if row < 2 * n - 1:
        src, dst = (_node_name(problem, part) for part in list(pairwise(layout.parts))[row - n])
        return f"{does}: the hop from {src} to {dst} is never idle"
    return (
        f"{does}: its {layout.micro_batches} micro-batches are all on their way; {_kv_text(plan, at, layout)}"
    )


def _phase_text(problem: Problem, judged: Judged, plan: Plan, at: int, phase: str) -> str:
    layout, name = judged.draft[at], f"r{at}"
    if phase == "prefill":
        rate = f"{name} prefills {layout.prefill:.3g} requests/s at most"
        pipeline = problem.pipeline(layout.parts)
        slowest = max(
            range(len(layout.parts)),
            key=lambda i: (
                problem.capacities.model.prefill_layer_s(
                    pipeline.seats[i].group,
                    problem.spec.layers[layout.parts[i].start],
                    problem.workload.prompt_tokens,
                )
                * layout.parts[i].n_layers
            ),
        )
        return f"{rate}: {_stage_text(problem, plan, at, slowest)} takes longest"
    steps = [problem.capacities.step_s(problem.seat(part), layout.batch) for part in layout.parts]
    slowest = max(range(len(steps)), key=steps.__getitem__)
    period_s = layout.tpot_s / layout.micro_batches
    rate = f"{name} decodes {layout.decode:.3g} requests/s at most"
    step = f"{_stage_text(problem, plan, at, slowest)} takes {show_duration(steps[slowest])} of"
    every = f"{show_duration(period_s)} that {layout.batch:.0f} sequences get for a token"
    return f"{rate}: {step} the {every}; {_kv_text(plan, at, layout)}"


def _stage_text(problem: Problem, plan: Plan, at: int, index: int) -> str:
    stage = plan.replicas[at].stages[index]
    node = problem.cluster.node(stage.node)
    kind = next(device.name for device in node.devices if device.index == stage.devices[0])
    return f"layers {stage.start}-{stage.stop - 1} on {len(stage.devices)} x {kind} of {node.name}"


def _kv_text(plan: Plan, at: int, layout: Layout) -> str:
    """What holds the batch back, where memory does."""
    replica = plan.replicas[at]
    tightest = min(replica.stages, key=lambda stage: stage.kv_blocks)
    n = layout.batch * layout.micro_batches
    return f"{n:.0f} sequences at once, KV of {_full(tightest)}"


def _full(stage: Stage) -> str:
    n = f"{len(stage.devices)} devices" if len(stage.devices) > 1 else "a device"
    return f"{n} full at {show_bytes(stage.needed_bytes)} of {show_bytes(stage.room_bytes)} each"


def _node_name(problem: Problem, part: Part) -> str:
    return problem.pools[part.pool].node.name
