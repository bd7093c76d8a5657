"""What the planner's benchmark plans: fleets, classes of workload, models and algorithms, and what one cell of it is.

A cell is a problem and an algorithm, planned from nothing with a seed of its own; cells share nothing, so that any may
be run again alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec

from hexmesh.cluster import Cluster, Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.plan import Plan
from hexmesh.planner.finish import finish
from hexmesh.planner.front import ALGORITHMS, search
from hexmesh.planner.objective import Throughput
from hexmesh.planner.pools import ROLES, Part
from hexmesh.planner.problem import Draft, Problem
from hexmesh.workload import CLASSES, Workload

FLEETS = Path(__file__).resolve().parents[2] / "docs" / "fleets"
MODELS = ("Llama-2-70B", "Llama-3-70B", "OPT-30B")
FEWER_CLASSES = {"Llama-3-70B": ("HPLD", "LPHD")}
"""Its layers are Llama-2-70B's, so the two extremes say enough."""
SMALL_FLEETS = (
    "hexgen2-1",
    "hexgen2-2",
    "hexgen2-3",
    "hexgen2-4",
    "hexgen2-5",
    "hexgen2-h100",
    "hexgen-16-a100",
    "hexgen-30",
    "hexgen-58",
    "helix-24",
    "mixed-24-10g",
    "mixed-64",
)
DATA_CENTRES = ("hexgen2-1", "hexgen2-2", "hexgen2-3", "hexgen2-4", "hexgen2-5", "hexgen2-h100", "mixed-64")
"""One site, 100 Gbit/s and more: where the gap to the bound has a goal. Larger fleets have lines between sites."""
LARGE_FLEETS = {"mixed-320": ("HPLD", "LPHD"), "mixed-1024": ("HPLD",)}
"""With the classes that they are planned for, Llama-2-70B alone."""
LARGE_ALGORITHMS = ("auto", "greedy", "columns", "annealing", "hexgen2-wide", "uniform", "distserve")
NOT_COMPARED = ("exhaustive", "large", "joint", "alone")
"""For few devices, for least cost, and for hosts that hand nothing over: benches or tests of their own."""
PLAIN = "512/128"
"""Prompts of 512 and outputs of 128 tokens: what speed is measured on."""
SPEED_FLEETS = ("mixed-24", "mixed-64", "mixed-320", "mixed-1024")
MAX_MODEL_TOKENS = 4096
SEED = 1


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One planning."""

    fleet: str
    workload: str
    """One of the four classes, or PLAIN."""
    model: str
    algorithm: str
    budget_s: float
    is_speed: bool = False
    """Kept apart from the comparison, as its budget differs."""

    @property
    def key(self) -> str:
        speed = f"/speed-{self.budget_s:g}s" if self.is_speed else ""
        return f"{self.fleet}/{self.workload}/{self.model}/{self.algorithm}{speed}"

    @property
    def problem(self) -> str:
        """The same for all algorithms."""
        return f"{self.fleet}/{self.workload}/{self.model}"


class Planned(msgspec.Struct, frozen=True, kw_only=True, tag="planned"):
    """What came of a cell."""

    cell: Cell
    requests_per_s: float
    """0: nothing that fits was found."""
    bound_requests_per_s: float
    seconds: float
    n_judged: int
    was_cut_off: bool
    trace: tuple[tuple[float, float], ...]
    """(seconds, requests per second) of each draft that was better than all before."""
    draft: tuple[tuple[Role, tuple[tuple[int, int, int, int], ...]], ...]
    """Roles, and (pool, TP, start, stop) of the stages."""
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.cell.key

    @property
    def gap(self) -> float:
        """What is left to the bound, as a share of it."""
        return 1 - self.requests_per_s / self.bound_requests_per_s if self.bound_requests_per_s > 0 else 0.0


def budget_s(fleet: str) -> float:
    """Processor seconds for `auto`, its simulations included; speed is judged at these, too."""
    return {"mixed-24": 3.0, "mixed-64": 8.0, "mixed-320": 20.0, "mixed-1024": 60.0}.get(fleet, 12.0)


def cells(*, quick: bool) -> Iterator[Cell]:
    """All cells; a few for a quick look."""
    compared = [name for name in ALGORITHMS if name not in NOT_COMPARED]
    for fleet in ("hexgen2-1", "hexgen2-h100") if quick else SMALL_FLEETS:
        for model in MODELS[:1] if quick else MODELS:
            for workload in ("HPLD", "LPHD") if quick else FEWER_CLASSES.get(model, tuple(CLASSES)):
                for name in compared:
                    yield _cell(fleet, workload, model, name)
    if quick:
        return
    for fleet, workloads in LARGE_FLEETS.items():
        for workload in workloads:
            for name in compared:
                if name in LARGE_ALGORITHMS:
                    yield _cell(fleet, workload, MODELS[0], name)
    for fleet in SPEED_FLEETS:
        for times in (1, 10):
            yield Cell(
                fleet=fleet,
                workload=PLAIN,
                model=MODELS[0],
                algorithm="auto",
                budget_s=budget_s(fleet) * times,
                is_speed=True,
            )


def _cell(fleet: str, workload: str, model: str, algorithm: str) -> Cell:
    budget = max(12.0, budget_s(fleet)) if algorithm == "auto" else max(6.0, budget_s(fleet) / 2)
    return Cell(fleet=fleet, workload=workload, model=model, algorithm=algorithm, budget_s=budget)


@cache
def cluster_named(fleet: str) -> Cluster:
    """A fleet of docs/fleets."""
    return cluster_of(read_fleet((FLEETS / f"{fleet}.toml").read_text(encoding="utf-8")), "float16")


@cache
def spec_named(model: str) -> ModelSpec:
    """A model of the shipped configs."""
    return model_spec_from_config(dict(KNOWN[model]))


def workload_named(name: str) -> Workload:
    """A class of requests as they come in it, or all of one length."""
    return Workload(prompt_tokens=512, output_tokens=128) if name == PLAIN else Workload.of(CLASSES[name])


def problem_of(fleet: str, workload: str, model: str, roles: frozenset[Role] = frozenset(ROLES)) -> Problem:
    """What is planned in a cell."""
    return Problem(
        cluster=cluster_named(fleet),
        spec=spec_named(model),
        dtype="float16",
        workload=workload_named(workload),
        objective=Throughput(),
        roles=roles,
    )


def run_cell(cell: Cell) -> Planned:
    """Plan it. Seconds are the processor's, as others may use the machine; searches have one thread."""
    problem = problem_of(cell.fleet, cell.workload, cell.model)
    found = search(problem, cell.algorithm, seed=SEED, clock=time.process_time, budget_s=cell.budget_s)
    best = found.best
    return Planned(
        cell=cell,
        requests_per_s=0.0 if best is None else best.flow.requests_per_s,
        bound_requests_per_s=found.bound_requests_per_s,
        seconds=found.elapsed_s,
        n_judged=found.n_judged,
        was_cut_off=found.was_cut_off,
        trace=tuple((step.elapsed_s, step.requests_per_s) for step in found.trace),
        draft=() if best is None else packed(best.draft),
        notes=found.notes,
    )


def packed(draft: Draft) -> tuple[tuple[Role, tuple[tuple[int, int, int, int], ...]], ...]:
    """A draft without what can be worked out again."""
    return tuple(
        (layout.role, tuple((part.pool, part.tp, part.start, part.stop) for part in layout.parts))
        for layout in draft
    )


def plan_of(problem: Problem, planned: Planned) -> Plan:
    """The plan that a cell came to."""
    layouts = (
        problem.layouts.rated(
            tuple(Part(pool=pool, tp=tp, start=start, stop=stop) for pool, tp, start, stop in parts), role
        )
        for role, parts in planned.draft
    )
    draft = tuple(layout for layout in layouts if layout is not None)
    assert len(draft) == len(planned.draft)
    return finish(
        problem,
        problem.judge(draft),
        model_id=planned.cell.model,
        model_name=planned.cell.model,
        max_model_tokens=MAX_MODEL_TOKENS,
        hosts={node.id: 1 for node in problem.cluster.nodes},
    )
