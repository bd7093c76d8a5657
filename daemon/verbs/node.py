"""`hexmesh node`: what an operator does to one node of the mesh."""

from __future__ import annotations

import click

from daemon.verbs.node_orders import cordon, drain, uncordon
from daemon.verbs.node_removal import remove


@click.group()
def node() -> None:
    """Change one node of the mesh."""


for command in (cordon, uncordon, drain, remove):
    node.add_command(command)
