"""The meshes that the pipeline's benches ask, how they ask, and how they report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from tools.bench.models import random_prompt
from tools.bench.processes import measure_idle
from tools.bench.report import Report, progress
from tools.bench.streams import Stream, ask_at_once, dial

WHOLE_MIB, SHARE_MIB = 1500, {2: 530, 3: 400}
"""A node's budget with which it holds the 499 MB of weights alone, and with which so many nodes are needed."""
HEAD_LAYERS = 3.9
"""The head's weights in layers."""
MOST_WORK = 0.64
"""Of the work of two like nodes, for one."""
TRIES = 8
STOP_S = 5.0
"""For a clean leave: a bench that is told to end must not take long."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every part needs."""

    report: Report
    model_dir: Path
    folder: Path
    n_rounds: int
    seeds: Iterator[int]

    def prompts(self, n_prompts: int, n_tokens: int) -> list[list[int]]:
        """Prompts that were not asked before in this run: no cache knows them."""
        return [random_prompt(n_tokens, seed=next(self.seeds)) for _ in range(n_prompts)]

    def add_ratio(self, name: str, ours: list[float], others: list[float], *, at_least: float) -> None:
        """Of the best rounds, as other load only ever takes away; beside it the median of all rounds."""
        ratios = [our / other for our, other in zip(ours, others, strict=True)]
        self.report.add(f"{name}: best rounds", max(ours) / max(others), "x", at_least=at_least)
        self.report.add(f"{name}: median of rounds", statistics.median(ratios), "x", at_least=at_least)

    def flags(self, n_nodes: int, threads: int) -> list[str]:
        """Of each node of a mesh whose plan is one pipeline over all of them."""
        budget = SHARE_MIB.get(n_nodes, WHOLE_MIB)
        flags = ["--memory", f"{budget}MiB", "--threads", str(threads), "--device", "cpu"]
        return [*flags, "--dtype", "float32", "--min-nodes", str(n_nodes)]


@contextmanager
def pipeline_of(bench: Bench, n_nodes: int, threads: int) -> Iterator[LocalMesh]:
    """A mesh on loopback whose plan is one pipeline over all its nodes, ready and warm."""
    flags = bench.flags(n_nodes, threads)
    with LocalMesh(bench.folder / f"mesh-{n_nodes}-{threads}", stop_timeout_s=STOP_S) as mesh:

        def found() -> None:
            mesh.found("node-1", *flags, "--model", str(bench.model_dir))
            for index in range(2, n_nodes + 1):
                mesh.join(f"node-{index}", *flags)

        make_balanced(mesh, found, n_nodes)
        ask(mesh, bench.prompts(2, 32), 8)
        note_plan(bench, mesh, f"{n_nodes} x {threads} threads")
        yield mesh


def make_balanced(mesh: LocalMesh, found: Callable[[], None], n_stages: int) -> None:
    """Found the mesh, again where its devices were measured while something else ran and came out very unlike.

    Raises SystemExit after some tries.
    """
    for _ in range(TRIES):
        found()
        mesh.await_ready(plan_reaches=n_stages)
        if most_work(mesh) <= MOST_WORK or n_stages == 1:
            return
        progress("  the devices were measured unlike: once more")
        mesh.stop()
        mesh.daemons.clear()
    raise SystemExit("the plans were lopsided: this machine is too busy for this bench")


def most_work(mesh: LocalMesh) -> float:
    """The largest stage's share of the work, layers and head."""
    spans = [stage["layers"] for stage in stages_of(mesh)]
    work = [stop - start for start, stop in spans]
    work[-1] += HEAD_LAYERS
    return float(max(work) / sum(work))


def driver_of(mesh: LocalMesh) -> LocalDaemon:
    """The first stage's node: a client that asks there adds no way of its own."""
    node = stages_of(mesh)[0]["node"]
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node)


def stages_of(mesh: LocalMesh) -> list[dict[str, Any]]:
    """The only replica's stages, as the topology shows them."""
    (replica,) = mesh.daemons[0].get("/admin/topology")["replicas"]
    stages: list[dict[str, Any]] = replica["stages"]
    return stages


def ask(mesh: LocalMesh, prompts: list[list[int]], max_tokens: int) -> tuple[list[Stream], float]:
    """All at once, through the driver's node; the streams, and the seconds to the last token."""
    return ask_at_once(partial(dial, driver_of(mesh).url), prompts, max_tokens)


def decode_rate(streams: list[Stream]) -> float:
    """Tokens/s of all streams together while all of them decode. Raises SystemExit when they never do."""
    start_s, stop_s = max(one.times_s[1] for one in streams), min(one.times_s[-2] for one in streams)
    n_tokens = sum(start_s < at_s <= stop_s for one in streams for at_s in one.times_s)
    if stop_s <= start_s or n_tokens < 4 * len(streams):
        raise SystemExit(f"{len(streams)} streams did not run together for long enough: {n_tokens} tokens")
    return n_tokens / (stop_s - start_s)


def note_plan(bench: Bench, mesh: LocalMesh, name: str) -> None:
    """How the plan cut the model."""
    stages = stages_of(mesh)
    cut = ", ".join(f"{stage['layers'][0]}-{stage['layers'][1] - 1}" for stage in stages)
    bench.report.notes.append(f"{name}: layers {cut}; {stages[0]['kv_blocks']} KV blocks")


def note_idle(bench: Bench, meshes: dict[str, LocalMesh]) -> None:
    """CPU that each mesh takes while nothing is asked: it is up while the other is measured."""
    for name, mesh in meshes.items():
        share = sum(measure_idle(mesh).values())
        bench.report.add(f"CPU of all processes while idle, {name}", 100 * share, "% of a core")
