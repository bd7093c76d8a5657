"""Flags that many verbs share, and what they mean together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from daemon.config import read_secret
from daemon.terminal.client import Client, client_for, read_admin_key
from hexmesh.errors import Refused
from hexmesh.units import parse_duration_s

F = TypeVar("F", bound=Callable[..., Any])


def flag(name: str, help_text: str, *, verb: str = "", metavar: str = "", **attrs: Any) -> Callable[[F], F]:
    """An option with its HEXMESH_* variable; a verb's own flag carries the verb in the variable's name."""
    words = [verb, name.removeprefix("--")] if verb else [name.removeprefix("--")]
    envvar = "HEXMESH_" + "_".join(words).replace("-", "_").upper()
    if metavar:
        attrs["metavar"] = metavar
    return click.option(name, help=help_text, envvar=envvar, show_envvar=True, **attrs)


def daemon_flags(function: F) -> F:
    """--url, --state-dir and --api-key-file: which daemon to ask, and as whom."""
    for add in (
        flag("--api-key-file", "File with the key that the daemon's HTTP asks for.", metavar="FILE"),
        flag("--state-dir", "State folder of the local daemon.", metavar="DIR"),
        flag("--url", "The daemon to ask. Default: the local one.", metavar="URL"),
    ):
        function = add(function)
    return function


def output_flag(*choices: str, verb: str = "") -> Callable[[F], F]:
    """-o with the first choice as the default."""
    envvar = f"HEXMESH_{verb}_OUTPUT".upper() if verb else "HEXMESH_OUTPUT"
    return click.option(
        "-o",
        "--output",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        envvar=envvar,
        show_envvar=True,
        help="How to print.",
    )


class Duration(click.ParamType[float]):
    """Seconds from text such as 60s, 5m or 1h."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return float(value) if isinstance(value, (int, float)) else parse_duration_s(str(value))


def state_path(state_dir: str | None) -> Path | None:
    """The state folder that was named, or None for the default one."""
    return Path(state_dir).expanduser() if state_dir else None


def client_of(url: str | None, state_dir: str | None, api_key_file: str | None) -> Client:
    """The client that the shared flags describe.

    HEXMESH_API_KEY holds the key itself; the flag beats it. Without a key the local daemon gets its own admin
    key, where this user may read it; a daemon named by --url never does.
    """
    context = click.get_current_context()
    is_flag = context.get_parameter_source("api_key_file") is click.core.ParameterSource.COMMANDLINE
    key = None if is_flag else os.environ.get("HEXMESH_API_KEY")
    if not key and api_key_file:
        key = read_secret(Path(api_key_file).expanduser(), what="the API key file")
    if not key and not url:
        with contextlib.suppress(Refused):
            key = read_admin_key(state_path(state_dir))
    return client_for(url, state_path(state_dir), key or None)
