"""What drawing a batch's tokens costs, beside transformers' processors on the same logits, one thread.

transformers' processors take one set of parameters for a whole batch, so requests that differ are looped over, one
row at a time; what one set for all rows costs is measured too. CPU time, interleaved rounds, their median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hexmesh.runtime.draw import Draw
from hexmesh.runtime.sampler import sample
from hexmesh.wire.data import SamplingParams
from tools.bench.report import Report, bench_arguments, print_report, progress

MOST_ALL_S = 10e-3
"""All filters at batch 32 and a vocabulary of 128,000."""
N_SEEN = 500
"""Distinct tokens that the penalties look at."""
ALL = SamplingParams(
    temperature=0.8,
    top_k=50,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.2,
)
KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.0),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "all filters and penalties": ALL,
    "greedy, 5 logprobs": SamplingParams(n_logprobs=5),
}


def language_logits(n_rows: int, vocab_size: int, exponent: float) -> torch.Tensor:
    """Tokens' probabilities fall with their rank as in text; the smaller the exponent, the wider the nucleus."""
    generator = torch.Generator().manual_seed(vocab_size + n_rows)
    falling = -exponent * torch.arange(1, vocab_size + 1).float().log()
    order = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(n_rows)])
    return falling[order]


def draws(params: SamplingParams, n_rows: int, vocab_size: int) -> list[Draw]:
    seen = np.unique(np.random.default_rng(1).integers(0, vocab_size, N_SEEN))
    output = seen[::2]
    counts = np.ones(len(output), dtype=np.float32)
    if not params.needs_past:
        return [Draw(params, 700 + row) for row in range(n_rows)]
    return [Draw(params, 700 + row, seen=seen, output=output, counts=counts) for row in range(n_rows)]


def processors() -> LogitsProcessorList:
    """transformers' share of ALL."""
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(ALL.repetition_penalty),
            TemperatureLogitsWarper(ALL.temperature),
            TopKLogitsWarper(ALL.top_k),
            TopPLogitsWarper(ALL.top_p),
            MinPLogitsWarper(ALL.min_p),
        ]
    )


def draw_by_transformers(logits: torch.Tensor, seen: torch.Tensor, wrap: LogitsProcessorList) -> None:
    torch.multinomial(wrap(seen, logits).softmax(-1), 1)


def draw_row_by_row(logits: torch.Tensor, seen: torch.Tensor, wrap: LogitsProcessorList) -> None:
    for row in range(len(logits)):
        draw_by_transformers(logits[row : row + 1], seen[row : row + 1], wrap)


def cpu_s(job: Callable[[], object]) -> float:
    started_s = time.process_time()
    job()
    return time.process_time() - started_s


def measure(report: Report, jobs: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """Seconds of each job; their medians are recorded in ms."""
    for job in jobs.values():
        job()
    samples: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(n_rounds):
        for name, job in jobs.items():
            samples[name].append(cpu_s(job))
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    for name, median_s in medians.items():
        most = MOST_ALL_S * 1e3 if name == "all filters and penalties, V=128000 B=32" else None
        report.add(name, median_s * 1e3, "ms", at_most=most)
    return medians


def main() -> None:
    arguments = bench_arguments(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    report = Report("sampling", "CPU time of one thread for one step's draws; medians of interleaved rounds")
    report.notes.append("'wide' has a nucleus of thousands of tokens: the worst case of top_p without top_k")
    n_rounds = 5 if arguments.quick else 15
    for vocab_size in (32_000, 128_000):
        for n_rows in (1, 8, 32):
            progress(f"vocabulary {vocab_size}, batch {n_rows}")
            measure_batch(report, vocab_size, n_rows, n_rounds)
    print_report(report, "json" if arguments.json else "text")


@torch.inference_mode()
def measure_batch(report: Report, vocab_size: int, n_rows: int, n_rounds: int) -> None:
    where = f"V={vocab_size} B={n_rows}"
    logits = language_logits(n_rows, vocab_size, 1.3)
    jobs: dict[str, Callable[[], object]] = {
        f"{name}, {where}": partial(sample, logits, draws(params, n_rows, vocab_size))
        for name, params in KINDS.items()
    }
    wide = language_logits(n_rows, vocab_size, 0.9)
    jobs[f"top_p, wide, {where}"] = partial(sample, wide, draws(KINDS["top_p"], n_rows, vocab_size))
    seen = torch.randint(vocab_size, (n_rows, N_SEEN))
    wrap = processors()
    jobs[f"transformers, row by row, {where}"] = partial(draw_row_by_row, logits, seen, wrap)
    jobs[f"transformers, one set for all, {where}"] = partial(draw_by_transformers, logits, seen, wrap)
    taken = measure(report, jobs, n_rounds)
    ours = taken[f"all filters and penalties, {where}"]
    report.add(
        f"transformers' row by row over ours, {where}",
        taken[f"transformers, row by row, {where}"] / ours,
        "x",
    )


if __name__ == "__main__":
    main()
