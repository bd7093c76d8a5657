"""`hexmesh plan` with a search: over a fleet in a file, or over what the running mesh has measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
from msgspec.structs import replace as with_fields

from daemon.terminal.client import Client, read_admin_key
from daemon.terminal.planning_inputs import chosen_dtype, load_fleet, load_model, load_workload
from daemon.terminal.search_progress import Watch, watching
from daemon.views import PlanningView
from hexmesh.cluster import Cluster, Role
from hexmesh.cost import STEP_TOKENS
from hexmesh.errors import InvalidInput
from hexmesh.fleet import Fleet, Scenario, fleet_of, what_if
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName
from hexmesh.planner.explanation import explain
from hexmesh.planner.finish import finish
from hexmesh.planner.front import ALGORITHMS, Found, search
from hexmesh.planner.in_use import in_use
from hexmesh.planner.objective import Objective, objective_named
from hexmesh.planner.plan_file import (
    VERSION,
    Compared,
    PlanFigures,
    PlanFile,
    WhatIfView,
    compared,
    figures_of,
    search_view,
)
from hexmesh.planner.problem import Problem
from hexmesh.planner.unmet import unmet, why_nothing
from hexmesh.schedule.wish import Wish
from hexmesh.workload import Workload

ROLES: dict[str, frozenset[Role]] = {
    "free": frozenset(("mixed", "prefill", "decode")),
    "strict": frozenset(("prefill", "decode")),
    "mixed": frozenset(("mixed",)),
}
_APPLY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line asked for."""

    cluster: str | None = None
    model: str | None = None
    workload: str | None = None
    dtype: str | None = None
    objective: str = "throughput"
    algorithm: str = "auto"
    budget_s: float = 60.0
    seed: int = 0
    roles: str = "free"
    changes: Sequence[str] = ()
    compares: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is planned: a cluster, a model in a dtype, a workload."""

    name: str
    cluster: Cluster
    fleet: Fleet
    spec: ModelSpec
    model_id: str
    model: str
    dtype: DtypeName
    workload: Workload
    hosts: dict[str, int] = field(default_factory=dict)
    max_model_tokens: int
    is_running: bool = False
    """Whether daemons are to carry it out."""


def from_file(asked: Asked) -> Subject:
    """What the named files say. Raises InvalidInput."""
    assert asked.cluster is not None
    if asked.model is None:
        raise InvalidInput("no model to plan for", next_step="name one: --model Llama-3-70B or a config.json")
    fleet, model = load_fleet(asked.cluster), load_model(asked.model)
    dtype = chosen_dtype(fleet, model, asked.dtype)
    return Subject(
        name=fleet.name or Path(asked.cluster).stem,
        cluster=Scenario(fleet, Workload(), dtype).cluster,
        fleet=fleet,
        spec=model.spec,
        model_id=model.name,
        model=model.name,
        dtype=dtype,
        workload=Workload() if asked.workload is None else load_workload(asked.workload),
        max_model_tokens=model.spec.max_position_tokens,
    )


def from_mesh(asked: Asked, client: Client) -> Subject:
    """What the running mesh plans over. Its model and dtype are settled; the workload may be another."""
    if asked.model is not None or asked.dtype is not None:
        raise InvalidInput(
            "the running mesh has its model and dtype", next_step="or name a fleet: --cluster FILE"
        )
    view = msgspec.json.decode(client.get("/admin/planning"), type=PlanningView)
    return Subject(
        name="the running mesh",
        cluster=view.cluster,
        fleet=fleet_of(view.cluster, view.dtype, view.model_name),
        spec=view.spec,
        model_id=view.model_id,
        model=view.model_name,
        dtype=view.dtype,
        workload=view.workload if asked.workload is None else load_workload(asked.workload),
        hosts=view.hosts,
        max_model_tokens=view.max_model_tokens,
        is_running=True,
    )


def plan_for(subject: Subject, asked: Asked) -> PlanFile:
    """The best plan that the search finds, with its account. Raises HexmeshError where nothing fits."""
    before = None
    if asked.changes:
        subject, before = _changed(subject, asked)
    problem = _problem(subject, asked)
    rows: tuple[Compared, ...] = ()
    if asked.compares:
        found, rows = _compare(problem, asked)
    else:
        found = _search(problem, asked, asked.algorithm)
    file = _file(subject, problem, found, asked)
    return with_fields(file, comparison=rows, what_if=before)


def figures_for(subject: Subject, asked: Asked) -> PlanFigures | None:
    """What the best plan does, without its account; None where nothing fits."""
    problem = _problem(subject, asked)
    found = _search(problem, asked, asked.algorithm)
    return None if found.best is None else figures_of(problem, found.best)


def apply(file: PlanFile, client: Client, state_dir: Path | None) -> None:
    """Hand objective, workload and plan to the mesh's coordinator, as its operator."""
    body = {
        "objective": file.objective,
        "workload": file.workload,
        "plan": file.plan,
        "reason": "hexmesh plan --apply",
    }
    key = read_admin_key(state_dir)
    client.post(
        "/admin/plan", msgspec.json.decode(msgspec.json.encode(body)), key=key, timeout_s=_APPLY_TIMEOUT_S
    )


