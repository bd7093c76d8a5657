"""What the daemon itself costs: CPU per generated token, split by part, and how evenly tokens reach many streams.

One node with the shipped model, whose steps take so little that the daemon shows; clients in a process of their
own. CPU is the daemon process's alone, without what it takes when idle; the workers' is beside it. The split
comes from rounds of their own, in which the daemon samples its stack by CPU time (`sampled_daemon.py`).
Run: `python tools/bench/daemon.py [--quick] [--json]`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.bench.stream_clients import Outcome

HERE = Path(__file__).resolve().parent
COUNTS = (1, 32, 256)
ROUND_TOKENS = {1: 600, 32: 19200, 256: 38400}
"""Tokens of one round, over all streams."""
QUESTION = "What is a KV cache?"
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": QUESTION},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}]},
}
IDLE_S = 3.0
N_TOO_MANY = 2000
OVERLOAD_TOKENS = 20
ROUND_TIMEOUT_S = 170.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round of so many streams."""

    seen: Outcome
    daemon_cpu_s: float
    workers_cpu_s: float
    system_share: float
    """Of the daemon's CPU: what the kernel took."""

    @property
    def us_per_token(self) -> float:
        return 1e6 * self.daemon_cpu_s / self.seen.n_tokens


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--streams", type=int, nargs="*", default=COUNTS, help="how many streams at a time")
    parser.add_argument(
        "--lines", action="store_true", help="also show the lines of code that were seen most"
    )
    arguments = parser.parse_args()
    n_rounds = 1 if arguments.quick else 3
    report = Report(
        name="daemon",
        method=(
            f"one node, shipped model, float32, 1 compute thread, loopback; streams of {QUESTION!r} drawn at "
            f"temperature 1 and one event a token; {n_rounds} round(s) each; client in another process"
        ),
    )
    with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as name:
        folder = Path(name)
        os.environ["BENCH_SAMPLES"] = str(folder / "samples.json")
        measure(report, folder, n_rounds, list(arguments.streams), shows_lines=arguments.lines)
    print_report(report, "json" if arguments.json else "text")
    return 0


def measure(report: Report, folder: Path, n_rounds: int, counts: list[int], *, shows_lines: bool) -> None:
    program = (sys.executable, str(HERE / "sampled_daemon.py"))
    with LocalMesh(folder / "mesh", program=program) as mesh:
        node = mesh.found("node", "--device", "cpu", "--threads", "1", "--dtype", "float32", "--no-auth")
        mesh.await_ready()
        run_round(node, "/v1/completions", 8, 400)
        idle_s = idle_cpu_per_s(node)
        report.add("CPU while idle", 100 * idle_s, "% of a core")
        for n_streams in counts:
            for path in ROUTES:
                label = f"{n_streams} streams, {path.split('/')[2]}"
                rounds = []
                for _ in range(n_rounds):
                    rounds.append(
                        run_round(node, path, n_streams, ROUND_TOKENS.get(n_streams, 20000), idle_s)
                    )
                    progress(f"{label}: {rounds[-1].us_per_token:.0f} us of CPU a token")
                add_round_figures(report, label, n_streams, rounds)
            add_split(report, folder, node, n_streams, idle_s, shows_lines=shows_lines)
        add_overload(report, node)


def add_round_figures(report: Report, label: str, n_streams: int, rounds: list[Round]) -> None:
    goal = 100.0 if n_streams == 32 else None
    report.add(f"daemon CPU a token, {label}", [one.us_per_token for one in rounds], "us", at_most=goal)
    report.add(f"  of it in the kernel, {label}", [100 * one.system_share for one in rounds], "%")
    n_tokens = sum(one.seen.n_tokens for one in rounds)
    report.add(
        f"  workers' CPU a token, {label}", 1e6 * sum(one.workers_cpu_s for one in rounds) / n_tokens, "us"
    )
    report.add(
        f"  the clients' CPU a token, {label}",
        1e6 * sum(one.seen.client_cpu_s for one in rounds) / n_tokens,
        "us",
    )
    report.add(f"  rate, {label}", [one.seen.n_tokens / one.seen.elapsed_s for one in rounds], "tokens/s")
    gaps_s = sorted(gap for one in rounds for gap in one.seen.gaps_s)
    if len(gaps_s) < 100:
        report.notes.append(
            f"{label}: the streams did not all run at once; statuses {rounds[0].seen.statuses}"
        )
        return
    median_s, p99_s = statistics.median(gaps_s), gaps_s[int(0.99 * len(gaps_s))]
    report.add(f"  gap p50, {label}", 1e3 * median_s, "ms")
    report.add(f"  gap p99, {label}", 1e3 * p99_s, "ms")
    report.add(
        f"  gap p99 over p50, {label}", p99_s / median_s, "", at_most=3.0 if n_streams == 256 else None
    )
    firsts_s = sorted(first for one in rounds for first in one.seen.first_s)
    report.add(f"  slowest first token, {label}", 1e3 * firsts_s[-1], "ms")
    events = sum(one.seen.n_events for one in rounds) / sum(one.seen.n_arrivals for one in rounds)
    report.add(f"  events an arrival, {label}", events, "")


