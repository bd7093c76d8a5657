"""A line that says how a search gets on: elapsed time, the best so far, and who found it. Only on a terminal."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from daemon.terminal.render import new_console
from hexmesh.planner.run import Step


@dataclass(frozen=True, slots=True)
class Watch:
    """Takes the search's steps."""

    progress: Progress
    task: TaskID
    name: str

    def step(self, step: Step) -> None:
        """A better plan was found."""
        said = f"{self.name}: best so far {step.requests_per_s:.4g} requests/s, by {step.by}"
        self.progress.update(self.task, description=said)


@contextmanager
def watching(name: str) -> Iterator[Watch]:
    """Show the progress of one search on stderr; nothing where that is no terminal."""
    console = new_console(sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with shown as progress, _stdout_to_nowhere():
        yield Watch(progress, progress.add_task(f"{name}: searching", total=None), name)


@contextmanager
def _stdout_to_nowhere() -> Iterator[None]:
    """HiGHS prints a line of its debugging now and then, whatever it is asked for; it must not stand before our JSON.

    It writes through C, so the descriptor is moved, and what C buffers is flushed before it comes back.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
