"""`hexmesh config show`: what `join` would be told here, and by whom."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from daemon.config import JoinOptions, default_state_dir, find_config_file, join_options_from_text
from daemon.verbs.as_join import AsJoin, chosen_texts, joins_flags
from daemon.verbs.join import join
from daemon.verbs.options import output_flag
from hexmesh.errors import InvalidInput
from hexmesh.units import show_bytes

_SECRETS = ("token",)
_SIZES = ("memory", "weights_cache")
_MASKED = "(hidden)"


@click.group()
def config() -> None:
    """Settings: what they are and where each comes from."""


@config.command(cls=AsJoin)
@output_flag("table", "json")
@joins_flags()
@click.pass_context
def show(context: click.Context, /, output: str, **texts: str | bool | None) -> None:
    """Show every setting of `join` with its value and origin: flag, variable, file or default.

    Takes join's flags, to see what they would change. Secrets are not shown.
    """
    file = _config_file(context)
    wrong: InvalidInput | None = None
    try:
        chosen: Mapping[str, str | bool | None] = chosen_texts(context, texts)
        options: JoinOptions | None = join_options_from_text(chosen)
    except InvalidInput as error:  # shown nevertheless: the origins tell where the mistake is
        chosen, options, wrong = texts, None, error
    settings = [
        {"name": name, "value": _value(name, texts, chosen, options), "origin": origin}
        for name, origin in (
            (param.name, _origin(context, param, texts, chosen, file))
            for param in join.params
            if isinstance(param, click.Option) and param.name
        )
    ]
    if output == "json":
        click.echo(json.dumps({"file": str(file) if file else None, "settings": settings}))
    else:
        click.echo("\n".join(_lines(settings, file)))
    if wrong is not None:
        raise wrong


def _config_file(context: click.Context) -> Path | None:
    told = context.find_root().params.get("config_file")
    return Path(told) if told else find_config_file(os.environ, Path.cwd())


def _origin(
    context: click.Context,
    param: click.Option,
    texts: Mapping[str, str | bool | None],
    chosen: Mapping[str, str | bool | None],
    file: Path | None,
) -> dict[str, str | None]:
    """The kind of place, and which: the flag, the variable's name, the file's path."""
    name = str(param.name)
    if texts.get(name) and name in chosen and chosen[name] is None:
        return {"kind": "overruled", "place": _rival(name)}
    match context.get_parameter_source(name):
        case ParameterSource.COMMANDLINE:
            return {"kind": "flag", "place": param.opts[0]}
        case ParameterSource.ENVIRONMENT:
            return {"kind": "variable", "place": str(param.envvar)}
        case ParameterSource.DEFAULT_MAP:
            return {"kind": "file", "place": str(file)}
        case _:
            return _default_origin(name, chosen)


def _default_origin(name: str, chosen: Mapping[str, str | bool | None]) -> dict[str, str | None]:
    if name == "state_dir" and os.environ.get("XDG_STATE_HOME"):
        return {"kind": "variable", "place": "XDG_STATE_HOME"}
    if name == "dht_port" and chosen.get("peer_port"):
        return {"kind": "default", "place": "beside --peer-port"}
    return {"kind": "default", "place": None}


def _rival(name: str) -> str:
    pairs = (("token", "token_file"), ("api_key_file", "no_auth"))
    rivals = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
    return "--" + rivals[name].replace("_", "-")


def _value(
    name: str,
    texts: Mapping[str, str | bool | None],
    chosen: Mapping[str, str | bool | None],
    options: JoinOptions | None,
) -> Any:
    """The value that join acts on; as written where the settings are wrong. Null is: not set."""
    if name in _SECRETS:
        return _MASKED if chosen.get(name) else None
    if options is None:
        return texts.get(name) or (str(default_state_dir(os.environ)) if name == "state_dir" else None)
    value = getattr(options, f"{name}_bytes" if name in _SIZES else name)
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value) if isinstance(value, Path) else value


def _lines(settings: list[dict[str, Any]], file: Path | None) -> list[str]:
    rows = [
        ("--" + row["name"].replace("_", "-"), _shown(row["name"], row["value"]), _place(row["origin"]))
        for row in settings
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    head = f"file: {file}" if file else "file: none"
    return [head, *(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    return show_bytes(value) if name in _SIZES and isinstance(value, int) else str(value)


def _place(origin: Mapping[str, str | None]) -> str:
    kind, place = origin["kind"], origin["place"]
    return f"overruled by {place}" if kind == "overruled" else f"{kind} {place}" if place else str(kind)
