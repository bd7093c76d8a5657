"""`hexmesh model ls` and `hexmesh model verify`: the model's files on this host."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daemon.config import default_state_dir
from daemon.runfile import read_run
from daemon.verbs.options import client_of, daemon_flags, flag, output_flag, state_path
from hexmesh.ids import short

if TYPE_CHECKING:
    from daemon.views import CachedModelView

_EXIT_DAMAGED = 1
_SAID_EVERY_BYTES = 2**30


@click.group()
def model() -> None:
    """Look at the model's files on this host, and check them."""


@model.command("ls")
@output_flag("table", "json")
@daemon_flags
def list_models(output: str, url: str | None, state_dir: str | None, api_key_file: str | None) -> None:
    """Show the models of this host: whole in a folder, or as far as they were fetched from peers.

    Asks the daemon, which knows what is in use; where none runs, looks into its state folder.
    """
    import msgspec

    from daemon.terminal.render import new_console, print_on
    from daemon.terminal.render_models import models_table
    from daemon.views import CachedModelView

    folder = _state_folder(state_dir)
    if url or read_run(folder) is not None:
        body = client_of(url, state_dir, api_key_file).get("/admin/models")
    else:
        body = msgspec.json.encode(_survey(folder))
    if output == "json":
        click.echo(body.decode().strip())
        return
    print_on(new_console(sys.stdout), models_table(msgspec.json.decode(body, type=list[CachedModelView])))


@model.command("verify")
@output_flag("table", "json")
@flag("--state-dir", "State folder of the local daemon.", metavar="DIR")
@click.pass_context
def verify_models(context: click.Context, /, output: str, state_dir: str | None) -> None:
    """Hash the weights on this host again and compare them with their manifests; exit 1 if something is damaged.

    What is damaged in the cache is deleted, and fetched again when a stage needs it. A model folder of your own is only
    looked at. May run beside the daemon; a stage that has read what is damaged here wants a restart of its daemon.
    """
    import msgspec

    from daemon.models.inspection import verify
    from daemon.models.weight_cache import cache_of

    views = []
    for view in verify(cache_of(_state_folder(state_dir)), _Said()):
        views.append(view)
        if output == "table":
            state = "damaged" if view.damages else "sound"
            click.echo(f"{view.name} ({short(view.id)}): {state}")
            for damage in view.damages:
                what = f", tensor {damage.tensor}" if damage.tensor else ""
                click.echo(f"  {damage.path}{what}: {damage.repair}")
    if output == "json":
        click.echo(msgspec.json.encode(views).decode())
    elif not views:
        click.echo("no model is known here", err=True)
    if any(view.damages for view in views):
        context.exit(_EXIT_DAMAGED)


class _Said:
    """Says on stderr how much is checked, where that takes long."""

    def __init__(self) -> None:
        self._done_bytes = 0

    def __call__(self, n_bytes: int) -> None:
        before, self._done_bytes = self._done_bytes // _SAID_EVERY_BYTES, self._done_bytes + n_bytes
        if self._done_bytes // _SAID_EVERY_BYTES > before and sys.stderr.isatty():
            click.echo(f"{self._done_bytes // _SAID_EVERY_BYTES} GiB checked", err=True)


def _survey(folder: Path) -> list[CachedModelView]:
    from daemon.models.inspection import survey
    from daemon.models.weight_cache import cache_of

    return survey(cache_of(folder))


def _state_folder(state_dir: str | None) -> Path:
    return state_path(state_dir) or default_state_dir(os.environ)
