"""`hexmesh join`: run this host's daemon in the foreground."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from daemon.config import (
    DHT_PORT,
    HTTP_PORT,
    PEER_PORT,
    JoinOptions,
    default_state_dir,
    join_options_from_text,
)
from daemon.verbs.options import flag
from hexmesh.errors import HexmeshError, InvalidInput

if TYPE_CHECKING:
    from daemon.views import UpLine

_EXIT_FAILED = 1
_BY_PRECEDENCE = (
    ParameterSource.COMMANDLINE,
    ParameterSource.ENVIRONMENT,
    ParameterSource.DEFAULT_MAP,
    ParameterSource.DEFAULT,
)


@click.command()
@flag(
    "--model",
    "A folder or Hub id. Default: when founding, the small model that ships with hexmesh; when joining, the "
    "mesh's model, fetched from peers where it is not on this host.",
    metavar="M",
)
@flag("--served-name", "When founding: the model's name for clients.", metavar="S")
@flag("--peer", "Join the mesh of this node.", metavar="HOST:PORT")
@flag("--token", "The join token. Others see it in `ps`: prefer the variable or --token-file.", metavar="T")
@flag("--token-file", "File with the join token.", metavar="FILE")
@flag("--name", "This node's name. Default: the host's.", metavar="N")
@flag("--site", "Where this node stands; nodes of one site are near each other.", metavar="S")
@flag("--device", "auto, cpu, cpu,cpu (two CPU devices) or cuda:0,cuda:1. Default: auto.", metavar="D")
@flag("--threads", "Compute threads of each CPU device.", metavar="N")
@flag("--cpu-affinity", "CPUs to run on, such as 0,1 or 0-3.", metavar="CPUS")
@flag("--memory", "Budget on each device for weights, KV pool and workspace, such as 2GiB.", metavar="SIZE")
@flag(
    "--weights-cache",
    "Cap of the weights fetched from peers, kept in the state folder. Default: 80 % of what is free for them.",
    metavar="SIZE",
)
@flag("--dtype", "float32, bfloat16 or float16. Default: the model's.", metavar="T")
@flag("--min-nodes", "No first plan before N nodes are alive. Default: 1.", metavar="N")
@flag("--state-dir", "Identity and membership. Default: ~/.local/state/hexmesh.", metavar="DIR")
@flag("--ready-file", "Write the line of JSON here too, once up.", metavar="FILE")
@flag("--log-format", "text or json. Default: text.", metavar="F")
@flag("--http-port", f"HTTP. Default: {HTTP_PORT}; 0 picks a free one.", metavar="P")
@flag("--peer-port", f"Other nodes. Default: {PEER_PORT}.", metavar="P")
@flag("--dht-port", f"DHT. Default: {DHT_PORT}; with --peer-port P alone, P+1.", metavar="P")
@flag(
    "--listen", "Address of the peer and DHT ports. Default: the one this host is reached by.", metavar="IP"
)
@flag("--advertise", "Where others reach the peer port, through NAT or a container.", metavar="IP:PORT")
@flag("--http-listen", "Address of HTTP. Default: 127.0.0.1.", metavar="IP")
@flag("--api-key-file", "Ask HTTP clients for the key in this file.", metavar="FILE")
@flag("--no-auth", "Let HTTP on another address than loopback go unguarded.", is_flag=True, default=None)
@flag("--metrics-alias", "vllm: expose vLLM's metric names too.", metavar="A")
@click.pass_context
def join(context: click.Context, /, **texts: str | bool | None) -> None:
    """Run this host's daemon: found a mesh, join one (--peer, --token), or come back to the one it was in.

    Once up, one line of JSON on stdout says how to reach it and how others join. SIGTERM or Ctrl-C drains
    and leaves cleanly; a second one ends at once.
    """
    options = join_options_from_text(
        without_overruled(context, texts) | {"state_dir": chosen_state_dir(texts)}
    )

    from daemon.node import run_node

    context.exit(run_daemon(options, run_node))


def run_daemon(
    options: JoinOptions,
    run: Callable[[JoinOptions, Callable[[UpLine], None]], Coroutine[Any, Any, int]],
) -> int:
    """Run a node in the foreground until it leaves; the exit code. Raises HexmeshError for what was foreseen."""
    import uvloop

    from daemon.descriptors import raise_descriptor_limit
    from daemon.terminal.logs import set_up_logging

    set_up_logging(options.log_format)

    raise_descriptor_limit()

    def announce(up: UpLine) -> None:
        tell_up(up, options.ready_file)

    try:
        return uvloop.run(run(options, announce))
    except HexmeshError:
        raise
    except ExceptionGroup as group:
        if (foreseen := find_foreseen(group)) is not None:
            raise foreseen from None
        logging.getLogger("hexmesh").exception("the daemon failed")
    except Exception:
        logging.getLogger("hexmesh").exception("the daemon failed")
    return _EXIT_FAILED


def find_foreseen(group: ExceptionGroup[Exception]) -> HexmeshError | None:
    """The failure that a group of tasks ended with, where every one that failed did so in a foreseen way."""
    _, others = group.split(HexmeshError)
    if others is not None:
        return None
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, HexmeshError)
    return first


def tell_up(up: UpLine, ready_file: Path | None) -> None:
    """Print the line that says the daemon is up, and write it to the ready file whole."""
    import msgspec

    from daemon.runfile import write_whole

    line = msgspec.json.encode(up).decode()
    if ready_file is not None:
        write_whole(ready_file, line + "\n")
    click.echo(line)


def without_overruled(
    context: click.Context, texts: Mapping[str, str | bool | None]
) -> dict[str, str | bool | None]:
    """`texts` without the one of each contradicting pair that comes from the weaker place."""
    chosen = dict(texts)
    for one, other in (("token", "token_file"), ("api_key_file", "no_auth")):
        if not chosen[one] or not chosen[other]:
            continue
        ranks = {name: _rank(context, name) for name in (one, other)}
        if ranks[one] == ranks[other]:
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise InvalidInput(
                f"{flags[0]} and {flags[1]} contradict each other", next_step="give one of them"
            )
        chosen[max(ranks, key=ranks.__getitem__)] = None
    return chosen


def _rank(context: click.Context, name: str) -> int:
    source = context.get_parameter_source(name)
    return _BY_PRECEDENCE.index(source) if source in _BY_PRECEDENCE else len(_BY_PRECEDENCE)


def chosen_state_dir(texts: Mapping[str, str | bool | None]) -> str:
    return str(texts.get("state_dir") or default_state_dir(os.environ))
