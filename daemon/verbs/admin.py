"""Verbs that change the mesh: they carry the admin key of the local daemon's state folder."""

from __future__ import annotations

import json
import time

import click

from daemon.terminal.client import read_admin_key
from daemon.verbs.options import Duration, client_of, daemon_flags, flag, output_flag, state_path
from hexmesh.errors import Lost, TimedOut
from hexmesh.units import show_duration

_CHANGE_TIMEOUT_S = 30.0


@click.group()
def token() -> None:
    """Let others join."""


@token.command()
@flag(
    "--ttl", "How long the token is good for.", verb="token", type=Duration(), default="1h", show_default=True
)
@flag(
    "--uses",
    "How many nodes it admits.",
    verb="token",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
)
@output_flag("table", "json")
@daemon_flags
def create(
    ttl: float, uses: int, output: str, url: str | None, state_dir: str | None, api_key_file: str | None
) -> None:
    """Make a join token and print the command that uses it."""
    client = client_of(url, state_dir, api_key_file)
    key = read_admin_key(state_path(state_dir))
    body = client.post("/admin/token", {"ttl_s": ttl, "uses": uses}, key=key, timeout_s=_CHANGE_TIMEOUT_S)
    if output == "json":
        click.echo(body.decode().strip())
        return
    issued = json.loads(body)
    click.echo(issued["join_command"])
    nodes = "one node" if issued["uses"] == 1 else f"{issued['uses']} nodes"
    click.echo(f"good for {nodes} within {show_duration(issued['expires_s'])}", err=True)


@token.command()
@output_flag("table", "json")
@daemon_flags
def ls(output: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Show the tokens of this node that still admit somebody; never their secrets."""
    client = client_of(url, state_dir, api_key_file)
    body = client.get("/admin/tokens", key=read_admin_key(state_path(state_dir)))
    if output == "json":
        click.echo(body.decode().strip())
        return
    from daemon.verbs.reads import print_view, show_tokens

    print_view(client, body, show_tokens)


@token.command()
@click.argument("token_id", metavar="ID")
@daemon_flags
def revoke(token_id: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Let a token of this node admit nobody any more; ID is from `hexmesh token ls`."""
    client = client_of(url, state_dir, api_key_file)
    key = read_admin_key(state_path(state_dir))
    client.post("/admin/token/revoke", {"id": token_id}, key=key, timeout_s=_CHANGE_TIMEOUT_S)
    click.echo(f"revoked {token_id}", err=True)


@click.command()
@flag(
    "--reason",
    "Why, for the log and `hexmesh plan`.",
    verb="replan",
    default="asked by an operator",
    show_default=True,
)
@daemon_flags
def replan(reason: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Have the coordinator plan afresh."""
    client = client_of(url, state_dir, api_key_file)
    key = read_admin_key(state_path(state_dir))
    client.post("/admin/replan", {"reason": reason}, key=key, timeout_s=_CHANGE_TIMEOUT_S)
    click.echo("asked for a new plan; `hexmesh plan` shows it", err=True)


@click.command()
@flag(
    "--forget",
    "Delete the membership too: the node cannot come back without a new token.",
    verb="leave",
    is_flag=True,
)
@flag(
    "--timeout",
    "How long to wait for the daemon to end.",
    verb="leave",
    type=Duration(),
    default="150s",
    show_default=True,
)
@daemon_flags
def leave(
    forget: bool, timeout: float, url: str | None, state_dir: str | None, api_key_file: str | None
) -> None:
    """Make the local node leave the mesh cleanly, and wait until it has."""
    client = client_of(url, state_dir, api_key_file)
    key = read_admin_key(state_path(state_dir))
    client.post("/admin/leave", {"forget": forget}, key=key, timeout_s=_CHANGE_TIMEOUT_S)
    deadline_s = time.monotonic() + timeout
    while time.monotonic() < deadline_s:
        try:
            client.get("/health", timeout_s=1.0)
        except TimedOut:
            pass
        except Lost:
            click.echo("left", err=True)
            return
        time.sleep(0.1)
    raise TimedOut(
        f"the daemon still runs {timeout:g} s after it was asked to leave", next_step="see its log"
    )
