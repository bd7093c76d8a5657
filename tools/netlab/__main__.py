"""A mesh of three sites in a lab, from nothing to an answer: what `make lab` shows. Nothing stays behind."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from daemon.terminal.demo import STOP_TIMEOUT_S, Interrupts, Progress, show_answer
from daemon.terminal.demo_memory import demo_memory_bytes
from daemon.verbs.reads import print_topology
from hexmesh.errors import HexmeshError
from hexmesh.units import show_bytes
from tools.netlab.host import Host
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabMesh
from tools.netlab.user_namespace import become_able

QUESTION = "What is a KV cache?"
GBIT_PER_S = 1.25e8
_EXIT_INTERRUPTED = 130
_N_HANDSHAKES = 3
SITES = {"tokyo": ("tokyo-1", "tokyo-2"), "osaka": ("osaka-1",), "berlin": ("berlin-1",)}
LINKS = {
    ("tokyo", "osaka"): Link(latency_s=0.005, rate_bytes_per_s=GBIT_PER_S),
    ("tokyo", "berlin"): Link(latency_s=0.110, rate_bytes_per_s=GBIT_PER_S),
    ("osaka", "berlin"): Link(latency_s=0.115, rate_bytes_per_s=GBIT_PER_S),
}


def main() -> int:
    become_able()
    prompt = " ".join(sys.argv[1:]) or QUESTION
    try:
        with (
            Interrupts() as interrupts,
            tempfile.TemporaryDirectory(prefix="hexmesh-lab-", ignore_cleanup_errors=True) as folder,
            Lab(Topology(sites=SITES, links=both_ways(LINKS))) as lab,
            LabMesh(
                Path(folder) / "mesh", uninterrupted=interrupts.held, stop_timeout_s=STOP_TIMEOUT_S
            ) as mesh,
        ):
            _show(lab, mesh, prompt, Progress())
    except (HexmeshError, OSError) as error:
        said = error.one_line() if isinstance(error, HexmeshError) else str(error)
        click.echo(f"hexmesh: the lab failed: {said}", err=True)
        return error.exit_code if isinstance(error, HexmeshError) else 1
    except KeyboardInterrupt:
        click.echo("hexmesh: interrupted", err=True)
        return _EXIT_INTERRUPTED
    return 0


def _show(lab: Lab, mesh: LabMesh, prompt: str, progress: Progress) -> None:
    try:
        _build(lab, mesh, progress)
        _ask(mesh, prompt, progress)
        print_topology(mesh.daemons[0].client)
        _compare_links(lab, mesh)
    except HexmeshError:
        for daemon in mesh.daemons:
            click.echo(f"--- last lines of {daemon.name}", err=True)
            click.echo("\n".join(daemon.last_log_lines()), err=True)
        raise
    progress.say("stopping the daemons, removing the lab")


def _build(lab: Lab, mesh: LabMesh, progress: Progress) -> None:
    memory_bytes = demo_memory_bytes(3)
    progress.say(
        f"{len(lab.hosts)} hosts in {len(SITES)} sites; each node may use {show_bytes(memory_bytes)}"
    )
    flags = ["--device", "cpu", "--threads", "1", "--memory", str(memory_bytes)]
    flags += ["--min-nodes", str(len(lab.hosts))]
    first, *others = lab.hosts.values()
    founder = mesh.found_on(first, *flags)
    progress.say(f"{first.name} founded the mesh on {first.address}")
    token = founder.fresh_token(uses=len(others))
    for daemon in [mesh.start_on(host, *flags, token=token) for host in others]:
        mesh.await_up(daemon)
        progress.say(f"{daemon.name} joined from {daemon.host.address}")
    mesh.await_ready(tell=lambda blocker: progress.say(f"waiting for {blocker}"))


def _ask(mesh: LabMesh, prompt: str, progress: Progress) -> None:
    """Put the question to the farthest host."""
    asked = mesh.daemons[-1]
    progress.say(f"asking {asked.name}: {prompt}")
    show_answer(asked.client, prompt)


def _compare_links(lab: Lab, mesh: LabMesh) -> None:
    """What the daemons measured beside what the lab was set to, and how well the lab itself kept time."""
    founder = mesh.daemons[0]
    measured_s = {
        mesh.on(link["to"]).name: link["rtt_p50_s"]
        for link in founder.get("/admin/links")
        if link["from"] == founder.node_id
    }
    click.echo(
        f"\nROUND TRIPS FROM {founder.name}, ms      as set   lab now   as {founder.name} measured them"
    )
    for name, by_daemon_s in measured_s.items():
        there, back = lab.links[founder.name, name], lab.links[name, founder.name]
        now_s = _handshake_s(lab.hosts[founder.name], lab.hosts[name])
        shown = [1000 * value_s for value_s in (there.latency_s + back.latency_s, now_s, by_daemon_s)]
        click.echo(f"  {name:<28} {shown[0]:9.1f} {shown[1]:9.1f} {shown[2]:9.1f}")
    stats = lab.stats()
    late_ms = [1000 * stats[f"lateness_{which}_s"] for which in ("p50", "p99", "max")]
    click.echo(
        f"\nThe switch carried {stats['packets']} packets, late by {late_ms[0]:.2f} ms (p50), "
        f"{late_ms[1]:.2f} (p99), {late_ms[2]:.2f} (most), with {stats['cpu_s'] / stats['elapsed_s']:.1%} of a core."
    )


def _handshake_s(src: Host, dst: Host) -> float:
    """The quickest of a few TCP handshakes: one round trip each."""
    times_s = []
    with dst.listen() as listener:
        for _ in range(_N_HANDSHAKES):
            start_s = time.monotonic()
            src.connect(dst.address, listener.getsockname()[1]).close()
            times_s.append(time.monotonic() - start_s)
    return min(times_s)


if __name__ == "__main__":
    sys.exit(main())
