"""What a pipeline of stages gives and costs.

Beside `generate`, beside one node with the same threads, hop by hop, with a far way between its stages, and when
long prompts come between short ones. m125 in float32, greedy, fresh prompts every time. Everything that is compared
is up in the same run and asked in turn, round after round. One light client.
Run: `python tools/bench/pipeline.py [--only generate,node] [--quick] [--json]`; the part `far` needs a lab.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.models import make_m125
from tools.bench.pipeline_far import far_apart
from tools.bench.pipeline_hop import hop_by_hop
from tools.bench.pipeline_load import under_load
from tools.bench.pipeline_mesh import Bench, ask, decode_rate, note_idle, pipeline_of
from tools.bench.reference import Reference
from tools.bench.report import Report, bench_arguments, print_report, progress
from tools.netlab.user_namespace import become_able

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
OVER_GENERATE, OVER_NODE = 1.45, 0.95


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", type=Path, help="m125 as an earlier run made it")
    arguments = parser.parse_args()
    report = Report(name="pipeline", method="random Llama m125 in float32, loopback, greedy, fresh prompts")
    wanted = arguments.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before it was done"))  # and leave nothing behind
    if "far" in wanted:
        become_able()
    report.not_run += [part for part in PARTS if part not in wanted]
    with tempfile.TemporaryDirectory(prefix="hexmesh-bench-") as name:
        bench = Bench(
            report=report,
            model_dir=make_m125(arguments.model or Path(name) / "m125"),
            folder=Path(name),
            n_rounds=2 if arguments.quick else arguments.rounds,
            seeds=count(),
        )
        try:
            for part in wanted:
                progress(part)
                PARTS[part](bench)
        finally:
            print_report(report, "json" if arguments.json else "text")
    return 0


def beside_generate(bench: Bench) -> None:
    """Two stages of one thread, 8 requests at once, beside a static batch of 8 in `generate` on two threads."""
    with pipeline_of(bench, 2, 1) as mesh, Reference(bench.model_dir, threads=2) as reference:
        note_idle(bench, {"two stages": mesh})
        reference.batch_times_s(bench.prompts(8, PROMPT_TOKENS), 8)
        ours, theirs = [], []
        for number in range(bench.n_rounds):
            prompts = bench.prompts(8, PROMPT_TOKENS)
            ours.append(8 * OUTPUT_TOKENS / ask(mesh, prompts, OUTPUT_TOKENS)[1])
            theirs.append(8 * OUTPUT_TOKENS / reference.batch_times_s(prompts, OUTPUT_TOKENS)[-1])
            progress(f"  round {number + 1}: {ours[-1]:.0f} and {theirs[-1]:.0f} tokens/s")
    bench.report.add("8 requests, 2 stages x 1 thread", ours, "tokens/s")
    bench.report.add("8 requests, generate's static batch x 2 threads", theirs, "tokens/s")
    bench.add_ratio("8 requests, 2 stages over generate", ours, theirs, at_least=OVER_GENERATE)


def beside_one_node(bench: Bench) -> None:
    """Two stages of one thread beside one node with two, 16 streams."""
    with ExitStack() as stack:
        one = stack.enter_context(pipeline_of(bench, 1, 2))
        two = stack.enter_context(pipeline_of(bench, 2, 1))
        note_idle(bench, {"one node": one, "two stages": two})
        rates: dict[str, list[float]] = {"two": [], "one": [], "two decode": [], "one decode": []}
        for number in range(bench.n_rounds):
            prompts = bench.prompts(16, PROMPT_TOKENS)
            for name, mesh in (("two", two), ("one", one)):
                streams, elapsed_s = ask(mesh, prompts, OUTPUT_TOKENS)
                rates[name].append(16 * OUTPUT_TOKENS / elapsed_s)
                rates[f"{name} decode"].append(decode_rate(streams))
            progress(f"  round {number + 1}: {rates['two'][-1]:.0f} and {rates['one'][-1]:.0f} tokens/s")
    for phase, what in (("", "16 streams, prefill included"), (" decode", "16 streams, decode alone")):
        bench.report.add(f"{what}, 2 stages x 1 thread", rates[f"two{phase}"], "tokens/s")
        bench.report.add(f"{what}, 1 node x 2 threads", rates[f"one{phase}"], "tokens/s")
        bench.add_ratio(
            f"{what}, 2 stages over 1 node", rates[f"two{phase}"], rates[f"one{phase}"], at_least=OVER_NODE
        )


PARTS: dict[str, Callable[[Bench], None]] = {
    "generate": beside_generate,
    "node": beside_one_node,
    "hop": hop_by_hop,
    "far": far_apart,
    "load": under_load,
}


if __name__ == "__main__":
    sys.exit(main())
