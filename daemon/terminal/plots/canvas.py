"""What all pictures share: a figure without a display, colours, and how it is written."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hexmesh.errors import InvalidInput

INK, MUTED, FAINT, PAPER = "#1f2430", "#6b7280", "#e5e7eb", "#ffffff"
PALETTE = (
    *("#4c78a8", "#e07b39", "#3a9d6e", "#b55d8c", "#8268b0", "#c9a227", "#5aa9c4", "#a0624b"),
    *("#7a9a3c", "#d1605e", "#54698d", "#d49bb5", "#2f7f79", "#9c8ade", "#b8873b", "#708090"),
)
SUFFIXES = (".png", ".svg")
_DPI = 160


def new_figure(width: float, height: float, *, is_laid_out: bool = True) -> Figure:
    """An empty picture, so many inches large; laid out, unless its axes are placed by hand."""
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "hexmesh"})
    return Figure(figsize=(width, height), facecolor=PAPER, layout="constrained" if is_laid_out else None)


def checked_path(text: str) -> Path:
    """Where to write. Raises InvalidInput for a format that is not drawn."""
    path = Path(text).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidInput(f"{text!r} is neither .png nor .svg", next_step="name a .png or .svg file")
    return path


def write(figure: Figure, path: Path) -> None:
    """Raises InvalidInput where it cannot be written."""
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidInput(f"{path} cannot be written: {reason}", next_step="name another file") from None


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    """A quiet frame: title and axes named, no box."""
    axes.set_title(title, loc="left", color=INK, fontsize=10, fontweight="bold")
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
