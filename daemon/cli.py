"""The command line. Every failure is one line on stderr: what stands in the way, and the next step.

Exit codes: 0 done, 1 failed, 2 usage, 3 not ready or degraded, 4 refused; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from daemon.config import find_config_file, read_config_file
from daemon.verbs.admin import leave, replan, token
from daemon.verbs.ask import chat, generate
from daemon.verbs.bootstrap import bootstrap
from daemon.verbs.config import config
from daemon.verbs.demo import demo
from daemon.verbs.doctor import doctor
from daemon.verbs.join import join
from daemon.verbs.model import model
from daemon.verbs.node import node
from daemon.verbs.plan import plan
from daemon.verbs.reads import links, members, requests, status, topology
from daemon.verbs.simulate import simulate
from daemon.verbs.version import version
from daemon.verbs.wait import wait
from hexmesh.errors import HexmeshError

_EXIT_INTERRUPTED = 130
_EPILOG = (
    "Settings come from flags, HEXMESH_* variables and hexmesh.toml, in this order. "
    "Exit codes: 0 done, 1 failed, 2 usage, 3 not ready or degraded, 4 refused. "
    'Shell completion: eval "$(_HEXMESH_COMPLETE=bash_source hexmesh)" (or zsh_source, fish_source).'
)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_file",
    envvar="HEXMESH_CONFIG",
    show_envvar=True,
    metavar="FILE",
    help="Settings in TOML. Default: ./hexmesh.toml, else ~/.config/hexmesh/hexmesh.toml.",
)
@click.pass_context
def cli(context: click.Context, config_file: str | None) -> None:
    """One LLM service out of devices scattered over several sites."""
    path = Path(config_file) if config_file else find_config_file(os.environ, Path.cwd())
    if path is not None:
        known = {name: _flag_names(command) for name, command in cli.commands.items()}
        values = read_config_file(path, known)
        context.default_map = {name: _default_map(cli.commands[name], values[name]) for name in values}


for command in (
    *(join, leave, wait, demo, bootstrap),
    *(status, members, links, topology, requests, plan, simulate, replan),
    *(generate, chat, token, node, model, version, doctor, config),
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and end the process with its exit code."""
    try:
        code = cli.main(args=args, prog_name="hexmesh", standalone_mode=False)
        sys.stdout.flush()
    except HexmeshError as error:
        code = _fail(error.one_line(), error.exit_code)
    except click.ClickException as error:
        code = _fail(_usage_line(error), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        code = _fail("interrupted", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if os.environ.get("HEXMESH_DEBUG"):
            raise
        said = f"internal error: {type(error).__name__}: {error}".replace("\n", " ")
        code = _fail(f"{said}; HEXMESH_DEBUG=1 shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _flag_names(command: click.Command) -> set[str]:
    names = {param.name for param in command.params if isinstance(param, click.Option) and param.name}
    if isinstance(command, click.Group):
        return names.union(*(_flag_names(inner) for inner in command.commands.values()))
    return names


def _default_map(command: click.Command, values: Mapping[str, str | bool]) -> dict[str, Any]:
    if isinstance(command, click.Group):
        return {inner: dict(values) for inner in command.commands}
    return dict(values)


def _usage_line(error: click.ClickException) -> str:
    line = error.format_message().replace("\n", " ")
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{line} See `{error.ctx.command_path} --help`."
    return line


def _fail(line: str, code: int) -> int:
    click.echo(f"hexmesh: {line}", err=True)
    return code