def add_split(
    report: Report, folder: Path, node: LocalDaemon, n_streams: int, idle_s: float, *, shows_lines: bool
) -> None:
    """The daemon's CPU a token by part, from one sampled round; parts by their share of the samples."""
    samples = folder / "samples.json"
    samples.unlink(missing_ok=True)
    node.process.send_signal(signal.SIGUSR1)
    one = run_round(node, "/v1/completions", n_streams, ROUND_TOKENS.get(n_streams, 20000), idle_s)
    node.process.send_signal(signal.SIGUSR2)
    deadline_s = time.monotonic() + 10.0
    while not samples.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError("the daemon did not write its samples")
        time.sleep(0.05)
    seen = json.loads(samples.read_text())
    n_samples = sum(seen["parts"].values())
    for part, n in sorted(seen["parts"].items(), key=lambda item: -item[1]):
        report.add(f"  {part}, {n_streams} streams", one.us_per_token * n / n_samples, "us a token, sampled")
    steps = [(trip, compute) for trip, compute in seen["steps"] if compute > 0]
    compute_ms = sorted(1e3 * compute for _, compute in steps)
    around_ms = sorted(1e3 * (trip - compute) for trip, compute in steps)
    for what, sorted_ms in (("compute", compute_ms), ("round trip beside compute", around_ms)):
        p50, p99 = statistics.median(sorted_ms), sorted_ms[int(0.99 * len(sorted_ms))]
        report.add(f"  a step's {what} p50, {n_streams} streams", p50, "ms")
        report.add(f"  a step's {what} p99, {n_streams} streams", p99, "ms")
    if shows_lines:
        for line, n in seen["lines"].items():
            report.notes.append(f"{one.us_per_token * n / n_samples:6.2f} us {line}")


def add_overload(report: Report, node: LocalDaemon) -> None:
    """More clients at once than the node takes: how soon the others are refused, and what the served ones notice."""
    seen = run_round(node, "/v1/completions", N_TOO_MANY, N_TOO_MANY * OVERLOAD_TOKENS).seen
    label = f"{N_TOO_MANY} clients at once"
    report.notes.append(f"{label}: statuses {seen.statuses}")
    if not seen.refused_s:
        report.notes.append(f"{label}: all were taken")
        return
    refused_s, gaps_s = sorted(seen.refused_s), sorted(seen.all_gaps_s)
    report.add(f"refused after, p50, {label}", 1e3 * statistics.median(refused_s), "ms")
    report.add(f"refused after, slowest, {label}", 1e3 * refused_s[-1], "ms")
    report.add(f"gap p50 of the served, {label}", 1e3 * statistics.median(gaps_s), "ms")
    report.add(f"gap p99 of the served, {label}", 1e3 * gaps_s[int(0.99 * len(gaps_s))], "ms")


def run_round(
    node: LocalDaemon, path: str, n_streams: int, n_tokens: int, idle_cpu_per_s: float = 0.0
) -> Round:
    """All streams at once, each with its share of the tokens."""
    body = ROUTES[path] | {
        "max_tokens": max(2, n_tokens // n_streams),
        "ignore_eos": True,
        "temperature": 1.0,
        "skip_special_tokens": False,  # a token without text makes no event, and so a gap that is none
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    command = [
        sys.executable,
        str(HERE / "stream_clients.py"),
        node.url,
        path,
        json.dumps(body),
        str(n_streams),
    ]
    process = psutil.Process(node.process.pid)
    before, workers_before_s, started_s = process.cpu_times(), _children_cpu_s(process), time.monotonic()
    done = subprocess.run(command, capture_output=True, timeout=ROUND_TIMEOUT_S, check=True)
    after, elapsed_s = process.cpu_times(), time.monotonic() - started_s
    user_s, system_s = after.user - before.user, after.system - before.system
    return Round(
        seen=Outcome(**json.loads(done.stdout)),
        daemon_cpu_s=user_s + system_s - idle_cpu_per_s * elapsed_s,
        workers_cpu_s=_children_cpu_s(process) - workers_before_s,
        system_share=system_s / (user_s + system_s),
    )


def idle_cpu_per_s(node: LocalDaemon) -> float:
    """CPU seconds a second that the daemon takes while nothing is asked."""
    process = psutil.Process(node.process.pid)
    before = process.cpu_times()
    time.sleep(IDLE_S)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / IDLE_S


def _children_cpu_s(process: psutil.Process) -> float:
    times = [child.cpu_times() for child in process.children(recursive=True)]
    return sum(one.user + one.system for one in times)


if __name__ == "__main__":
    sys.exit(main())
