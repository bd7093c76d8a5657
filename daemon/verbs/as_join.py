"""Verbs that look at what `hexmesh join` would do: they take its flags, variables and table of the TOML file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click

from daemon.config import JoinOptions, join_options_from_text
from daemon.verbs.join import chosen_state_dir, join, without_overruled

F = TypeVar("F", bound=Callable[..., Any])

Texts = Mapping[str, str | bool | None]


class AsJoin(click.Command):
    """A command whose settings come from the places where join's come from: also from `[join]` in the file."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        defaults = parent.find_root().default_map if parent is not None else None
        if defaults:
            own = (parent.default_map or {}).get(str(info_name)) if parent is not None else None
            extra["default_map"] = {**(own or {}), **defaults.get("join", {})}
        return super().make_context(info_name, args, parent, **extra)


def joins_flags(*, hidden: Collection[str] = ()) -> Callable[[F], F]:
    """All of join's flags; those in `hidden` work and are left out of --help."""

    def add(function: F) -> F:
        params = [copy.copy(param) for param in join.params]
        for param in params:
            if isinstance(param, click.Option) and param.name in hidden:
                param.hidden = True
        # click keeps the options of a function that is not a command yet here, the last one first
        function.__click_params__ = [  # type: ignore[attr-defined]
            *getattr(function, "__click_params__", []),
            *reversed(params),
        ]
        return function

    return add


def chosen_texts(context: click.Context, texts: Texts) -> dict[str, str | bool | None]:
    """The flags' values as join would take them. Raises InvalidInput for a contradiction."""
    return without_overruled(context, texts) | {"state_dir": chosen_state_dir(texts)}


def join_options(context: click.Context, texts: Texts) -> JoinOptions:
    """What join would be told. Raises InvalidInput."""
    return join_options_from_text(chosen_texts(context, texts))
