"""`hexmesh node cordon|uncordon|drain`: which nodes plans may use; from any peer, for any node."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import click

from daemon.terminal.client import Client, read_admin_key
from daemon.verbs.options import Duration, client_of, daemon_flags, flag, output_flag, state_path
from hexmesh.errors import Lost, NotReady

_ORDER_TIMEOUT_S = 30.0
_POLL_S = 0.5
_TELL_S = 5.0
_SILENCE_S = 10.0
"""How long the node may not answer before the drain is no longer followed."""


@click.command()
@click.argument("name")
@output_flag("table", "json")
@daemon_flags
def cordon(name: str, output: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Place nothing new on a node; what runs on it stays. Good across restarts."""
    standing = _order(client_of(url, state_dir, api_key_file), state_dir, name, "cordon")
    stays = f"; it keeps {_stages(standing)} until the next plan" if standing["stages"] else ""
    _show(standing, output, f"{standing['name']} is cordoned{stays}")


@click.command()
@click.argument("name")
@output_flag("table", "json")
@daemon_flags
def uncordon(
    name: str, output: str, url: str | None, state_dir: str | None, api_key_file: str | None
) -> None:
    """Let plans use a cordoned or drained node again."""
    standing = _order(client_of(url, state_dir, api_key_file), state_dir, name, "uncordon")
    _show(standing, output, f"{standing['name']} may be used again")


@click.command()
@click.argument("name")
@flag(
    "--deadline",
    "How long to wait. Requests that still run on the node then go on in the new plan, after a prefill there.",
    verb="drain",
    type=Duration(),
    default="60s",
    show_default=True,
)
@output_flag("table", "json")
@daemon_flags
def drain(
    name: str,
    deadline: float,
    output: str,
    url: str | None,
    state_dir: str | None,
    api_key_file: str | None,
) -> None:
    """Cordon a node and move away what it holds. Refused where nobody else has room.

    The daemon stays up: it still answers requests, as a gateway to the others. Exit 3 when the stages have not moved by
    the deadline; the drain goes on.
    """
    client = client_of(url, state_dir, api_key_file)
    ends_s = time.monotonic() + deadline
    ordered = _order(client, state_dir, name, "drain", deadline_s=deadline)
    shown: object = None
    for standing in _follow(client, ordered):
        if standing["availability"] != "drained":
            raise Lost(f"{standing['name']} is {standing['availability']} now: somebody else gave an order")
        if _is_empty(standing):
            _show(standing, output, f"{standing['name']} is drained: it holds no stage and no request")
            return
        if time.monotonic() >= ends_s and standing["stages"]:
            raise NotReady(
                f"{standing['name']} still holds {_stages(standing)} after {deadline:g} s: {_why(standing)}",
                code="drain_unfinished",
                next_step="the drain goes on; see hexmesh plan, or take it back with hexmesh node uncordon",
            )
        if (news := _news(standing)) != shown:
            click.echo(_progress(standing), err=True)
            shown = news


def _follow(client: Client, standing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The node's standing again and again. Raises Lost when it stays silent."""
    heard_s = time.monotonic()
    path = f"/admin/node?node={quote(standing['id'], safe='')}"
    yield standing
    while True:
        time.sleep(_POLL_S)
        try:
            answer: dict[str, Any] = client.get_json(path, timeout_s=_ORDER_TIMEOUT_S)
        except Lost:
            if time.monotonic() - heard_s > _SILENCE_S:
                raise
            continue
        heard_s = time.monotonic()
        yield answer


def _order(
    client: Client, state_dir: str | None, name: str, action: str, *, deadline_s: float | None = None
) -> dict[str, Any]:
    body: dict[str, object] = {"node": name}
    if deadline_s is not None:
        body["deadline_s"] = deadline_s
    key = read_admin_key(state_path(state_dir))
    answer: dict[str, Any] = json.loads(
        client.post(f"/admin/node/{action}", body, key=key, timeout_s=_ORDER_TIMEOUT_S)
    )
    return answer


def _show(standing: dict[str, Any], output: str, line: str) -> None:
    click.echo(json.dumps(standing) if output == "json" else line)


def _progress(standing: dict[str, Any]) -> str:
    if standing["stages"]:
        return f"moving {_stages(standing)} away: {_why(standing)}"
    n_left = standing["requests_left"]
    left = f"{n_left} request{'' if n_left == 1 else 's'} left"
    return f"{left}, {standing['drain_left_s'] or 0.0:.0f} s"


def _news(standing: dict[str, Any]) -> object:
    """What is worth another line: something moved, or five seconds went by."""
    left_s = standing["drain_left_s"]
    return standing["stages"], standing["blocker"], standing["requests_left"], left_s and left_s // _TELL_S


def _why(standing: dict[str, Any]) -> str:
    return standing["blocker"] or "the mesh makes and loads a plan without them"


def _stages(standing: dict[str, Any]) -> str:
    n_stages = standing["stages"]
    return "1 stage" if n_stages == 1 else f"{n_stages} stages"


def _is_empty(standing: dict[str, Any]) -> bool:
    return not standing["stages"] and standing["drain_left_s"] is None
