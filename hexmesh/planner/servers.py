"""Servers as volunteer swarms know them: devices that hold a range of layers together, each for itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hexmesh.planner.pools import Part
from hexmesh.planner.problem import Problem
from hexmesh.score import Pipeline
from hexmesh.score.pipeline import NOWHERE


@dataclass(frozen=True, slots=True)
class Server:
    """`tp` devices of a pool."""

    pool: int
    tp: int
    rates: tuple[float, ...]
    """Requests per second, prompt and output, through 1, 2 ... layers held: as many as there is room for."""

    @property
    def max_layers(self) -> int:
        return len(self.rates)


def servers_of(problem: Problem) -> list[Server]:
    """All devices that may be mixed, in the largest TP groups that there can be; those with no room left out."""
    known = dict[tuple[object, ...], tuple[float, ...]]()
    found = []
    for pool, tp in _groups(problem):
        of = problem.pools[pool]
        alike = (of.device, of.node.fabric, of.node.launch_s, of.node.step_s, tp)
        if alike not in known:
            known[alike] = tuple(_rates(problem, pool, tp))
        if known[alike]:
            found.append(Server(pool, tp, known[alike]))
    return found


def _groups(problem: Problem) -> Iterator[tuple[int, int]]:
    for at, pool in enumerate(problem.pools):
        left = pool.size if problem.may_be(((at, 1),), "mixed") else 0
        while left > 0:
            tp = max(degree for degree in pool.degrees if degree <= left)
            yield at, tp
            left -= tp


def _rates(problem: Problem, pool: int, tp: int) -> Iterator[float]:
    """By layers held, while the KV of the workload's sequences at once fits beside them."""
    capacities, least = problem.capacities, problem.workload.max_concurrent_sequences
    for n_layers in range(1, problem.spec.n_layers + 1):
        seat = problem.seat(Part(pool=pool, tp=tp, start=0, stop=n_layers))
        alone = Pipeline(seats=(seat,), hops=(), back=NOWHERE)
        if capacities.resident(alone) < least:
            return
        yield capacities.mixed(alone).requests_per_s
