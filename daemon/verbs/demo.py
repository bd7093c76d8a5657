"""`hexmesh demo`: the flags of `daemon.terminal.demo`."""

from __future__ import annotations

import click

from daemon.verbs.options import flag

QUESTION = "What is a KV cache?"


@click.command()
@click.argument("prompt", default=QUESTION)
@flag(
    "--nodes",
    "How many daemons to start.",
    verb="demo",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
)
@flag(
    "--memory",
    "Budget of each node. Default: so little that the model needs all of them.",
    verb="demo",
    metavar="SIZE",
)
@flag("--keep", "Leave the mesh running and say how to stop it.", verb="demo", is_flag=True)
@click.pass_context
def demo(context: click.Context, prompt: str, nodes: int, memory: str | None, keep: bool) -> None:
    """Start a mesh of several daemons on this machine, ask it a question, show its topology, and clean up."""
    from daemon.terminal.demo import run_demo
    from daemon.terminal.demo_memory import demo_memory_bytes
    from hexmesh.units import parse_bytes

    memory_bytes = parse_bytes(memory) if memory else demo_memory_bytes(nodes)
    context.exit(run_demo(prompt, n_nodes=nodes, memory_bytes=memory_bytes, keep=keep))
