"""`hexmesh plan`: show the running mesh's plan, or search for one over a fleet that is described or measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daemon.verbs.options import Duration, client_of, daemon_flags, flag, output_flag, state_path
from hexmesh.errors import InvalidInput

if TYPE_CHECKING:
    from daemon.terminal.plan_command import Asked
    from hexmesh.planner.plan_file import PlanFile

_EXIT_UNMET = 3
_SEARCH_FLAGS = (
    *("model", "workload", "objective", "algorithm", "budget_s", "seed", "roles", "dtype"),
    *("explain", "compare", "what_if", "plot", "save", "apply"),
)
"""Any of them on the command line or in the environment asks for a search; a settings file may hold defaults."""


@click.command()
@flag(
    "--cluster",
    "Plan for the hosts of this file instead of the running mesh (docs/fleets).",
    verb="plan",
    metavar="FILE",
)
@flag(
    "--model",
    "A known name such as Llama-3-70B, a folder, a config.json or a hub id.",
    verb="plan",
    metavar="M",
)
@flag(
    "--workload",
    "A class such as HPLD or HPLD@4/s, a workload file or a trace (docs/workloads.md).",
    verb="plan",
    metavar="W",
)
@flag(
    "--objective",
    "What the plan is to be good at.",
    verb="plan",
    default="throughput",
    show_default=True,
    type=click.Choice(("throughput", "goodput", "latency", "cost")),
)
@flag(
    "--algorithm",
    "Which search to use; --compare names all.",
    verb="plan",
    default="auto",
    show_default=True,
    metavar="A",
)
@flag(
    "--budget-s",
    "Longest time of one search.",
    verb="plan",
    type=Duration(),
    default="60s",
    show_default=True,
)
@flag(
    "--seed",
    "The same seed gives the same plan.",
    verb="plan",
    type=click.IntRange(0, 2**31),
    default=0,
    show_default=True,
)
@flag(
    "--roles",
    "free: as is best; strict: prefill and decode apart; mixed: never apart.",
    verb="plan",
    type=click.Choice(("free", "strict", "mixed")),
    default="free",
    show_default=True,
)
@flag("--dtype", "float32, bfloat16 or float16. Default: the model's own.", verb="plan", metavar="T")
@flag(
    "--explain", "Say why: bottleneck, need and room, roles, cuts, what is unused.", verb="plan", is_flag=True
)
@flag("--compare", "Run every algorithm and show them side by side.", verb="plan", is_flag=True)
@flag(
    "--what-if",
    'Plan before and after a change, such as "remove h100" (docs/planning.md). Repeatable.',
    verb="plan",
    multiple=True,
    metavar="CHANGE",
)
@flag(
    "--plot",
    "Draw into FILE (.png, .svg) the topology, or search:FILE, or pareto:FILE. Repeatable.",
    verb="plan",
    multiple=True,
    metavar="[KIND:]FILE",
)
@flag(
    "--save",
    "Write the plan and all it was made from here, for `hexmesh simulate`.",
    verb="plan",
    metavar="FILE",
)
@flag(
    "--apply",
    "Hand the running mesh's coordinator this objective, workload and plan.",
    verb="plan",
    is_flag=True,
)
@output_flag("table", "json")
@daemon_flags
@click.pass_context
def plan(
    context: click.Context,
    /,
    output: str,
    url: str | None,
    state_dir: str | None,
    api_key_file: str | None,
    **flags: Any,
) -> None:
    """Show the plan: each device's share, what it needs, what it has, and why.

    With --cluster, a plan for the fleet of that file. With other flags of a search and no --cluster, one over what
    the running mesh has measured; it changes nothing unless --apply is given. Exit 3 where what was asked for
    cannot be had in full.
    """
    if flags["cluster"] is None and not _asks_for_a_search(context):
        _show(output, url, state_dir, api_key_file)
        return
    if flags["cluster"] is not None and flags["apply"]:
        raise InvalidInput("--apply is for the running mesh", next_step="leave --cluster out")

    from daemon.terminal.plan_command import apply, from_file, from_mesh, plan_for

    asked, plots = _asked(flags), []
    if flags["plot"]:
        from daemon.terminal.plot_command import checked_plots, plot_plan

        plots = checked_plots(flags["plot"])
    if asked.cluster is not None:
        subject = from_file(asked)
    else:
        subject = from_mesh(_without_settings(context, asked), client_of(url, state_dir, api_key_file))
    file = plan_for(subject, asked)
    _print(file, output, is_explained=flags["explain"])
    if flags["save"]:
        _save(file, flags["save"])
    for kind, path in plots:
        plot_plan(file, subject, asked, kind, path)
        click.echo(f"drew {path}", err=True)
    if flags["apply"]:
        apply(file, client_of(url, state_dir, api_key_file), state_path(state_dir))
        click.echo("handed to the coordinator; `hexmesh plan` shows what it makes of it", err=True)
    if file.unmet:
        context.exit(_EXIT_UNMET)


def _asks_for_a_search(context: click.Context) -> bool:
    said = {click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT}
    return any(context.get_parameter_source(name) in said for name in _SEARCH_FLAGS)


def _show(output: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """The running mesh's present plan."""
    from daemon.verbs.reads import print_view, show_plan

    client = client_of(url, state_dir, api_key_file)
    body = client.get("/admin/plan")
    if output == "json":
        click.echo(body.decode().strip())
    else:
        print_view(client, body, show_plan)


def _asked(flags: dict[str, Any]) -> Asked:
    from daemon.terminal.plan_command import Asked

    return Asked(
        cluster=flags["cluster"],
        model=flags["model"],
        workload=flags["workload"],
        dtype=flags["dtype"],
        objective=flags["objective"],
        algorithm=flags["algorithm"],
        budget_s=flags["budget_s"],
        seed=flags["seed"],
        roles=flags["roles"],
        changes=flags["what_if"],
        compares=flags["compare"],
    )


def _without_settings(context: click.Context, asked: Asked) -> Asked:
    """Without a model and dtype that come from a settings file, where they are meant for `join`."""
    from dataclasses import replace

    def said(name: str, value: str | None) -> str | None:
        is_setting = context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP
        return None if is_setting else value

    return replace(asked, model=said("model", asked.model), dtype=said("dtype", asked.dtype))


def _print(file: PlanFile, output: str, *, is_explained: bool) -> None:
    if output == "json":
        import msgspec

        click.echo(msgspec.json.encode(file).decode())
        return
    from daemon.terminal.render import glyphs_for, new_console, print_on
    from daemon.terminal.render_search import search_view

    console = new_console(sys.stdout)
    print_on(console, search_view(file, glyphs_for(console), is_explained=is_explained))


def _save(file: PlanFile, path: str) -> None:
    import msgspec

    try:
        Path(path).expanduser().write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidInput(f"{path} cannot be written: {reason}", next_step="name another file") from None
    click.echo(f"saved {path}", err=True)
