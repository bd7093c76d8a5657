"""`hexmesh simulate`: what requests would meet under a saved plan."""

from __future__ import annotations

import sys

import click

from daemon.verbs.options import flag, output_flag


@click.command()
@flag("--plan", "A plan that `hexmesh plan --save` wrote.", verb="simulate", metavar="FILE", required=True)
@flag(
    "--workload",
    "Requests to send: as for `hexmesh plan`. Default: what the plan was made for.",
    verb="simulate",
    metavar="W",
)
@flag("--cluster", "Run it on this fleet instead of its own.", verb="simulate", metavar="FILE")
@flag("--model", "Run it with this model instead of its own.", verb="simulate", metavar="M")
@flag(
    "--requests",
    "How many requests. Default: 5000, and without a rate as many as it takes to settle.",
    verb="simulate",
    type=click.IntRange(2, 10_000_000),
)
@flag(
    "--seed",
    "The same seed gives the same run.",
    verb="simulate",
    type=click.IntRange(0, 2**31),
    default=0,
    show_default=True,
)
@flag(
    "--fail",
    "A host dies at T, and is back at BACK. Repeatable.",
    verb="simulate",
    multiple=True,
    metavar="NODE@T[-BACK]",
)
@flag("--plot", "Draw the run over time into FILE (.png, .svg).", verb="simulate", metavar="FILE")
@output_flag("table", "json")
def simulate(
    plan: str,
    workload: str | None,
    cluster: str | None,
    model: str | None,
    requests: int | None,
    seed: int,
    fail: tuple[str, ...],
    plot: str | None,
    output: str,
) -> None:
    """Simulate requests under a saved plan, in virtual time, with the batcher, router and admission of the daemon.

    Without a rate in the workload as many requests are sent as can be served.
    """
    from daemon.terminal.simulate_command import Scene, simulation_of

    if plot is not None:
        from daemon.terminal.plots.canvas import checked_path

        checked_path(plot)
    scene = Scene(
        plan=plan,
        workload=workload,
        cluster=cluster,
        model=model,
        n_requests=requests,
        seed=seed,
        failures=fail,
    )
    run = simulation_of(scene)
    if output == "json":
        import msgspec

        click.echo(msgspec.json.encode(run).decode())
    else:
        from daemon.terminal.render import new_console, print_on
        from daemon.terminal.render_simulation import simulation_view

        print_on(new_console(sys.stdout), simulation_view(run))
    if plot is not None:
        from daemon.terminal.plots.timeline import plot_simulation

        plot_simulation(run, plot)
        click.echo(f"drew {plot}", err=True)
