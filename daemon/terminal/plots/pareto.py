"""Cost against throughput: the least price per hour that was found for each rate."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from daemon.terminal.plots.canvas import INK, MUTED, PALETTE, new_figure, plain
from hexmesh.planner.plan_file import PlanFigures


def draw_pareto(model: str, points: Sequence[PlanFigures]) -> Figure:
    """One point a plan; those that another beats in both are hollow."""
    figure = new_figure(7.5, 4.4)
    axes = figure.add_subplot()
    best = front(points)
    axes.plot(
        [one.requests_per_s for one in best], [one.price_per_h for one in best],
        color=PALETTE[0], linewidth=1.5, drawstyle="steps-pre", alpha=0.6,
    )  # fmt: skip
    axes.plot([one.requests_per_s for one in best], [one.price_per_h for one in best], "o", color=PALETTE[0])
    beaten = [one for one in points if one not in best]
    axes.plot(
        [one.requests_per_s for one in beaten], [one.price_per_h for one in beaten],
        "o", markerfacecolor="none", color=MUTED, markersize=5,
    )  # fmt: skip
    for at, one in enumerate(best):
        above = at % 2 == 0
        axes.annotate(
            f"{one.n_devices} devices\n{one.price_per_million_tokens or 0:.2f} a million tokens",
            (one.requests_per_s, one.price_per_h), xytext=(-6 if above else 8, 7 if above else -3),
            textcoords="offset points", fontsize=6.5, color=INK, ha="right" if above else "left",
            va="bottom" if above else "top",
        )  # fmt: skip
    plain(axes, f"{model}: what a rate costs", "requests/s", "price per hour")
    axes.margins(0.14, 0.18)
    axes.set_ylim(bottom=0)
    return figure


def front(points: Sequence[PlanFigures]) -> list[PlanFigures]:
    """Plans that no other beats in rate and price at once, by rising rate."""
    found = list[PlanFigures]()
    for one in sorted(points, key=lambda one: (-one.requests_per_s, one.price_per_h)):
        if not found or one.price_per_h < found[-1].price_per_h * (1 - 1e-9):
            found.append(one)
    return found[::-1]
