"""`hexmesh doctor`: what would keep this host's daemon from taking part, and what to mend first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from daemon.verbs.as_join import AsJoin, join_options, joins_flags
from daemon.verbs.options import output_flag

if TYPE_CHECKING:
    from daemon.doctor.finding import Finding

_EXIT_DEGRADED = 3
_HIDDEN = (
    *("served_name", "name", "site", "cpu_affinity", "min_nodes"),
    *("ready_file", "log_format", "metrics_alias"),
)


@click.command(cls=AsJoin)
@output_flag("table", "json")
@joins_flags(hidden=_HIDDEN)
@click.pass_context
def doctor(context: click.Context, /, output: str, **texts: str | bool | None) -> None:
    """Look at this host as `join` would with the same settings; exit 3 when something has to be mended.

    Nothing is changed or downloaded. --peer names a node to compare clocks and roots with.
    """
    options = join_options(context, texts)

    from daemon.doctor.examination import World, examine
    from daemon.doctor.finding import mend_first

    findings = examine(options, World())
    first = mend_first(findings)
    if output == "json":
        report = {
            "checks": [asdict(finding) for finding in findings],
            "mend_first": asdict(first) if first is not None else None,
        }
        click.echo(json.dumps(report))
    else:
        click.echo("\n".join(table_lines(findings)))
        if first is not None:
            click.echo(f"\nthe one thing to mend first: {first.check}: {first.finding}; {first.next_step}")
    if first is not None:
        context.exit(_EXIT_DEGRADED)


def table_lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, and one under it for the next step."""
    lines = []
    for finding in findings:
        outcome = "FAIL" if finding.outcome == "fail" else finding.outcome
        lines.append(f"{outcome:<8} {finding.check:<15} {finding.finding}")
        if finding.next_step:
            lines.append(f"{'':<24} -> {finding.next_step}")
    return lines
