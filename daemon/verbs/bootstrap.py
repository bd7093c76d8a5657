"""`hexmesh bootstrap`: run a rendezvous node at a stable address, with DHT and relay and without a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import click

from daemon.config import join_options_from_text
from daemon.verbs.join import chosen_state_dir, join, run_daemon, without_overruled

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = {
    *("peer", "token", "token_file", "name", "site", "state_dir", "ready_file", "log_format"),
    *("http_port", "peer_port", "dht_port", "listen", "advertise", "http_listen", "api_key_file", "no_auth"),
}


def _some_of_joins_flags(function: F) -> F:
    # click keeps the options of a function that is not a command yet here, the last one first
    function.__click_params__ = [  # type: ignore[attr-defined]
        copy.copy(param) for param in reversed(join.params) if param.name in _FLAGS
    ]
    return function


@click.command()
@_some_of_joins_flags
@click.pass_context
def bootstrap(context: click.Context, /, **texts: str | bool | None) -> None:
    """Run a rendezvous node: an address that all reach, for finding the mesh and for hosts nobody can dial.

    It joins with a token (--peer, --token) or comes back to the mesh of its state folder. It has no model, no
    devices and no part in plans; it passes on the connections of members that cannot dial each other, and
    cannot read them. Once up, it prints the same line of JSON as join.
    """
    options = join_options_from_text(
        without_overruled(context, texts) | {"state_dir": chosen_state_dir(texts)}
    )

    from bootstrap.node import run_bootstrap

    context.exit(run_daemon(options, run_bootstrap))
