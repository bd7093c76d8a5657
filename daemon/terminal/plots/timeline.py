"""A simulation over time: tokens, requests and KV, and how busy each stage was."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from daemon.terminal.plots.canvas import FAINT, INK, MUTED, PALETTE, checked_path, new_figure, plain, write
from daemon.terminal.simulate_command import Simulation

_MOST_STAGES = 28


def plot_simulation(run: Simulation, path: str) -> None:
    """Draw a simulation and write it."""
    result = run.result
    title = (
        f"{run.model}: {result.requests_per_s:.4g} requests/s, {result.goodput_share:.1%} within the limits"
    )
    write(draw_timeline(title, run), checked_path(path))


def draw_timeline(title: str, run: Simulation) -> Figure:
    """Three curves over one time, and bars beside them."""
    result = run.result
    figure = new_figure(10.5, 6.4)
    grid = figure.add_gridspec(3, 2, width_ratios=(2.6, 1))
    top = figure.add_subplot(grid[0, 0])
    middle = figure.add_subplot(grid[1, 0], sharex=top)
    bottom = figure.add_subplot(grid[2, 0], sharex=top)
    times = [point.at_s for point in result.timeline]
    top.plot(times, [point.tokens_per_s for point in result.timeline], color=PALETTE[0], linewidth=1.3)
    plain(top, title, "", "output tokens/s")
    middle.plot(
        times, [point.running for point in result.timeline], color=PALETTE[2], linewidth=1.3, label="running"
    )
    middle.plot(
        times, [point.waiting for point in result.timeline], color=PALETTE[1], linewidth=1.3, label="waiting"
    )
    middle.legend(loc="upper right", frameon=False, fontsize=8, ncols=2, labelcolor=MUTED)
    plain(middle, "", "", "requests")
    bottom.plot(times, [100 * point.kv_used for point in result.timeline], color=PALETTE[4], linewidth=1.3)
    plain(bottom, "", "seconds", "KV blocks held, %")
    for axes in (top, middle, bottom):
        _mark(axes, run)
        axes.set_ylim(bottom=0)
        axes.margins(x=0)
    for axes in (top, middle):
        axes.tick_params(labelbottom=False)
    _bars(figure.add_subplot(grid[:, 1]), run)
    return figure


def _mark(axes: Axes, run: Simulation) -> None:
    """The measured window, and when hosts died and came back."""
    axes.axvspan(
        run.result.window_start_s, run.result.window_stop_s, color=FAINT, alpha=0.45, linewidth=0, zorder=0
    )
    for failure in run.failures:
        axes.axvline(failure.at_s, color="#c0392b", linewidth=1.1)
        axes.annotate(
            f" {run.names[failure.node][:14]} dies", (failure.at_s, 1), xycoords=("data", "axes fraction"), va="top",
            fontsize=7, color="#c0392b",
        )  # fmt: skip
        if failure.back_s is not None:
            axes.axvline(failure.back_s, color=PALETTE[2], linewidth=1.1, linestyle=(0, (4, 2)))


def _bars(axes: Axes, run: Simulation) -> None:
    """The busiest stages, in the order of the plan."""
    result = run.result
    busiest = sorted(result.stages, key=lambda stage: -stage.busy)[:_MOST_STAGES]
    shown = [stage for stage in result.stages if stage in busiest]
    places = range(len(shown))
    replicas = list(dict.fromkeys(stage.replica for stage in result.stages))
    colours = [PALETTE[replicas.index(stage.replica) % len(PALETTE)] for stage in shown]
    axes.barh(places, [100 * stage.busy for stage in shown], color=colours, height=0.72)
    for at, stage in zip(places, shown, strict=True):
        axes.text(101, at, f"{stage.busy:.0%}", va="center", fontsize=6.5, color=INK)
    axes.set_yticks(
        list(places), [f"{stage.replica}/{stage.stage}  {run.names[stage.node][:12]}" for stage in shown]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    plain(axes, "Stages, busy", "% of the window", "")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.grid(visible=False, axis="y")
