"""`--plot`: which picture of a plan is drawn where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from msgspec.structs import replace as with_fields

from daemon.terminal.plan_command import Asked, Subject, figures_for
from daemon.terminal.plots.canvas import checked_path, write
from daemon.terminal.plots.convergence import draw_convergence
from daemon.terminal.plots.pareto import draw_pareto
from daemon.terminal.plots.topology import draw_topology
from hexmesh.errors import InvalidInput
from hexmesh.planner.plan_file import PlanFigures, PlanFile
from hexmesh.workload import PoissonArrivals

KINDS = ("topology", "search", "pareto")
PARETO_POINTS = 10


def checked_plots(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(kind, path) of "FILE" or "KIND:FILE". Raises InvalidInput, before any search is begun."""
    found = []
    for text in texts:
        kind, colon, path = text.partition(":")
        if not colon:
            kind, path = "topology", text
        if kind not in KINDS:
            raise InvalidInput(
                f"no picture is called {kind!r}", next_step=f"choose one of {', '.join(KINDS)}"
            )
        checked_path(path)
        found.append((kind, path))
    return found


def plot_plan(file: PlanFile, subject: Subject, asked: Asked, kind: str, path: str) -> None:
    """Draw one picture."""
    match kind:
        case "topology":
            figure = draw_topology(file)
        case "search":
            figure = draw_convergence(file)
        case _:
            figure = draw_pareto(file.model, pareto_points(file, subject, asked))
    write(figure, checked_path(path))


def pareto_points(file: PlanFile, subject: Subject, asked: Asked) -> list[PlanFigures]:
    """The cheapest plans for a tenth, two tenths and so on of the highest rate. Raises InvalidInput without prices."""
    if not any(node.price_per_h for node in subject.cluster.nodes):
        raise InvalidInput("no host has a price", next_step="add price_per_h to hosts of the cluster file")
    most = replace(asked, objective="throughput", budget_s=asked.budget_s / 2)
    top = file.figures if file.objective == "throughput" else figures_for(subject, most)
    found = [] if top is None else [top]
    for at in range(1, PARETO_POINTS):
        rate = (found[0].requests_per_s if found else 0.0) * at / PARETO_POINTS
        arrivals = PoissonArrivals(requests_per_s=rate)
        wanted = replace(subject, workload=with_fields(subject.workload, arrivals=arrivals))
        each = replace(asked, objective="cost", budget_s=asked.budget_s / PARETO_POINTS)
        figures = figures_for(wanted, each)
        found += [] if figures is None else [figures]
    return found
