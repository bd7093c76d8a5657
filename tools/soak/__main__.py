"""`python -m tools.soak`: faults against a mesh of four under load, and a verdict; exit code 1 if a promise broke."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from hexmesh.errors import HexmeshError
from tools.netlab.user_namespace import become_able
from tools.soak.soak import soak


@click.command()
@click.option("--faults", "n_faults", default=100, show_default=True, help="How many kills, hangs and cuts.")
@click.option("--clients", "n_clients", default=6, show_default=True, help="Streams at a time.")
@click.option("--seed", default=1, show_default=True, help="The same seed draws the same faults.")
@click.option("--logs", type=click.Path(path_type=Path), help="Where the daemons' logs go.")
def main(n_faults: int, n_clients: int, seed: int, logs: Path | None) -> None:
    """Run a soak and print its result as JSON."""
    started_s = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"[{time.monotonic() - started_s:7.1f} s] {text}", err=True)

    result = soak(n_faults=n_faults, n_clients=n_clients, seed=seed, keep=logs, tell=tell)
    click.echo(json.dumps(result.as_json(), indent=2))
    sys.exit(1 if result.broken else 0)


if __name__ == "__main__":
    become_able()
    try:
        main()
    except HexmeshError as error:
        click.echo(f"hexmesh: the soak failed: {error.one_line()}", err=True)
        sys.exit(error.exit_code)
