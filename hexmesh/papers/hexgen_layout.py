"""The layout of one group as HexGen's released optimiser finds it: by trying everything.

Each machine's GPUs are split into TP degrees in every way, TP never spans machines, stages stand in the order of the
machines with degrees ascending, and layers are dealt out evenly, what is left over to the last stages. A stage costs
its request's compute, scaled by the machine's ability, and its all-reduces; each border between machines costs a hop.

The release looks all-reduces up by a stage's position inside its machine; here, as the paper means it, each stage has
its own. The best plans are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from hexmesh.papers.hexgen_cost import HexGenCost

TP_DEGREES = (1, 2, 3, 4, 6, 8)
MAX_STAGES = 8
"""In one machine."""
REPLICA_BYTES = 144 * 2**30
"""A group with less memory than this is no replica."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Like GPUs in one host."""

    n_gpus: int
    memory_bytes: int
    """Of each GPU."""
    ability: float = 1.0
    """Factor on compute times: less is faster."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """TP degrees by machine, layers by stage, and the sum over stages for one request."""

    degrees: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    cost_s: float
    fits: bool


def group_plans(cost: HexGenCost, machines: Sequence[Machine]) -> list[GroupPlan]:
    """Every plan of the group, the cheapest that fits first, those that do not fit last."""
    choices = [tuple(degree_splits(machine.n_gpus)) for machine in machines]
    plans = (_plan(cost, machines, degrees) for degrees in product(*choices))
    return sorted(plans, key=lambda plan: (not plan.fits, plan.cost_s))


def degree_splits(
    n_gpus: int, largest: int = max(TP_DEGREES), n_parts: int = MAX_STAGES
) -> Iterator[tuple[int, ...]]:
    """Multisets of TP degrees that use exactly `n_gpus`, each ascending."""
    if n_gpus == 0:
        yield ()
        return
    if n_parts == 0:
        return
    for degree in TP_DEGREES:
        if degree <= min(largest, n_gpus):
            for rest in degree_splits(n_gpus - degree, degree, n_parts - 1):
                yield (*rest, degree)


def even_layers(n_layers: int, n_stages: int) -> tuple[int, ...]:
    """Layers dealt out evenly, what is left over to the last stages."""
    share, left = divmod(n_layers, n_stages)
    return (share,) * (n_stages - left) + (share + 1,) * left


def max_replicas(region_bytes: Sequence[int]) -> int:
    """How many groups of REPLICA_BYTES the regions have room for; groups never span regions."""
    return sum(memory // REPLICA_BYTES for memory in region_bytes)


def _plan(cost: HexGenCost, machines: Sequence[Machine], degrees: tuple[tuple[int, ...], ...]) -> GroupPlan:
    stages = [(machine, tp) for machine, own in zip(machines, degrees, strict=True) for tp in own]
    layers = even_layers(cost.spec.n_layers, len(stages))
    fits, total_s = True, (len(machines) - 1) * cost.request_hop_s()
    for (machine, tp), n_layers in zip(stages, layers, strict=True):
        total_s += cost.request_compute_s(n_layers, tp) * machine.ability + cost.request_tp_s(n_layers, tp)
        fits = fits and cost.memory_bytes(n_layers, tp) <= machine.memory_bytes
    return GroupPlan(degrees, layers, total_s, fits)
