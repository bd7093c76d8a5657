"""How fast the CPU engine is, beside transformers `generate` on the same weights with equal threads.

One process each for `generate` and for a whole-model stage of ours; both answer in turn, several rounds, and the least
counts: of the process's CPU time with one thread, of the wall with more. Context 128, greedy, random weights.
Run: `python tools/bench/engine.py [--quick] [--big] [--json] [--threads N] [--models m125,mha134] [--dtypes ...]`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.asked_process import AskedProcess
from tools.bench.engine_process import Engine
from tools.bench.models import make_1b, make_m125, make_mha134
from tools.bench.reference import Reference
from tools.bench.report import Report, bench_arguments, print_report, progress

MODELS: dict[str, Callable[[Path], Path]] = {"m125": make_m125, "mha134": make_mha134, "1b": make_1b}
CONTEXT_TOKENS = 128
PREFILL_TOKENS = 1024
BATCHES = (1, 8, 32)
STEPS = {1: 12, 8: 6, 32: 4}
OVER_ONE = {"float32": {1: 1.3, 8: 6.0, 32: 10.0}, "bfloat16": {1: 1.4, 8: 8.0, 32: 14.0}}
"""Goals for tokens/s over `generate` at batch 1."""
OVER_STATIC = {8: 1.5, 32: 2.0}
"""Goals for tokens/s over `generate` with a static batch of the same size."""


@dataclass(slots=True)
class Best:
    """The least time of each thing timed. Owned by the bench's loop."""

    clock: str
    times_s: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, process: AskedProcess, request: dict[str, object]) -> None:
        seconds = float(process.ask(request)[self.clock])
        self.times_s[name] = min(seconds, self.times_s.get(name, seconds))


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", default="m125,mha134", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--big", action="store_true", help="the 1 B shape in bfloat16, instead of the others")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where models are kept from run to run")
    parser.add_argument("--no-torch", action="store_true", help="leave out the engine without its C kernels")
    arguments = parser.parse_args()
    models = ["1b"] if arguments.big else arguments.models.split(",")
    dtypes = ["bfloat16"] if arguments.big else arguments.dtypes.split(",")
    n_rounds = 2 if arguments.quick else arguments.rounds
    clock = "cpu_s" if arguments.threads == 1 else "wall_s"
    report = Report(
        name="engine",
        method=(
            f"context {CONTEXT_TOKENS}, greedy, {arguments.threads} threads, one process each for transformers and "
            f"the engine; least {'CPU time' if clock == 'cpu_s' else 'wall time'} of {n_rounds} rounds in turn"
        ),
    )
    kernels = ["native"] if arguments.no_torch or arguments.quick else ["native", "torch"]
    if len(kernels) == 1:
        report.not_run.append("the engine without its C kernels")
    with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as scratch:
        for name in models:
            model_dir = MODELS[name]((arguments.folder or Path(scratch)) / name)
            for dtype in dtypes:
                measure(report, name, model_dir, arguments.threads, dtype, kernels, n_rounds)
    print_report(report, "json" if arguments.json else "text")
    return 0


def measure(
    report: Report, model: str, model_dir: Path, threads: int, dtype: str, kernels: list[str], n_rounds: int
) -> None:
    """Figures of one model and dtype."""
    best = Best("cpu_s" if threads == 1 else "wall_s")
    with Reference(model_dir, threads, dtype) as reference:
        engines = {kind: Engine(model_dir, threads, dtype, kind) for kind in kernels}
        try:
            sides: dict[str, AskedProcess] = {"generate": reference, **engines}
            for number in range(n_rounds):
                progress(f"{model} {dtype}: round {number + 1} of {n_rounds}")
                run_round(best, sides)
            facts = {kind: engine.ask({"facts": True}) for kind, engine in engines.items()}
        finally:
            for engine in engines.values():
                engine.__exit__()
    for kind in kernels:
        add_figures(report, f"{model} {dtype}", kind, best.times_s, facts[kind], dtype)


def run_round(best: Best, sides: dict[str, AskedProcess]) -> None:
    """Everything once, side after side, so that a noisy minute disturbs all of them."""
    for batch in BATCHES:
        for side, process in sides.items():
            request: dict[str, object] = {
                "batch": batch,
                "context_tokens": CONTEXT_TOKENS,
                "steps": STEPS[batch],
            }
            best.time(f"{side} {batch}", process, request)
    for side, process in sides.items():
        best.time(f"{side} prefill", process, {"prefill_tokens": PREFILL_TOKENS})


def add_figures(
    report: Report, case: str, kind: str, times_s: dict[str, float], facts: dict[str, float], dtype: str
) -> None:
    """Rates and ratios of one engine."""
    one_s = times_s["generate 1"]
    is_goal = kind == "native"
    label = f"{case}, {kind}"
    report.notes.append(f"{label}: {facts['kernels']}")
    for batch in BATCHES:
        step_s, static_s = times_s[f"{kind} {batch}"], times_s[f"generate {batch}"]
        report.add(f"{label}: batch {batch}", batch / step_s, "tokens/s")
        goal = OVER_ONE[dtype][batch] if is_goal else None
        report.add(f"{label}: batch {batch} over generate at 1", batch * one_s / step_s, "x", at_least=goal)
        if batch > 1:
            goal = OVER_STATIC[batch] if is_goal else None
            report.add(f"{label}: batch {batch} over a static batch", static_s / step_s, "x", at_least=goal)
    report.add(
        f"{label}: prefill of {PREFILL_TOKENS} over generate",
        times_s["generate prefill"] / times_s[f"{kind} prefill"],
        "x",
        at_least=1.0 if is_goal else None,
    )
    limit_s = facts["weight_bytes"] / facts["bytes_per_s"]
    report.add(f"{label}: memory, one pass over it", facts["bytes_per_s"] / 1e9, "GB/s")
    report.add(f"{label}: share of the memory-bandwidth limit at batch 1", limit_s / times_s[f"{kind} 1"], "")
    report.add(f"{label}: at the limit, over generate at 1", one_s / limit_s, "x")


if __name__ == "__main__":
    sys.exit(main())
