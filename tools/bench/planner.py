"""How good plans are, and how soon: all algorithms over the papers' fleets and large ones, by score and simulator.

A run writes one JSON line a result and goes on where it stopped; `--fresh` begins anew. In full it takes up to an hour
on two cores, `--quick` about a minute. Run:
`python -m tools.bench.planner [--quick] [--only TEXT] [--jobs 2] [--write]`, where `--write` fills
docs/benchmarks/planner.md in. Small clusters beside exhaustive search: `python -m tools.bench.planner_small`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import msgspec

from hexmesh.workload import CLASSES
from tools.bench.planner_fleets import Planned, cells, run_cell
from tools.bench.planner_judging import Online, Peak, finalists, online, online_key, peak, peak_key
from tools.bench.planner_ratios import Results, online_pairs
from tools.bench.planner_report import summary, write
from tools.bench.planner_swaps import Swaps, swaps, swaps_key
from tools.bench.report import progress

RESULTS = Path("build") / "planner.jsonl"
Record = Planned | Peak | Online | Swaps


@dataclass(frozen=True, slots=True)
class Job:
    """One result to come."""

    key: str
    make: Callable[..., Record]
    arguments: tuple[object, ...]

    def __call__(self) -> Record:
        return self.make(*self.arguments)


def main() -> None:
    """The results on stdout; into the page where that is asked for."""
    arguments = _arguments()
    path: Path = arguments.results
    path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        path.unlink(missing_ok=True)
    results = read(path)
    if not arguments.report_only:
        for phase in _phases(quick=arguments.quick):
            wanted = [job for job in phase(results) if arguments.only in job.key]
            run_all([job for job in wanted if job.key not in results], results, path, arguments.jobs)
    print(summary(results))
    if arguments.write:
        write(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two fleets, one model, two classes")
    parser.add_argument("--only", default="", help="only results whose name has this text in it")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where results are kept, a JSON line each"
    )
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="fill docs/benchmarks/planner.md in")
    return parser.parse_args()


def read(path: Path) -> dict[str, object]:
    """What earlier runs found; a line that was cut off is left out."""
    found = dict[str, object]()
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError:
            continue
        found[record.key] = record
    return found


def run_all(jobs: Sequence[Job], results: dict[str, object], path: Path, n_processes: int) -> None:
    """Run jobs side by side, and keep each result as it comes. Raises what a job raises, after the others."""
    failed: BaseException | None = None
    with (
        ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool,
        path.open("ab") as file,
    ):
        futures: dict[Future[Record], Job] = {pool.submit(job): job for job in jobs}
        for n, future in enumerate(as_completed(futures), start=1):
            if (error := future.exception()) is not None:
                progress(f"{futures[future].key}: {error!r}")
                failed = error
                continue
            record = future.result()
            results[record.key] = record
            file.write(msgspec.json.encode(record) + b"\n")
            file.flush()
            progress(f"{n}/{len(jobs)} {_line(record)}")
    if failed is not None:
        raise failed


def _line(record: Record) -> str:
    if isinstance(record, Planned):
        return f"{record.key} {record.requests_per_s:.4g} of {record.bound_requests_per_s:.4g} {record.seconds:.1f} s"
    return record.key


def _phases(*, quick: bool) -> Iterable[Callable[[Results], Iterator[Job]]]:
    """Each needs the results of the one before."""

    def plan(results: Results) -> Iterator[Job]:
        for cell in cells(quick=quick):
            yield Job(cell.key, run_cell, (cell,))
        for workload in ("HPLD",) if quick else CLASSES:
            yield Job(swaps_key(workload), swaps, (workload,))

    def judge(results: Results) -> Iterator[Job]:
        found = [one for one in results.values() if isinstance(one, Planned)]
        for one, seed in finalists(found):
            yield Job(peak_key(one.key, seed), peak, (one, seed))
        for pair in online_pairs(results):
            for a, b in (pair, pair[::-1]):
                yield Job(online_key(a.key, b.key), online, (a, b))

    return plan, judge


if __name__ == "__main__":
    main()
