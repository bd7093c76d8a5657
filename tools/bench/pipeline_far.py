"""Two stages with 40 ms of round trip between them: the rate beside the best schedule, and what one stream pays.

Two hosts of a lab. The stages' step times are measured in the same run, in processes of their own, for every number
of rows that matters: alone, and both stages at once; and led through what steps took in the run itself, where caches
are shared with everything else. `best_schedule.py` tries every number of micro-batches with each of them and with the
link as set. The rate counts while all streams decode.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

from tools.bench.best_schedule import Pipeline, StepTimes, best_schedule
from tools.bench.pipeline_hop import Parts, differences
from tools.bench.pipeline_mesh import STOP_S, Bench, driver_of, make_balanced, note_plan, stages_of
from tools.bench.pipeline_window import Window, watch
from tools.bench.report import progress
from tools.bench.stage_process import StageProcess
from tools.netlab.lab import Lab
from tools.netlab.links import Link, Topology, both_ways
from tools.netlab.mesh import LabMesh

ONE_WAY_S = 0.020
LINK_BYTES_PER_S = 1.25e8
LINK = Link(latency_s=ONE_WAY_S, rate_bytes_per_s=LINK_BYTES_PER_S)
ROW_S = 768 * 4 / LINK_BYTES_PER_S
"""Of the link, for a row's hidden states."""
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 80
COUNTS = (1, 32, 128)
ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
OF_BEST = 0.9
MOST_WAYS = 2.2
"""One-way delays of a lone stream's token: one a stage, and 4 ms for all that is neither way nor compute."""
N_STEPS = 5


def far_apart(bench: Bench) -> None:
    """1, 32 and 128 streams through two hosts."""
    with far_mesh(bench) as (lab, mesh), ExitStack() as stack:
        processes = [
            stack.enter_context(StageProcess(bench.model_dir, tuple(stage["layers"])))
            for stage in stages_of(mesh)
        ]
        windows: dict[int, list[Window]] = {n_streams: [] for n_streams in COUNTS}
        rounds: dict[str, list[list[StepTimes]]] = {"alone": [], "both at once": []}
        for number in range(bench.n_rounds):
            rounds["alone"].append([step_times([process])[0] for process in processes])
            rounds["both at once"].append(step_times(processes))
            for n_streams in COUNTS:
                progress(f"  round {number + 1}: {n_streams} streams")
                windows[n_streams] += ask_far(bench, lab, mesh, n_streams)
        lab.check_valid()
    report_one(bench, windows[1])
    times = {name: [typical(stage) for stage in zip(*those, strict=True)] for name, those in rounds.items()}
    for n_streams in COUNTS:
        if n_streams > 1 and windows[n_streams]:
            report_many(bench, windows[n_streams], times)


@contextmanager
def far_mesh(bench: Bench) -> Iterator[tuple[Lab, LabMesh]]:
    """Two hosts in two sites, one stage each, warm."""
    sites = {"near": ("near-1",), "far": ("far-1",)}
    with (
        Lab(Topology(sites=sites, links=both_ways({("near", "far"): LINK}))) as lab,
        LabMesh(bench.folder / "far-mesh", stop_timeout_s=STOP_S) as mesh,
    ):
        flags = bench.flags(2, 1)

        def found() -> None:
            founder = mesh.found_on(lab.hosts["near-1"], *flags, "--model", str(bench.model_dir))
            mesh.await_up(mesh.start_on(lab.hosts["far-1"], *flags, token=founder.fresh_token()))

        make_balanced(mesh, found, 2)
        note_plan(bench, mesh, "far apart")
        ask_far(bench, lab, mesh, 2)
        yield lab, mesh


def ask_far(bench: Bench, lab: Lab, mesh: LabMesh, n_streams: int) -> list[Window]:
    """All at once, from the driver's own host. Nothing, and a note, where they cannot all run."""
    driver = driver_of(mesh)
    port = int(driver.url.rpartition(":")[2])
    connect = partial(lab.hosts[driver.name].connect, "127.0.0.1", port)
    prompts = bench.prompts(n_streams, PROMPT_TOKENS)
    try:
        return [watch(driver, 2, connect, prompts, OUTPUT_TOKENS)]
    except SystemExit as error:
        bench.report.notes.append(f"{n_streams} streams far apart: {error}")
        return []


def step_times(processes: list[StageProcess]) -> list[StepTimes]:
    """Of each stage, for every number of rows, at the context in the middle of an answer; all processes at once."""
    context = PROMPT_TOKENS + OUTPUT_TOKENS // 2
    with ThreadPoolExecutor(len(processes)) as pool:
        by_rows = {
            n_rows: list(pool.map(lambda process, n=n_rows: process.step_s(n, context, N_STEPS), processes))
            for n_rows in ROW_COUNTS
        }
    return [
        StepTimes({n_rows: times[at] for n_rows, times in by_rows.items()}) for at in range(len(processes))
    ]


def typical(rounds: Sequence[StepTimes]) -> StepTimes:
    """The medians of a stage's times over the rounds."""
    return StepTimes({n: statistics.median(times.seconds[n] for times in rounds) for n in ROW_COUNTS})


def report_one(bench: Bench, windows: list[Window]) -> None:
    """A lone stream: its token without the stages' compute, in one-way delays."""
    parts = Parts()
    for window in windows:
        parts.add(window)
    parts.report(bench, "far apart, 1 stream")
    ways = [ms / (1e3 * ONE_WAY_S) for ms in differences(parts.token, parts.compute)]
    bench.report.add("far apart, 1 stream: one-way delays a token", ways, "for 2 stages", at_most=MOST_WAYS)


def report_many(bench: Bench, windows: list[Window], times: dict[str, list[StepTimes]]) -> None:
    """The rate, the best schedule of each kind of step times, and how the stages were used."""
    report, n_streams = bench.report, len(windows[0].streams)
    name = f"far apart, {n_streams} streams"
    rates = [window.tokens_per_s for window in windows]
    report.add(name, rates, "tokens/s")
    report.add(f"  rows of a step, {name}", [window.rows for window in windows], "")
    report.add(f"  round trip, {name}", [1e3 * window.trip_s for window in windows], "ms")
    report.add(f"  of it on the ways, {name}", [1e3 * window.transit_s for window in windows], "ms")
    for index in range(2):
        report.add(f"  busy, stage {index}, {name}", [window.busy[index] for window in windows], "")
        report.add(
            f"  compute, stage {index}, {name}",
            [1e3 * window.stage_s[index] for window in windows],
            "ms a step",
        )
    seen = [statistics.median(window.stage_s[index] for window in windows) for index in range(2)]
    rows = statistics.median(window.rows for window in windows)
    in_run = [stage.through(rows, seconds) for stage, seconds in zip(times["alone"], seen, strict=True)]
    for kind, stages in {**times, "in the run": in_run}.items():
        pipeline = Pipeline(stages, (ONE_WAY_S, ONE_WAY_S), ROW_S)
        best = best_schedule(pipeline, n_streams)
        size = -(-n_streams // best.n_groups)
        steps_ms = ", ".join(f"{1e3 * stage(size):.1f}" for stage in stages)
        report.notes.append(
            f"{name}: best is {best.n_groups} micro-batches (steps of {steps_ms} ms, timed {kind})"
        )
        report.add(f"  best schedule, steps timed {kind}, {name}", best.tokens_per_s, "tokens/s")
        share = statistics.median(rates) / best.tokens_per_s
        report.add(f"{name}: of the best, steps timed {kind}", share, "", at_least=OF_BEST)
