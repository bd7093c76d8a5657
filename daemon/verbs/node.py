"""`hexmesh node`: what an operator does to one node of the mesh."""

from __future__ import annotations

import click

from daemon.verbs.node_orders import cordon, drain, uncordon


@click.group()
def node() -> None:
    """Change one node of the mesh."""


for command in (cordon, uncordon, drain):
    node.add_command(command)
