"""What one more stage costs a single stream, and where a token's time goes.

A step's parts come from the driver's own metrics, read twice in the middle of every answer. The rest is differences:
the daemon's share is a token's time without the step's round trip. A stage's compute is also timed in a process of
its own, in turn with the other stage's and alone.

A hop is from one worker's output to the next one's start: over a socket to its daemon, over TLS to the other daemon,
over a socket to the other worker. The ways of a step through two stages have each of these four and two times, as the
first socket and the answer's way make up another hop; so a hop is half of them.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from daemon.terminal.local_mesh import LocalMesh
from tools.bench.pipeline_mesh import Bench, driver_of, note_idle, pipeline_of, stages_of
from tools.bench.pipeline_window import Window, watch
from tools.bench.report import progress
from tools.bench.stage_process import StageProcess
from tools.bench.streams import dial

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 100
ADDED_STAGE_MS, HOP_MS = 1.5, 0.5


@dataclass(slots=True)
class Parts:
    """Milliseconds a token of one mesh, a sample a round. Owned by the bench's loop."""

    typical: list[float] = field(default_factory=list)
    """Median gap between tokens at the client."""
    token: list[float] = field(default_factory=list)
    """Mean, as the parts are."""
    trip: list[float] = field(default_factory=list)
    ways: list[float] = field(default_factory=list)
    stages: list[list[float]] = field(default_factory=list)

    def add(self, window: Window) -> None:
        self.typical.append(1e3 * statistics.median(window.gaps_s))
        self.token.append(1e3 * window.token_s)
        self.trip.append(1e3 * window.trip_s)
        self.ways.append(1e3 * window.transit_s)
        self.stages.append([1e3 * stage_s for stage_s in window.stage_s])

    @property
    def compute(self) -> list[float]:
        return [sum(stages) for stages in self.stages]

    def report(self, bench: Bench, name: str) -> None:
        report = bench.report
        report.add(f"a token at the client, {name}", self.typical, "ms (median gap)")
        report.add(f"  mean, {name}", self.token, "ms")
        for index, stage in enumerate(zip(*self.stages, strict=True)):
            report.add(f"  compute of stage {index}, {name}", list(stage), "ms")
        report.add(f"  on the way, {name}", self.ways, "ms")
        report.add(f"  batching, HTTP, client, {name}", differences(self.token, self.trip), "ms")


def hop_by_hop(bench: Bench) -> None:
    """One stream through 1 and 2 stages of one thread each, in turn."""
    with ExitStack() as stack:
        one = stack.enter_context(pipeline_of(bench, 1, 1))
        two = stack.enter_context(pipeline_of(bench, 2, 1))
        meshes = {"1 stage": one, "2 stages": two}
        note_idle(bench, meshes)
        processes = [
            stack.enter_context(StageProcess(bench.model_dir, tuple(stage["layers"])))
            for stage in stages_of(two)
        ]
        parts = {name: Parts() for name in meshes}
        alone: list[list[float]] = []
        in_turn: list[list[float]] = []
        for number in range(bench.n_rounds):
            for name, mesh in meshes.items():
                parts[name].add(ask_one(bench, mesh))
            alone.append([1e3 * process.step_s(1, 176, 20) for process in processes])
            in_turn.append(stages_in_turn(processes))
            progress(
                f"  round {number + 1}: " + ", ".join(f"{one.typical[-1]:.2f} ms" for one in parts.values())
            )
    report_parts(bench, parts, alone, in_turn)


def ask_one(bench: Bench, mesh: LocalMesh) -> Window:
    """One answer."""
    driver = driver_of(mesh)
    prompts = bench.prompts(1, PROMPT_TOKENS)
    return watch(driver, len(stages_of(mesh)), partial(dial, driver.url), prompts, OUTPUT_TOKENS)


def stages_in_turn(processes: list[StageProcess]) -> list[float]:
    """Each stage's step, the other's always before it: what a single stream makes of their caches."""
    times_s = [[process.step_s(1, 176, 1) for process in processes] for _ in range(20)]
    return [1e3 * statistics.median(stage) for stage in zip(*times_s, strict=True)]


def report_parts(
    bench: Bench, parts: dict[str, Parts], alone: list[list[float]], in_turn: list[list[float]]
) -> None:
    report, one, two = bench.report, parts["1 stage"], parts["2 stages"]
    for name, each in parts.items():
        each.report(bench, name)
    for index in range(len(alone[0])):
        report.add(f"  compute of stage {index} of 2, alone", [times[index] for times in alone], "ms")
        report.add(f"  compute of stage {index} of 2, in turn", [times[index] for times in in_turn], "ms")
    added = differences(two.typical, one.typical)
    best = min(two.typical) - min(one.typical)
    report.add("added stage, best rounds", best, "ms a token", at_most=ADDED_STAGE_MS)
    report.add(
        "added stage, median of rounds", statistics.median(added), "ms a token", at_most=ADDED_STAGE_MS
    )
    report.add("  of it more compute", differences(two.compute, one.compute), "ms")
    report.add("  of it more way", differences(two.ways, one.ways), "ms")
    hops = [ways / 2 for ways in two.ways]
    report.add("a hop, best round", min(hops), "ms", at_most=HOP_MS)
    report.add("a hop, median of rounds", statistics.median(hops), "ms", at_most=HOP_MS)


def differences(many: list[float], few: list[float]) -> list[float]:
    return [more - less for more, less in zip(many, few, strict=True)]
