"""`hexmesh version`."""

from __future__ import annotations

import click

from daemon.verbs.options import output_flag

_PACKAGES = ("hexmesh", "torch", "transformers", "hivemind", "aiohttp", "msgspec")


@click.command()
@output_flag("table", "json")
def version(output: str) -> None:
    """Show the versions of hexmesh and of what it runs on."""
    import importlib.metadata
    import json
    import platform

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    ordered = {"hexmesh": versions.pop("hexmesh"), **versions}
    if output == "json":
        click.echo(json.dumps(ordered))
    else:
        for name, number in ordered.items():
            click.echo(f"{name:<13} {number or 'not installed'}")
