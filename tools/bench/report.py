"""The shape of every bench's result: figures with unit, spread, goal and whether the goal holds; --json and --quick."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value: mean and spread over its samples; `goal` is a bound on the mean, if there is one."""

    value: float
    unit: str
    spread: float = 0.0
    """Standard deviation of the samples."""
    n_samples: int = 1
    goal: str | None = None
    holds: bool | None = None


@dataclass(slots=True)
class Report:
    """What a bench measured, how, and what it left out."""

    name: str
    method: str
    figures: dict[str, Figure] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        name: str,
        samples: Sequence[float] | float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Record a figure from its samples, with a goal where one is set."""
        values = [samples] if isinstance(samples, int | float) else list(samples)
        mean = statistics.fmean(values)
        goal: str | None = None
        holds: bool | None = None
        if at_least is not None:
            goal, holds = f">= {at_least:g} {unit}", mean >= at_least
        if at_most is not None:
            goal, holds = f"<= {at_most:g} {unit}", mean <= at_most
        self.figures[name] = Figure(
            value=mean,
            unit=unit,
            spread=statistics.stdev(values) if len(values) > 1 else 0.0,
            n_samples=len(values),
            goal=goal,
            holds=holds,
        )

    def as_json(self) -> str:
        """One JSON object: figure -> value, unit, goal, holds; and what was not run."""
        document: dict[str, object] = {name: asdict(figure) for name, figure in self.figures.items()}
        document["_bench"] = {
            "name": self.name,
            "method": self.method,
            "not_run": self.not_run,
            "notes": self.notes,
        }
        return json.dumps(document, indent=2)

    def as_text(self) -> str:
        """The figures as a table for people."""
        lines = [self.name, f"  {self.method}", ""]
        width = max((len(name) for name in self.figures), default=0)
        for name, figure in self.figures.items():
            spread = f" +- {figure.spread:.3g}" if figure.n_samples > 1 else ""
            goal = f"   goal {figure.goal}: {'holds' if figure.holds else 'MISSED'}" if figure.goal else ""
            lines.append(f"  {name:<{width}}  {figure.value:10.4g}{spread} {figure.unit}{goal}")
        lines += [f"  not run: {name}" for name in self.not_run]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def bench_arguments(description: str) -> argparse.ArgumentParser:
    """The options that every bench takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="about a minute; says what it leaves out")
    return parser


def progress(text: str) -> None:
    """A line on what is happening, on stderr so that stdout stays parseable."""
    print(text, file=sys.stderr, flush=True)


def print_report(report: Report, form: Literal["json", "text"]) -> None:
    """The report on stdout."""
    print(report.as_json() if form == "json" else report.as_text())
