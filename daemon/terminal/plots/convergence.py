"""How a search got on: the best plan over time, who found it, and the bound above."""

from __future__ import annotations

from matplotlib.figure import Figure

from daemon.terminal.plots.canvas import INK, MUTED, PALETTE, new_figure, plain
from hexmesh.planner.plan_file import PlanFile


def draw_convergence(file: PlanFile) -> Figure:
    """Steps of the rate; one colour for each algorithm that improved it."""
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    search, trace = file.search, file.search.trace
    first_s = min((step.elapsed_s for step in trace), default=0.0)
    end_s = max(search.elapsed_s, first_s * 1.05, 1e-3)
    colours = {
        name: PALETTE[at % len(PALETTE)] for at, name in enumerate(dict.fromkeys(step.by for step in trace))
    }
    ends = [step.elapsed_s for step in trace[1:]] + [end_s]
    for step, until_s in zip(trace, ends, strict=True):
        axes.plot([step.elapsed_s, until_s], [step.requests_per_s] * 2, color=colours[step.by], linewidth=2.2)
    for name, colour in colours.items():
        found = [(step.elapsed_s, step.requests_per_s) for step in trace if step.by == name]
        axes.plot(*zip(*found, strict=True), "o", color=colour, markersize=5, label=name)
    bound = file.bound_requests_per_s
    axes.axhline(bound, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.annotate(
        f"bound {bound:.4g}", (1, bound), xycoords=("axes fraction", "data"), xytext=(-4, 4),
        textcoords="offset points", ha="right", color=INK, fontsize=8,
    )  # fmt: skip
    plain(
        axes,
        f"{file.model}: {file.figures.requests_per_s:.4g} requests/s after {search.elapsed_s:.2g} s, "
        f"{file.gap:.1%} from the bound",
        "seconds",
        "requests/s",
    )
    axes.set_ylim(0, bound * 1.12)
    if end_s > 20 * max(first_s, 1e-3):
        axes.set_xscale("log")
    axes.legend(
        loc="lower right", frameon=False, fontsize=8, labelcolor=MUTED, title="found by", title_fontsize=8
    )
    return figure
