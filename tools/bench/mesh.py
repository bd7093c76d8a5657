"""How fast a small mesh on loopback is, beside one process running transformers `generate` on the same weights.

Every ratio is taken pair by pair: reference and mesh answer the same prompt one after the other, several times, so that
a noisy machine disturbs both. One compute thread each. Run: `python tools/bench/mesh.py [--quick] [--json]`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from tools.bench.models import make_m125, random_prompt
from tools.bench.reference import Reference
from tools.bench.report import Report, bench_arguments, print_report, progress

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
MEMORY_MIB = {1: 1500, 2: 380, 3: 235}
"""Budget of each node that makes a pipeline of so many stages necessary for the 499 MB of weights."""
IDLE_S = 3.0
"""How long an idle mesh is watched."""
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


def measure_idle(mesh: LocalMesh) -> dict[str, float]:
    """CPU seconds a second that each kind of process takes while nothing is asked."""
    before = cpu_seconds(mesh)
    time.sleep(IDLE_S)
    return {role: (after - before.get(role, 0.0)) / IDLE_S for role, after in cpu_seconds(mesh).items()}


def cpu_seconds(mesh: LocalMesh) -> dict[str, float]:
    """CPU seconds so far, by kind of process, summed over the mesh."""
    return _by_role(mesh, lambda process: sum(cpu_times_s(process)), sum)


def memory(mesh: LocalMesh) -> dict[str, float]:
    """Proportional set size in bytes by kind of process, mean over the mesh."""
    return _by_role(mesh, lambda process: float(process.memory_full_info().pss), lambda v: sum(v) / len(v))


def compute_share(mesh: LocalMesh) -> float:
    """Share of the steps' round trips that stages spent computing, from the daemons' own metrics."""
    compute_s = sum(_metric(daemon, "hexmesh_stage_step_seconds_sum") for daemon in mesh.daemons)
    steps_s = sum(_metric(daemon, "hexmesh_step_round_trip_seconds_sum") for daemon in mesh.daemons)
    return compute_s / steps_s if steps_s else 0.0


def cpu_times_s(process: psutil.Process) -> tuple[float, float]:
    """User and system seconds of a process."""
    times = process.cpu_times()
    return times.user, times.system


def _metric(daemon: LocalDaemon, name: str) -> float:
    """Sum of a metric's series on one daemon."""
    lines = daemon.client.get("/metrics").decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _by_role(
    mesh: LocalMesh, figure: Callable[[psutil.Process], float], combine: Callable[[list[float]], float]
) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for daemon in mesh.daemons:
        process = psutil.Process(daemon.process.pid)
        for one in [process, *process.children(recursive=True)]:
            found.setdefault(_role(one, process), []).append(figure(one))
    return {role: combine(values) for role, values in found.items()}


def _role(process: psutil.Process, daemon: psutil.Process) -> str:
    if process == daemon:
        return "daemon"
    name, command = process.name(), " ".join(process.cmdline())
    if "p2pd" in name or "p2pd" in command:
        return "p2pd"
    return "workshop" if process.ppid() == daemon.pid else "worker"


if __name__ == "__main__":
    sys.exit(main())
