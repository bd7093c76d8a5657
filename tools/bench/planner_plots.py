"""Plots of the planner's benchmark."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tools.bench.planner_fleets import SPEED_FLEETS, Planned
from tools.bench.planner_ratios import Results

WIDTH = 9.0
MARKS = "osD^vP*X<>phd"


def draw(results: Results, folder: Path) -> None:
    """planner-values.png and planner-speed.png."""
    _values(results, folder / "planner-values.png")
    _speed(results, folder / "planner-speed.png")


def _values(results: Results, path: Path) -> None:
    """Rates as shares of the bound, a row a fleet, a mark an algorithm: the mean over classes and models."""
    shares = defaultdict[str, dict[str, list[float]]](dict)
    for one in results.values():
        if isinstance(one, Planned) and not one.cell.is_speed and one.bound_requests_per_s > 0:
            shares[one.cell.fleet].setdefault(one.cell.algorithm, []).append(1 - one.gap)
    fleets = list(shares)
    names = list(dict.fromkeys(name for fleet in fleets for name in shares[fleet]))
    figure, axes = plt.subplots(figsize=(WIDTH, max(3.6, 1.2 + 0.4 * len(fleets))), layout="constrained")
    for at, name in enumerate(names):
        points = [
            (statistics.fmean(shares[fleet][name]), row)
            for row, fleet in enumerate(fleets)
            if name in shares[fleet]
        ]
        axes.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            s=220 if name == "auto" else 28,
            marker="|" if name == "auto" else MARKS[at % len(MARKS)],
            color="black" if name == "auto" else plt.colormaps["tab20"](at % 20),
            zorder=3 if name == "auto" else 2,
            alpha=1.0 if name == "auto" else 0.8,
        )
    axes.set_yticks(range(len(fleets)), fleets)
    axes.set_ylim(len(fleets) - 0.5, -0.5)
    axes.set_xlim(0.0, 1.02)
    axes.set_xlabel("requests/s as a share of the fleet's bound (mean over classes and models)")
    axes.grid(axis="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _speed(results: Results, path: Path) -> None:
    """auto's best so far as a share of what it has at ten times its budget, over time."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for fleet in SPEED_FLEETS:
        runs = [
            one
            for one in results.values()
            if isinstance(one, Planned) and one.cell.is_speed and one.cell.fleet == fleet and one.trace
        ]
        if not runs:
            continue
        longest = max(runs, key=lambda one: one.cell.budget_s)
        times = [max(0.01, at) for at, _ in longest.trace] + [longest.seconds]
        values = [value / longest.requests_per_s for _, value in longest.trace] + [1.0]
        axes.step(times, values, where="post", label=fleet)
    axes.axhline(0.99, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of search")
    axes.set_ylabel("share of the value at 10x")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
