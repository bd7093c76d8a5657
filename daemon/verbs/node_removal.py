"""`hexmesh node remove`: cast a node out of the mesh."""

from __future__ import annotations

import json

import click

from daemon.terminal.client import read_admin_key
from daemon.verbs.options import client_of, daemon_flags, state_path
from hexmesh.ids import short

_CHANGE_TIMEOUT_S = 30.0


@click.command()
@click.argument("name_or_id")
@daemon_flags
def remove(name_or_id: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Cast a node out for good: its connections close at once, and it cannot come back under this id."""
    client = client_of(url, state_dir, api_key_file)
    key = read_admin_key(state_path(state_dir))
    body = client.post("/admin/node/remove", {"node": name_or_id}, key=key, timeout_s=_CHANGE_TIMEOUT_S)
    removed = json.loads(body)
    click.echo(f"removed {removed['name']} ({short(removed['id'])})", err=True)
