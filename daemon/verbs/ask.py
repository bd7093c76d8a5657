"""`hexmesh generate` and `hexmesh chat`: put a question to the mesh and show the answer as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

import click

from daemon.terminal.client import Client, error_of_event
from daemon.verbs.options import client_of, daemon_flags, flag, output_flag
from daemon.verbs.wait import blocker_of
from hexmesh.errors import HexmeshError, InvalidInput, Lost, NotReady

F = TypeVar("F", bound=Callable[..., Any])
Message = dict[str, str]


def _sampling_flags(verb: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        for decorate in (
            flag(
                "--stop", "End before this text; may be given again.", verb=verb, multiple=True, metavar="S"
            ),
            flag("--seed", "Draw the same tokens again.", verb=verb, type=click.IntRange(min=0), metavar="N"),
            flag(
                "--temperature",
                "0 takes the likeliest token.",
                verb=verb,
                type=click.FloatRange(min=0.0),
                metavar="F",
            ),
            flag("--max-tokens", "Longest answer.", verb=verb, type=click.IntRange(min=1), metavar="N"),
        ):
            function = decorate(function)
        return function

    return add


@click.command()
@click.argument("prompt")
@_sampling_flags("generate")
@output_flag("text", "json", verb="generate")
@daemon_flags
def generate(
    prompt: str,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    output: str,
    url: str | None,
    state_dir: str | None,
    api_key_file: str | None,
) -> None:
    """Continue PROMPT as it stands, without a chat template; `-` reads it from stdin."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InvalidInput("the prompt is empty", next_step="give some text")
    client = client_of(url, state_dir, api_key_file)
    body = {"prompt": text} | _sampling(max_tokens, temperature, seed, stop)
    if output == "json":
        click.echo(client.post("/generate", body, timeout_s=3600.0).decode().strip())
        return
    for piece in stream_generate(client, body):
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@flag("--system", "What the model is told before the conversation.", verb="chat", metavar="TEXT")
@_sampling_flags("chat")
@daemon_flags
def chat(
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    url: str | None,
    state_dir: str | None,
    api_key_file: str | None,
) -> None:
    """Talk with the model: one line is one turn, and the conversation so far goes with it.

    On a terminal Ctrl-C stops an answer and Ctrl-D leaves. From a pipe every line that is not blank is a
    turn, and only the answers are printed.
    """
    client = client_of(url, state_dir, api_key_file)
    options = {"model": served_model(client)} | _sampling(max_tokens, temperature, seed, stop)
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    is_terminal = sys.stdin.isatty()
    for line in _typed_lines() if is_terminal else sys.stdin:
        if not line.strip():
            continue
        question = {"role": "user", "content": line.strip()}
        try:
            answer = _show_answer(client, options | {"messages": [*history, question]}, may_stop=is_terminal)
        except HexmeshError as error:
            if not is_terminal:
                raise
            click.echo(f"hexmesh: {error.one_line()}", err=True)
            continue
        history += [question, {"role": "assistant", "content": answer}]


def stream_generate(client: Client, body: dict[str, Any]) -> Generator[str]:
    """The pieces of text that `/generate` gives. Raises what the daemon reports, or Lost."""
    with closing(client.stream("/generate", body | {"stream": True})) as lines:
        for line in lines:
            event = _event(line)
            if event.get("text"):
                yield event["text"]
            if "usage" in event:
                return
    raise _unfinished()


def stream_chat(client: Client, body: dict[str, Any]) -> Generator[str]:
    """The pieces of text that `/v1/chat/completions` gives. Raises what the daemon reports, or Lost."""
    is_finished = False
    with closing(client.stream("/v1/chat/completions", body | {"stream": True})) as lines:
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                break
            for choice in _event(data).get("choices", []):
                if piece := choice["delta"].get("content"):
                    yield piece
                is_finished = is_finished or choice.get("finish_reason") is not None
    if not is_finished:
        raise _unfinished()


def served_model(client: Client) -> str:
    """The name of the mesh's model. Raises NotReady with the blocker while none is served."""
    models = client.get_json("/v1/models")["data"]
    if models:
        return str(models[0]["id"])
    readiness = client.get_json("/ready", also_ok=(503,))
    raise (
        blocker_of(readiness) if not readiness.get("ready") else NotReady("no model is served at the moment")
    )


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  (gives input() its history and editing)

    click.echo("Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D leaves.", err=True)


def _show_answer(client: Client, body: dict[str, Any], *, may_stop: bool) -> str:
    pieces: list[str] = []
    try:
        with closing(stream_chat(client, body)) as stream:
            for piece in stream:
                pieces.append(piece)
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        if not may_stop:
            raise
        click.echo(" [stopped]", nl=False)
    except HexmeshError:
        if pieces:
            click.echo()
        raise
    click.echo()
    return "".join(pieces)


def _sampling(
    max_tokens: int | None, temperature: float | None, seed: int | None, stop: tuple[str, ...]
) -> dict[str, Any]:
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stop": list(stop) or None}
    return {name: value for name, value in given.items() if value is not None}


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        raise Lost(
            "the daemon sent a line that is not JSON", next_step="is --url a hexmesh daemon?"
        ) from None
    if not isinstance(event, dict):
        raise Lost("the daemon sent a line that is not an object", next_step="is --url a hexmesh daemon?")
    if event.get("error"):
        raise error_of_event(event)
    return event


def _unfinished() -> Lost:
    return Lost("the answer broke off", next_step="ask again; `hexmesh status` shows the mesh")
