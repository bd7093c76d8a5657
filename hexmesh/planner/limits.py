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
    """One limit with its figures. Of a replica's limit, what follows the replica's name."""
    match limit.kind:
        case "mixed":
            at = replica_of(limit)
            assert at is not None
            return _row_text(problem, judged, plan, at, int(limit.name.partition("/")[2]))
        case "prefill" | "decode":
            at = replica_of(limit)
            assert at is not None
            phase = _prefill_text if limit.kind == "prefill" else _decode_text
            return phase(problem, judged, plan, at)
        case "nic_out" | "nic_in":
            node = problem.cluster.node(limit.name)
            assert node.nic is not None
            rate = node.nic.out_bytes_per_s if limit.kind == "nic_out" else node.nic.in_bytes_per_s
            way = "sends" if limit.kind == "nic_out" else "receives"
            return f"the network card of {node.name} {way} KV at its {show_bit_rate(rate)}"
        case _:
            return f"the {limit.kind} from {_ends(problem, limit)} is full of KV"


def replica_of(limit: Limit) -> int | None:
    """The place in the draft of the replica that a limit is of; None for those of the network."""
    if limit.kind not in ("mixed", "prefill", "decode"):
        return None
    return int(limit.name.partition("/")[0].removeprefix("r"))


def _ends(problem: Problem, limit: Limit) -> str:
    src, _, dst = limit.name.partition(" to ")
    names = {node.id: node.name for node in problem.cluster.nodes}
    return f"{names.get(src, src)} to {names.get(dst, dst)}"


def _row_text(problem: Problem, judged: Judged, plan: Plan, at: int, row: int) -> str:
    """Of a mixed replica: its stages, its hops, its round trip, in this order."""
    layout, name = judged.draft[at], f"r{at}"
    n = len(layout.parts)
    prompts, outputs = judged.flow.prefill[name], judged.flow.decode[name]
    tasks = [f"prefills {prompts:.3g}"] * (prompts > 0) + [f"decodes {outputs:.3g}"] * (outputs > 0)
    does = f"{' and '.join(tasks)} requests/s"
    room = f"; {_kv_text(plan, at, layout)}" if outputs > 0 else ""
    if row < n:
        prompt_s, output_s = layout.uses[row]
        shares = (
            f" (prompts {prompts * prompt_s:.0%}, tokens {outputs * output_s:.0%})" if len(tasks) > 1 else ""
        )
        return f"{does}: {_stage_text(problem, plan, at, row)} is never idle{shares}{room}"
    if row < 2 * n - 1:
        src, dst = (_node_name(problem, part) for part in list(pairwise(layout.parts))[row - n])
        return f"{does}: the hop from {src} to {dst} is never idle{room}"
    return f"{does}: its {layout.micro_batches} micro-batches are always on their way{room}"


def _prefill_text(problem: Problem, judged: Judged, plan: Plan, at: int) -> str:
    layout = judged.draft[at]
    alone = [problem.pipeline((part,)) for part in layout.parts]
    steps = [problem.capacities.prefill(stage).latency_s for stage in alone]
    slowest = max(range(len(steps)), key=steps.__getitem__)
    where = _stage_text(problem, plan, at, slowest)
    takes = (
        f"{where} takes {show_duration(steps[slowest])} of the {show_duration(1 / layout.prefill)} a prompt"
    )
    return f"prefills {layout.prefill:.3g} requests/s at most: {takes}"


def _decode_text(problem: Problem, judged: Judged, plan: Plan, at: int) -> str:
    layout = judged.draft[at]
    steps = [problem.capacities.step_s(problem.seat(part), layout.batch) for part in layout.parts]
    slowest = max(range(len(steps)), key=steps.__getitem__)
    period_s = layout.tpot_s / layout.micro_batches
    where = _stage_text(problem, plan, at, slowest)
    step = f"{where} takes {show_duration(steps[slowest])} of the {show_duration(period_s)}"
    every = f"in which {layout.batch:.0f} sequences get a token"
    return f"decodes {layout.decode:.3g} requests/s at most: {step} {every}; {_kv_text(plan, at, layout)}"


def _stage_text(problem: Problem, plan: Plan, at: int, index: int) -> str:
    stage = plan.replicas[at].stages[index]
    node = problem.cluster.node(stage.node)
    kind = next(device.name for device in node.devices if device.index == stage.devices[0])
    return f"layers {stage.start}-{stage.stop - 1} on {len(stage.devices)} x {kind} of {node.name}"


def _kv_text(plan: Plan, at: int, layout: Layout) -> str:
    """What holds the batch back, where memory does."""
    tightest = min(plan.replicas[at].stages, key=lambda stage: stage.kv_blocks)
    return f"{layout.batch * layout.micro_batches:.0f} sequences at once, KV of {_full(tightest)}"


def _full(stage: Stage) -> str:
    n = f"{len(stage.devices)} devices" if len(stage.devices) > 1 else "a device"
    each = " each" if len(stage.devices) > 1 else ""
    return f"{n} full at {show_bytes(stage.needed_bytes)} of {show_bytes(stage.room_bytes)}{each}"


def _node_name(problem: Problem, part: Part) -> str:
    return problem.pools[part.pool].node.name
