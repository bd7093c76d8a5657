"""Verbs that show the mesh: what one daemon answers under /admin/, as JSON or for people."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from daemon.terminal.client import Client
from daemon.verbs.options import client_of, daemon_flags, output_flag
from hexmesh.errors import HexmeshError, Internal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Show = Callable[[bytes, Client, "Console"], "RenderableType"]

_EXIT_NOT_READY = 3


def _read_verb(name: str, help_text: str, show: Show) -> click.Command:
    @click.command(name, help=help_text)
    @output_flag("table", "json")
    @daemon_flags
    def verb(output: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
        client = client_of(url, state_dir, api_key_file)
        body = client.get(f"/admin/{name}")
        if output == "json":
            click.echo(body.decode().strip())
        else:
            print_view(client, body, show)
        if name == "status" and not _is_ready(body):
            click.get_current_context().exit(_EXIT_NOT_READY)

    return verb


def print_topology(client: Client) -> None:
    """What `hexmesh topology` prints."""
    print_view(client, client.get("/admin/topology"), _show_topology)


def print_view(client: Client, body: bytes, show: Show) -> None:
    """Render `body` on stdout. Raises Internal when it is not what the verb expects."""
    import msgspec

    from daemon.terminal.render import new_console, print_on

    console = new_console(sys.stdout)
    try:
        shown = show(body, client, console)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Internal(
            f"{client.url} answered something unexpected: {error}",
            next_step="compare `hexmesh version` on both sides",
        ) from None
    print_on(console, shown)


def _names(client: Client) -> Mapping[str, str]:
    """Names of nodes by id; ids do where the members cannot be had."""
    try:
        return {member["id"]: member["name"] for member in client.get_json("/admin/members")}
    except (HexmeshError, KeyError, TypeError):
        return {}


def _is_ready(body: bytes) -> bool:
    import json

    return bool(json.loads(body).get("ready"))


def _decode(body: bytes, kind: Any) -> Any:
    import msgspec

    return msgspec.json.decode(body, type=kind)


def _show_status(body: bytes, client: Client, console: Console) -> RenderableType:
    from daemon.terminal.render_tables import status_view
    from daemon.views import StatusView

    return status_view(_decode(body, StatusView), _names(client))


def _show_members(body: bytes, client: Client, console: Console) -> RenderableType:
    from daemon.terminal.render_tables import members_table
    from daemon.views import MemberView

    return members_table(_decode(body, list[MemberView]))


def show_tokens(body: bytes, client: Client, console: Console) -> RenderableType:
    """What `hexmesh token ls` prints."""
    from daemon.terminal.render_tables import tokens_table
    from daemon.views import TokenView

    return tokens_table(_decode(body, list[TokenView]), _names(client))


def _show_links(body: bytes, client: Client, console: Console) -> RenderableType:
    from daemon.terminal.render_tables import links_table
    from daemon.views import LinkView

    return links_table(_decode(body, list[LinkView]), _names(client))


def _show_requests(body: bytes, client: Client, console: Console) -> RenderableType:
    from daemon.terminal.render_tables import requests_table
    from daemon.views import RequestView

    return requests_table(_decode(body, list[RequestView]))


def show_plan(body: bytes, client: Client, console: Console) -> RenderableType:
    """What `hexmesh plan` prints of the running mesh's plan."""
    from daemon.terminal.render_plan import plan_view
    from daemon.views import PlanView

    return plan_view(_decode(body, PlanView))


def _show_topology(body: bytes, client: Client, console: Console) -> RenderableType:
    from daemon.terminal.render import TOPOLOGY_COLUMNS, glyphs_for, topology_view
    from daemon.views import TopologyView

    return topology_view(
        _decode(body, TopologyView), width=min(console.width, TOPOLOGY_COLUMNS), glyphs=glyphs_for(console)
    )


status = _read_verb(
    "status", "Show this peer and its mesh; exit 3 while it cannot answer requests.", _show_status
)
members = _read_verb("members", "Show the nodes and their states.", _show_members)
links = _read_verb("links", "Show the measured links between nodes.", _show_links)
topology = _read_verb("topology", "Show sites, devices, pipelines and links at a glance.", _show_topology)
requests = _read_verb("requests", "Show the requests that run or wait here.", _show_requests)
