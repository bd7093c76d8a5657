"""How fast a small mesh on loopback is, beside one process running transformers `generate` on the same weights.

Every ratio is taken pair by pair: reference and mesh answer the same prompt one after the other, several times, so that
a noisy machine disturbs both. One compute thread each. Run: `python tools/bench/mesh.py [--quick] [--json]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from tools.bench.models import make_m125, random_prompt
from tools.bench.processes import cpu_seconds, measure_idle, memory, metric, metrics_of
from tools.bench.reference import Reference
from tools.bench.report import Report, bench_arguments, print_report, progress

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
MEMORY_MIB = {1: 1500, 2: 380, 3: 235}
"""Budget of each node that makes a pipeline of so many stages necessary for the 499 MB of weights."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Timed:
    """When the tokens of one answer came, in seconds since the request was sent."""

    times_s: list[float]

    @property
    def first_token_s(self) -> float:
        return self.times_s[0]

    @property
    def tokens_per_s(self) -> float:
        """Rate between the second and the last token."""
        return (len(self.times_s) - 2) / (self.times_s[-1] - self.times_s[1])


def main() -> int:
    arguments = bench_arguments(__doc__ or "").parse_args()
    n_rounds = 3 if arguments.quick else 6
    report = Report(
        name="mesh",
        method=(
            f"random Llama m125 in float32, prompt {PROMPT_TOKENS}, output {OUTPUT_TOKENS}, greedy, 1 thread a "
            f"process, loopback; ratios pair by pair over {n_rounds} rounds after one warm-up"
        ),
    )
    sizes = [1, 2] if arguments.quick else [1, 2, 3]
    if arguments.quick:
        report.not_run.append("three nodes")
    with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as folder:
        model_dir = make_m125(Path(folder) / "m125")
        with Reference(model_dir, threads=1) as reference:
            ms_per_token: dict[int, list[float]] = {}
            for n_nodes in sizes:
                ms_per_token[n_nodes] = measure_mesh(
                    report, reference, model_dir, Path(folder) / f"mesh-{n_nodes}", n_nodes, n_rounds
                )
            for n_nodes in sizes[1:]:
                hops_ms = [
                    (many - one) / (n_nodes - 1)
                    for many, one in zip(ms_per_token[n_nodes], ms_per_token[1], strict=True)
                ]
                report.add(f"per hop, {n_nodes} nodes", hops_ms, "ms")
    print_report(report, "json" if arguments.json else "text")
    return 0


def measure_mesh(
    report: Report, reference: Reference, model_dir: Path, folder: Path, n_nodes: int, n_rounds: int
) -> list[float]:
    """Everything about a mesh of that many nodes; milliseconds per decoded token of each round."""
    label = f"{n_nodes} node{'s' if n_nodes > 1 else ''}"
    progress(f"{label}: starting")
    flags = [
        "--memory",
        f"{MEMORY_MIB[n_nodes]}MiB",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    flags += ["--min-nodes", str(n_nodes)]
    prompt = random_prompt(PROMPT_TOKENS, seed=0)
    with LocalMesh(folder) as mesh:
        founder = mesh.found("node-1", "--model", str(model_dir), *flags)
        for index in range(2, n_nodes + 1):
            mesh.join(f"node-{index}", *flags)
        mesh.await_ready(plan_reaches=n_nodes, tell=lambda text: progress(f"  waiting: {text}"))
        generate(founder, prompt, 1)
        report.add(f"join to first answer, {label}", time.monotonic() - founder.started_s, "s")

        def ask() -> Timed:
            return generate(founder, prompt, OUTPUT_TOKENS)

        def refer() -> Timed:
            return Timed(reference.token_times_s(prompt, OUTPUT_TOKENS))

        ask()
        refer()
        idle_cpu_per_s = measure_idle(mesh)
        report.add(
            f"CPU while idle, daemon, {label}", 100 * idle_cpu_per_s["daemon"] / n_nodes, "% of a core each"
        )
        cpu_before, started_s = cpu_seconds(mesh), time.monotonic()
        pairs = []
        for index in range(n_rounds):
            pairs.append((ask(), refer()))
            progress(f"  round {index + 1}/{n_rounds}: {pairs[-1][0].tokens_per_s:.1f} tokens/s")
        elapsed_s = time.monotonic() - started_s
        report_speed(report, label, pairs)
        n_tokens = n_rounds * OUTPUT_TOKENS
        for role, seconds in cpu_seconds(mesh).items():
            busy_s = seconds - cpu_before.get(role, 0.0) - idle_cpu_per_s.get(role, 0.0) * elapsed_s
            report.add(f"CPU per token, {role}, {label}", 1e3 * busy_s / n_tokens, "ms")
        for role, n_bytes in memory(mesh).items():
            report.add(f"memory, {role}, {label}", n_bytes / MIB, "MiB (PSS, mean of its processes)")
        report.add(f"compute share of a step, {label}", compute_share(mesh), "of the round trip")
    return [1e3 / mesh_run.tokens_per_s for mesh_run, _ in pairs]


def report_speed(report: Report, label: str, pairs: list[tuple[Timed, Timed]]) -> None:
    report.add(f"decode, {label}", [mesh.tokens_per_s for mesh, _ in pairs], "tokens/s")
    report.add(f"decode, transformers beside {label}", [other.tokens_per_s for _, other in pairs], "tokens/s")
    report.add(
        f"decode ratio, {label}",
        [mesh.tokens_per_s / other.tokens_per_s for mesh, other in pairs],
        "x transformers",
    )
    report.add(
        f"time to first token, {label}", [1e3 * mesh.first_token_s for mesh, _ in pairs], "ms over HTTP"
    )
    report.add(
        f"time to first token ratio, {label}",
        [mesh.first_token_s / other.first_token_s for mesh, other in pairs],
        "x transformers",
    )


def generate(daemon: LocalDaemon, prompt: list[int], max_tokens: int) -> Timed:
    """One greedy answer through `/generate`, streamed."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    started_s = time.perf_counter()
    times_s = []
    for line in daemon.client.stream("/generate", body):
        if line.strip() and json.loads(line).get("token_id") is not None:
            times_s.append(time.perf_counter() - started_s)
    return Timed(times_s)


def compute_share(mesh: LocalMesh) -> float:
    """Share of the steps' round trips that stages spent computing, from the daemons' own metrics."""
    lines = metrics_of(mesh.daemons)
    compute_s = metric(lines, "hexmesh_stage_step_seconds_sum")
    steps_s = metric(lines, "hexmesh_step_round_trip_seconds_sum")
    return compute_s / steps_s if steps_s else 0.0


if __name__ == "__main__":
    sys.exit(main())
