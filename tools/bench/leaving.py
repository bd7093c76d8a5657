"""How long a stream stalls when a node on its way leaves cleanly, beside the gaps of the same stream before that.

Four nodes on loopback, of which one (with room for two epochs) or two (with room for one) hold the model; greedy
streams run through a node that stays, and through the leaver itself. SIGTERM at a token; every stream must have the
tokens of an undisturbed one. Run: `python tools/bench/leaving.py [--quick] [--json]`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tools.bench.report import Report, bench_arguments, print_report, progress

QUESTION = "What is a KV cache?"
N_TOKENS = 900
LEAVE_AT_TOKEN = 100
ROOMY_BYTES = 2 * 2**30
"""One node holds the model with the largest KV pool that a plan gives it, twice: two epochs fit side by side."""


@dataclass
class Timed:
    """One greedy stream: its tokens and when they came."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    def run(self, daemon: LocalDaemon, on_token: Callable[[int], None]) -> None:
        body = {"prompt": QUESTION, "max_tokens": N_TOKENS, "ignore_eos": True, "stream": True}
        for line in daemon.client.stream("/generate", body):
            token = json.loads(line).get("token_id")
            if token is not None:
                self.tokens.append(token)
                self.times_s.append(time.monotonic())
                on_token(len(self.tokens))

    def gaps_s(self, start: int, stop: int | None = None) -> list[float]:
        return [after - before for before, after in pairwise(self.times_s[start:stop])]


def main() -> int:
    arguments = bench_arguments(__doc__ or "").parse_args()
    n_runs = 1 if arguments.quick else 3
    report = Report(
        name="leaving",
        method=(
            f"shipped model, four nodes on loopback of which one or two hold it, SIGTERM at token {LEAVE_AT_TOKEN} of "
            f"{N_TOKENS}; longest gap between tokens at the client before and after; {n_runs} fresh meshes a case"
        ),
    )
    tight_bytes = memory_for_exactly(model_spec_from_config(resolve_model().config), 2)
    for memory_bytes, label in ((ROOMY_BYTES, "room for two epochs"), (tight_bytes, "room for one epoch")):
        for name, find_leaver in CASES.items():
            run_cases(report, f"{name}, {label}", memory_bytes, find_leaver, n_runs)
    print_report(report, "json" if arguments.json else "text")
    return 0


def run_cases(
    report: Report, name: str, memory_bytes: int, find_leaver: Callable[[LocalMesh], LocalDaemon], n_runs: int
) -> None:
    usual_s, longest_s, own_longest_s, exact, left_s = [], [], [], 0, []
    for index in range(n_runs):
        progress(f"{name}: run {index + 1}/{n_runs}")
        with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as folder:
            through_other, through_leaver, is_exact, took_s = run_case(
                Path(folder) / "mesh", memory_bytes, find_leaver
            )
        usual_s.append(max(through_other.gaps_s(5, LEAVE_AT_TOKEN)))
        longest_s.append(max(through_other.gaps_s(LEAVE_AT_TOKEN)))
        own_longest_s.append(max(through_leaver.gaps_s(LEAVE_AT_TOKEN)))
        left_s.append(took_s)
        exact += is_exact
    report.add(f"longest gap before, {name}", usual_s, "s")
    report.add(f"longest gap from SIGTERM on, through another, {name}", longest_s, "s")
    report.add(f"longest gap from SIGTERM on, through the leaver, {name}", own_longest_s, "s")
    report.add(f"median of the longest gaps, {name}", statistics.median(longest_s), "s")
    report.add(f"SIGTERM to exit, {name}", left_s, "s")
    report.add(f"runs with exactly the right tokens, {name}", exact / n_runs, "", at_least=1.0)


def run_case(
    folder: Path, memory_bytes: int, find_leaver: Callable[[LocalMesh], LocalDaemon]
) -> tuple[Timed, Timed, bool, float]:
    """One mesh, one leave: both streams, whether their tokens were right, and how long the leave took."""
    flags = ["--device", "cpu", "--threads", "1", "--memory", str(memory_bytes), "--min-nodes", "4"]
    with LocalMesh(folder) as mesh:
        mesh.found("one", *flags)
        for name in ("two", "three", "four"):
            mesh.join(name, *flags)
        mesh.await_ready()
        leaver = find_leaver(mesh)
        other = next(daemon for daemon in mesh.daemons if daemon is not leaver)
        undisturbed, through_other, through_leaver = Timed(), Timed(), Timed()
        undisturbed.run(other, lambda n: None)
        asked_s = 0.0

        def leave(n_tokens: int) -> None:
            nonlocal asked_s
            if n_tokens == LEAVE_AT_TOKEN:
                leaver.terminate()
                asked_s = time.monotonic()

        thread = threading.Thread(target=through_leaver.run, args=(leaver, lambda n: None))
        thread.start()
        try:
            through_other.run(other, leave)
        finally:
            thread.join()
        leaver.process.wait(timeout=60)
        took_s = time.monotonic() - asked_s
        exact = through_other.tokens == through_leaver.tokens == undisturbed.tokens
        return through_other, through_leaver, exact, took_s


def stage_node(mesh: LocalMesh, index: int) -> LocalDaemon:
    (replica,) = mesh.daemons[0].get("/admin/topology")["replicas"]
    return by_id(mesh, replica["stages"][index]["node"])


def coordinator(mesh: LocalMesh) -> LocalDaemon:
    return by_id(mesh, mesh.daemons[0].get("/admin/topology")["coordinator"])


def by_id(mesh: LocalMesh, node_id: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


CASES: dict[str, Callable[[LocalMesh], LocalDaemon]] = {
    "last stage's host": lambda mesh: stage_node(mesh, -1),
    "driver's host": lambda mesh: stage_node(mesh, 0),
    "coordinator's host": coordinator,
}


if __name__ == "__main__":
    sys.exit(main())