def _changed(subject: Subject, asked: Asked) -> tuple[Subject, WhatIfView]:
    """The subject after the changes, and what held before. Both are planned as files say, so that they compare."""
    scenario = Scenario(subject.fleet, subject.workload, subject.dtype)
    after = what_if(scenario, asked.changes)
    problem = _problem(replace(subject, cluster=scenario.cluster, hosts={}), asked)
    found = _search(problem, asked, asked.algorithm)
    figures = None if found.best is None else figures_of(problem, found.best)
    view = WhatIfView(changes=tuple(asked.changes), before=figures, bound_before=found.bound_requests_per_s)
    new = replace(subject, cluster=after.cluster, fleet=after.fleet, workload=after.workload, hosts={})
    return new, view


def _problem(subject: Subject, asked: Asked) -> Problem:
    objective = objective_named(asked.objective, subject.workload)
    if subject.is_running:
        return _running_problem(subject, asked, objective)
    return Problem(
        cluster=subject.cluster,
        spec=subject.spec,
        dtype=subject.dtype,
        workload=subject.workload,
        objective=objective,
        roles=ROLES[asked.roles],
    )


def _running_problem(subject: Subject, asked: Asked, objective: Objective) -> Problem:
    """What the coordinator would search: daemons batch so many sequences at most, and must hold a whole one."""
    wish = Wish(
        everywhere=subject.cluster,
        hosts=subject.hosts or {node.id: 0 for node in subject.cluster.nodes},
        spec=subject.spec,
        dtype=subject.dtype,
        workload=subject.workload,
        objective=objective,
        max_model_tokens=subject.max_model_tokens,
        block_tokens=Problem.block_tokens,
        step_tokens=STEP_TOKENS,
    )
    return replace(wish.problem(wish.floors[0]), roles=ROLES[asked.roles])


def _search(problem: Problem, asked: Asked, algorithm: str) -> Found:
    with watching(algorithm) as watch:
        return _searched(problem, asked, algorithm, watch)


def _searched(problem: Problem, asked: Asked, algorithm: str, watch: Watch) -> Found:
    return search(
        problem,
        algorithm,
        seed=asked.seed,
        clock=time.monotonic,
        budget_s=asked.budget_s,
        on_step=watch.step,
    )


def _compare(problem: Problem, asked: Asked) -> tuple[Found, tuple[Compared, ...]]:
    """The best of all algorithms, each on its own, and a row for each."""
    everything = [(name, _search(replace(problem), asked, name)) for name in ALGORITHMS]
    ranked = sorted(everything, key=_rank, reverse=True)
    return ranked[0][1], tuple(compared(problem, found) for _, found in ranked)


def _rank(named: tuple[str, Found]) -> tuple[float, ...]:
    best = named[1].best
    return (float("-inf"),) if best is None else best.worth


def _file(subject: Subject, problem: Problem, found: Found, asked: Asked) -> PlanFile:
    if found.best is None:
        raise why_nothing(problem, found)
    best = in_use(problem, found.best)
    plan = finish(
        problem,
        best,
        model_id=subject.model_id,
        model_name=subject.model,
        max_model_tokens=subject.max_model_tokens,
        hosts=subject.hosts or {node.id: 0 for node in subject.cluster.nodes},
        reason=f"best {problem.objective.name} found by {found.algorithm}",
    )
    return PlanFile(
        version=VERSION,
        model=subject.model,
        spec=subject.spec,
        dtype=subject.dtype,
        objective=problem.objective.name,
        workload=problem.workload,
        cluster=subject.cluster,
        plan=plan,
        figures=figures_of(problem, best),
        bound_requests_per_s=found.bound_requests_per_s,
        bound=found.bound,
        gap=found.gap,
        search=search_view(found, asked.seed),
        unmet=tuple(unmet(problem, found)),
        explanation=explain(problem, best, plan),
    )
