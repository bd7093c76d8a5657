"""Why a plan is as it is: what limits it, what every device holds, and what each other choice would have given.

Claims are trials: a bottleneck is what brings most when there is a tenth more of it (`levers`), a role or a cut is
explained by what the nearest other one would give (`alternatives`), and a device is left out because the plan is no
better with it (`spare`). The number of trials is bounded, so a large fleet is explained by examples.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hexmesh.cost import CostModel
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.planner.alternatives import cut_lines, names_of, role_lines
from hexmesh.planner.levers import Gain, gains
from hexmesh.planner.limits import limit_text, replica_of
from hexmesh.planner.problem import Judged, Problem
from hexmesh.planner.spare import spare_reasons
from hexmesh.planner.trials import Trials
from hexmesh.score.flows import Limit

MAX_GAINS = 8
MAX_LIMITS = 6


class GainView(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenth more of something brings the plan as it is."""

    kind: str
    what: str
    """In words, such as "memory of 8 x A100-SXM-80GB"."""
    gain: float
    """Share of the rate, or of the speed of a request where latency is the objective."""
    what_if: str
    """The same question for `hexmesh plan --what-if`, which then also plans anew."""


class LimitView(msgspec.Struct, frozen=True, kw_only=True):
    """A limit of the flow program, and its share in what is served; all shares sum to one."""

    kind: str
    id: str
    share: float
    text: str


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of one stage: what each of them needs and has."""

    node: str
    name: str
    devices: tuple[int, ...]
    type: str
    replica: str
    layers: tuple[int, int]
    weight_bytes: int
    """Weights and workspace."""
    kv_bytes: int
    room_bytes: int
    kv_tokens: int
    """Tokens whose KV the stage's blocks hold."""


class SpareView(msgspec.Struct, frozen=True, kw_only=True):
    """Devices of one host that the plan leaves out."""

    node: str
    name: str
    devices: tuple[int, ...]
    reason: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    bottleneck: str
    gains: tuple[GainView, ...]
    """The bottleneck first."""
    limits: tuple[LimitView, ...]
    devices: tuple[DeviceView, ...]
    unused: tuple[SpareView, ...]
    roles: tuple[str, ...]
    cuts: tuple[str, ...]


def explain(problem: Problem, judged: Judged, plan: Plan) -> Explanation:
    """The account of a plan that `finish` made of what was judged."""
    found, trials = gains(problem, judged), Trials(problem, judged)
    limits = tuple(_limits(trials, plan))
    return Explanation(
        bottleneck=_bottleneck(found, limits),
        gains=tuple(map(_gain_view, found[:MAX_GAINS])),
        limits=limits,
        devices=tuple(_devices(problem, plan)),
        unused=tuple(_unused(problem, trials, plan)),
        roles=tuple(role_lines(trials)),
        cuts=tuple(cut_lines(trials)),
    )


def _bottleneck(found: list[Gain], limits: tuple[LimitView, ...]) -> str:
    first = limits[0].text if limits else ""
    if not found:
        return first
    best = found[0]
    decides = f"; {limits[0].share:.0%} is decided by this: {first}" if limits else ""
    return f"{best.lever.text}, a tenth more gives {best.gain:+.1%}{decides}"


def _gain_view(gain: Gain) -> GainView:
    lever = gain.lever
    return GainView(kind=lever.kind, what=lever.text, gain=gain.gain, what_if=lever.what_if)


def _limits(trials: Trials, plan: Plan) -> Iterator[LimitView]:
    """The largest first; those of like replicas together."""
    problem, judged, kinds = trials.problem, trials.judged, list(trials.kinds())
    alike = {at: (first, same) for first, same in kinds for at in same}
    grouped = dict[Limit, tuple[float, list[int]]]()
    for limit, share in judged.flow.shares.items():
        at = replica_of(limit)
        first = limit if at is None else _of(limit, alike[at][0])
        before, _ = grouped.get(first, (0.0, []))
        grouped[first] = before + share, [] if at is None else alike[at][1]
    ranked = sorted(grouped.items(), key=lambda item: (-item[1][0], item[0].kind, item[0].name))
    for limit, (share, same) in ranked[:MAX_LIMITS]:
        whose = f"{names_of(same)} {'each ' if len(same) > 1 else ''}" if same else ""
        text = whose + limit_text(problem, judged, plan, limit)
        yield LimitView(kind=limit.kind, id=limit.name, share=share, text=text)


def _of(limit: Limit, at: int) -> Limit:
    """The same limit of another replica."""
    _, slash, row = limit.name.partition("/")
    return Limit(limit.kind, f"r{at}{slash}{row}")


def _devices(problem: Problem, plan: Plan) -> Iterator[DeviceView]:
    costs, nodes = problem.capacities.costs, {node.id: node for node in problem.cluster.nodes}
    for replica in plan.replicas:
        for stage in replica.stages:
            node = nodes[stage.node]
            kinds = [device for device in node.devices if device.index == stage.devices[0]]
            yield _device(costs, replica, stage, node.name, kinds[0].name)


def _device(costs: CostModel, replica: Replica, stage: Stage, name: str, kind: str) -> DeviceView:
    fixed = costs.fixed_bytes(stage.start, stage.stop, len(stage.devices))
    return DeviceView(
        node=stage.node,
        name=name,
        devices=stage.devices,
        type=kind,
        replica=replica.id,
        layers=(stage.start, stage.stop),
        weight_bytes=fixed,
        kv_bytes=stage.needed_bytes - fixed,
        room_bytes=stage.room_bytes,
        kv_tokens=stage.kv_blocks * replica.block_tokens,
    )


def _unused(problem: Problem, trials: Trials, plan: Plan) -> Iterator[SpareView]:
    names, reasons = {node.id: node.name for node in problem.cluster.nodes}, spare_reasons(trials)
    for (node, devices), reason in reasons.items():
        yield SpareView(node=node, name=names[node], devices=devices, reason=reason)
