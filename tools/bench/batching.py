"""What the serving policies cost the daemon, apart from all else: process CPU time, one thread, no stages.

Run: `python tools/bench/batching.py [--quick] [--json]`.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hexmesh.serving.batcher import Batcher, BatchLimits
from hexmesh.serving.blocks import BlockPool
from hexmesh.serving.pacing import Pacing
from hexmesh.serving.prefix import PrefixChain, first_link
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import SampledToken, SamplingParams
from tools.bench.report import Report, bench_arguments, print_report

N_PROMPT = 128
LONG = 4096
TOKEN = SampledToken(token_id=7)


def main() -> int:
    arguments = bench_arguments(__doc__ or "").parse_args()
    n_rounds = 100 if arguments.quick else 1000
    report = Report(
        name="batching", method=f"process CPU time; {n_rounds} rounds of one token for each stream"
    )
    for n_streams, n_groups in ((1, 1), (32, 1), (256, 1), (256, 4)):
        seconds = [cost_s / n_streams for cost_s in decode_rounds(n_streams, n_groups, n_rounds)]
        name = f"a decoded token, {n_streams} streams in {n_groups} steps"
        report.add(name, [1e6 * cost_s for cost_s in seconds], "us", at_most=5.0 if n_streams > 1 else None)
    report.add(f"taking up a prompt of {LONG} tokens", [1e3 * s for s in long_prompts(20)], "ms", at_most=2.0)
    report.add(f"naming {LONG} tokens", [1e3 * s for s in chains(20)], "ms", at_most=2.0)
    report.add("pacing, a step", [1e6 * s for s in paced_steps(n_rounds)], "us")
    print_report(report, "json" if arguments.json else "text")
    return 0 if all(figure.holds is not False for figure in report.figures.values()) else 1


def cpu_s(work: Callable[[], object]) -> float:
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def prompt(name: str, n_tokens: int) -> Sequence:
    return Sequence(
        id=name,
        attempt=1,
        tokens=[hash((name, at)) % 30000 for at in range(n_tokens)],
        n_prompt=n_tokens,
        max_tokens=100_000,
        stop_token_ids=frozenset({1}),
        sampling=SamplingParams(),
    )


def batcher(n_tokens: int) -> Batcher:
    return Batcher(BlockPool(2_000_000 // 16, 16), BatchLimits(step_tokens=n_tokens), "model")


def one_round(served: Batcher, n_groups: int) -> None:
    """One token for each that decodes."""
    batches = [served.next_step(0.0, n_groups) for _ in range(n_groups)]
    for batch in batches:
        assert batch is not None
        served.complete(batch.step, [[TOKEN]] * len(served.awaited(batch.step) or []), 0.0)


def decode_rounds(n_streams: int, n_groups: int, n_rounds: int) -> list[float]:
    """What each round cost; the prompts are computed before."""
    served = batcher(4096)
    for index in range(n_streams):
        served.submit(prompt(str(index), N_PROMPT), 0.0)
    while served.n_decoding < n_streams:
        one_round(served, 1)
    gc.collect()
    return [cpu_s(lambda: one_round(served, n_groups)) for _ in range(n_rounds)]


def long_prompts(n_prompts: int) -> list[float]:
    """From submission to the first step of it."""

    def take_up(served: Batcher, long: Sequence) -> None:
        served.submit(long, 0.0)
        served.next_step(0.0, 1)

    return [cpu_s(partial(take_up, batcher(256), prompt(str(index), LONG))) for index in range(n_prompts)]


def chains(n_chains: int) -> list[float]:
    tokens = prompt("long", LONG).tokens
    return [cpu_s(lambda: PrefixChain(first_link("model", "")).name(tokens, LONG)) for _ in range(n_chains)]


def paced_steps(n_steps: int) -> list[float]:
    """With as many sequences now as then, in two stages."""
    pacing = Pacing([0.01, 0.01], 32)

    def one_step(step: int) -> None:
        n_rows = -(-(200 + step % 7) // pacing.groups(200 + step % 7))
        seconds = 0.001 + 0.0001 * n_rows
        pacing.observe(n_rows, n_rows, [seconds, seconds], 0.05, 2)

    return [cpu_s(partial(one_step, step)) for step in range(n_steps)]


if __name__ == "__main__":
    raise SystemExit(main())
