"""`hexmesh simulate`: a saved plan at work in virtual time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from daemon.terminal.planning_inputs import load_fleet, load_model, load_workload, read_bytes
from daemon.terminal.render import new_console
from hexmesh.cluster import Cluster
from hexmesh.errors import InvalidInput
from hexmesh.fleet import cluster_of
from hexmesh.model_spec import ModelSpec
from hexmesh.planner.plan_file import PlanFigures, PlanFile, read_plan_file
from hexmesh.schedule.check import check_plan
from hexmesh.sim import Failure, SimResult, n_to_settle, simulate
from hexmesh.units import parse_duration_s
from hexmesh.workload import Workload

N_REQUESTS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is simulated."""

    plan: str
    workload: str | None = None
    """None: the one that the plan was made for, as are the next two."""
    cluster: str | None = None
    model: str | None = None
    n_requests: int | None = None
    """None: N_REQUESTS, and without a rate as many as it takes to settle."""
    seed: int = 0
    failures: Sequence[str] = ()


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """What `hexmesh simulate` prints: the plan's own prediction, and what the simulation found."""

    model: str
    workload: Workload
    n_requests: int
    seed: int
    failures: tuple[Failure, ...]
    predicted: PlanFigures
    names: dict[str, str]
    """Of hosts, by the ids that the result has."""
    result: SimResult

    def named(self, text: str) -> str:
        """The text with names of hosts instead of ids."""
        for node, name in self.names.items():
            if node != name:
                text = text.replace(node, name)
        return text


def simulation_of(scene: Scene) -> Simulation:
    """Run it. Raises InvalidInput for files that are none, and for a plan that the cluster cannot run."""
    file = read_plan_file(read_bytes(scene.plan, "plan"), scene.plan)
    workload = file.workload if scene.workload is None else load_workload(scene.workload)
    cluster, spec = _cluster(file, scene), _spec(file, scene)
    if faults := check_plan(file.plan, cluster, spec):
        raise InvalidInput(
            f"{scene.plan} does not fit: {faults[0]}", next_step="plan anew for this cluster and model"
        )
    failures = [read_failure(text, cluster) for text in scene.failures]
    n_requests = scene.n_requests or max(
        N_REQUESTS, n_to_settle(file.plan) if workload.arrivals is None else 0
    )
    with _watching() as progress:
        result = simulate(
            file.plan,
            cluster,
            spec,
            workload,
            n_requests=n_requests,
            seed=scene.seed,
            failures=failures,
            progress=progress,
        )
    return Simulation(
        model=file.model,
        workload=workload,
        n_requests=n_requests,
        seed=scene.seed,
        failures=tuple(failures),
        predicted=file.figures,
        names={node.id: node.name for node in cluster.nodes},
        result=result,
    )


def read_failure(text: str, cluster: Cluster) -> Failure:
    """NODE@T or NODE@T-BACK, durations such as 30s: the host dies at T and is back at BACK. Raises InvalidInput."""
    name, at, when = text.rpartition("@")
    found = next((node.id for node in cluster.nodes if name in (node.name, node.id)), None)
    if not at or not when:
        raise InvalidInput(f"{text!r} is no failure", next_step="write such as a100-0@30s or a100-0@30s-90s")
    if found is None:
        names = ", ".join(node.name for node in cluster.nodes[:12])
        raise InvalidInput(f"no host is called {name!r}", next_step=f"name one of {names}")
    start, dash, back = when.partition("-")
    at_s, back_s = parse_duration_s(start), parse_duration_s(back) if dash else None
    if back_s is not None and back_s <= at_s:
        raise InvalidInput(f"{text!r}: it is back before it dies", next_step="write the later time last")
    return Failure(at_s=at_s, node=found, back_s=back_s)


def _cluster(file: PlanFile, scene: Scene) -> Cluster:
    return file.cluster if scene.cluster is None else cluster_of(load_fleet(scene.cluster), file.dtype)


def _spec(file: PlanFile, scene: Scene) -> ModelSpec:
    return file.spec if scene.model is None else load_model(scene.model).spec


@contextmanager
def _watching() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; nothing where that is no terminal."""
    console = new_console(sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("simulating", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
