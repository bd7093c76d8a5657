"""The models of a host as a table for people."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table

from daemon.views import CachedModelView
from hexmesh.ids import short
from hexmesh.units import show_bytes, show_duration


def models_table(models: Iterable[CachedModelView]) -> RenderableType:
    """A model a row: where it is, how much of it, and when that was used."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("MODEL", "ID", "WHERE", "CACHED", "LAYERS", "USED", "IN USE"):
        table.add_column(name, overflow="fold")
    for model in models:
        used = time.time() - model.used_at_unix_s if model.used_at_unix_s is not None else None
        table.add_row(
            model.name,
            short(model.id),
            model.folder or "cache",
            f"{show_bytes(model.cached_bytes)} of {show_bytes(model.weight_bytes)}",
            "all" if model.complete else show_layers(model.layers),
            f"{show_duration(max(0.0, used))} ago" if used is not None else "-",
            "yes" if model.in_use else "no",
        )
    return table


def show_layers(layers: Iterable[tuple[int, int]]) -> str:
    """Half-open ranges as people write them, such as "0-3, 7"."""
    shown = [str(start) if stop == start + 1 else f"{start}-{stop - 1}" for start, stop in layers]
    return ", ".join(shown) or "none"
