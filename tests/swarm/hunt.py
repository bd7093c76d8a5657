"""Runs many seeded schedules and tells which break a rule: python -m tests.swarm.hunt --schedules 10000.

A violation is printed with its seed; `--schedules 1 --first-seed SEED` runs that schedule again. The exit code
is 1 if any invariant broke or any mesh did not heal in time.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.swarm.schedule import Case, Outcome

PROGRESS_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A schedule that broke an invariant, or in which a machine raised."""

    seed: int
    what: str


def run_case(seed: int) -> Outcome | Finding:
    try:
        return Case.draw(seed).run()
    except AssertionError as violation:
        return Finding(seed, str(violation) or traceback.format_exc())
    except Exception:  # a worker reports whatever its schedule did, and goes on
        return Finding(seed, traceback.format_exc())


@dataclass(slots=True)
class Bag:
    """Owner of what was found so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def put(self, result: Outcome | Finding) -> None:
        if isinstance(result, Finding):
            self.findings.append(result)
            print(f"VIOLATION seed={result.seed}: {result.what}", flush=True)
        else:
            self.outcomes.append(result)
            if result.healed_s is None:
                print(f"NOT HEALED seed={result.seed} n_hosts={result.n_hosts}", flush=True)

    @property
    def n_never(self) -> int:
        return sum(outcome.healed_s is None for outcome in self.outcomes)

    @property
    def is_clean(self) -> bool:
        return not self.findings and not self.n_never

    def progress(self) -> str:
        n_run = len(self.outcomes) + len(self.findings)
        return f"{n_run} schedules, {len(self.findings)} violations, {self.n_never} not healed"

    def table(self) -> str:
        """Seconds from the end of the faults until the mesh was whole and stayed so, by kind of schedule."""
        kinds: list[tuple[str, Callable[[Case], bool]]] = [
            ("all", lambda case: True),
            ("2 hosts", lambda case: case.n_hosts == 2),
            ("3-5 hosts", lambda case: 3 <= case.n_hosts <= 5),
            ("6-9 hosts", lambda case: case.n_hosts >= 6),
            ("no pauses, no listening", lambda case: not case.faults.pauses and case.habits.listen_s is None),
            ("listening up to 3 s", lambda case: not case.faults.pauses and case.habits.listen_s is not None),
            ("pauses up to 6 s", lambda case: case.faults.pauses),
            ("cut links relayed", lambda case: case.habits.relays),
            ("clocks up to 20 % off", lambda case: case.habits.drift == 0.2),
        ]
        lines = ["| set | schedules | never | p50 | p95 | p99 | max, s |", "|---|---|---|---|---|---|---|"]
        cases = {outcome.seed: Case.draw(outcome.seed) for outcome in self.outcomes}
        for name, is_in in kinds:
            lines.append(_row(name, [o.healed_s for o in self.outcomes if is_in(cases[o.seed])]))
        return "\n".join(lines)

    def totals(self) -> str:
        counts = [outcome.counts for outcome in self.outcomes]
        return (
            f"{sum(c.n_events for c in counts):,} events judged, {sum(c.n_messages for c in counts):,} messages, "
            f"{sum(c.n_plans for c in counts):,} plans, {sum(c.n_commits for c in counts):,} host commits, "
            f"{sum(c.n_finished for c in counts):,} of {sum(c.n_requests for c in counts):,} requests finished"
        )


def _row(name: str, healed_s: list[float | None]) -> str:
    times_s = sorted(time_s for time_s in healed_s if time_s is not None)
    if not times_s:
        return f"| {name} | {len(healed_s)} | {len(healed_s)} | | | | |"
    marks = [times_s[max(0, math.ceil(share * len(times_s)) - 1)] for share in (0.5, 0.95, 0.99, 1.0)]
    figures = " | ".join(f"{mark_s:.2f}" for mark_s in marks)
    return f"| {name} | {len(healed_s)} | {len(healed_s) - len(times_s)} | {figures} |"


def hunt(results: Iterable[Outcome | Finding], limit_s: float = math.inf) -> Bag:
    """Gather results until they end or time is up."""
    bag = Bag()
    started_s = told_s = time.monotonic()
    for result in results:
        bag.put(result)
        if time.monotonic() - started_s > limit_s:
            break
        if time.monotonic() - told_s > PROGRESS_S:
            told_s = time.monotonic()
            print(f"{told_s - started_s:5.0f} s: {bag.progress()}", file=sys.stderr, flush=True)
    return bag


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="stop after so long, and report")
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.schedules)
    with multiprocessing.Pool(options.processes) as pool:
        bag = hunt(pool.imap_unordered(run_case, seeds, chunksize=8), options.limit_s)
    print(f"seeds {seeds.start}-{seeds.stop - 1}: {bag.progress()}\n{bag.totals()}\n\n{bag.table()}")
    return 0 if bag.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
