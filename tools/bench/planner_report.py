"""Tables and plots of the planner's benchmark, put into docs/benchmarks/planner.md between its marks.

The words around the tables are written by hand; `<!-- NAME -->` and `<!-- end -->` hold a table each.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hexmesh.planner.finalists import CLOSE
from tools.bench.planner_fleets import (
    DATA_CENTRES,
    SPEED_FLEETS,
    Planned,
    budget_s,
)
from tools.bench.planner_judging import SEEDS, Peak, peak_key
from tools.bench.planner_ratios import Results, len_of, ratios

GAP_GOAL = 0.05
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "planner.md"
SAME = 1 - 1e-6

Table = Callable[[Results], str]


def write(results: Results) -> None:
    """Fill the page in, and draw its plots beside it."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"{PAGE.name} has no place for {name}"
        body = table(results)
        text = mark.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")
    from tools.bench.planner_plots import draw

    draw(results, PAGE.parent)


def summary(results: Results) -> str:
    """All tables, for a terminal."""
    return "\n\n".join(f"{name}\n{table(results)}" for name, table in TABLES.items())


def planned(results: Results) -> list[Planned]:
    """The comparison's cells."""
    return [one for one in results.values() if isinstance(one, Planned) and not one.cell.is_speed]


def by_problem(results: Results) -> dict[str, dict[str, Planned]]:
    """Cells by problem and algorithm."""
    found = defaultdict[str, dict[str, Planned]](dict)
    for one in planned(results):
        found[one.cell.problem][one.cell.algorithm] = one
    return found


def rows(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdict(results: Results) -> str:
    """Whether auto is at least as good as everything else."""
    problems = [names for names in by_problem(results).values() if "auto" in names]
    against = [
        (names["auto"], other) for names in problems for name, other in names.items() if name != "auto"
    ]
    below = [(a, b) for a, b in against if a.requests_per_s < b.requests_per_s * SAME]
    worse = [(a, b) for a, b in below if a.requests_per_s < b.requests_per_s * (1 - CLOSE)]
    simulated, lost, noise = _by_simulator(results)
    lines = [
        f"- By the score `auto` is at least as good in {len(against) - len(below)} of {len(against)} comparisons "
        f"over {len(problems)} problems, less by up to {CLOSE:.0%} in {len(below) - len(worse)} (it lets the simulator "
        f"choose among drafts that close), less by more in {len(worse)}.",
        f"- By the simulator, of the {simulated} contenders that came within 10 % of it with another plan, "
        f"{len(lost)} beat it by more than the noise (two seeds of one plan differ by {noise:.1%} at most of problems'"
        " 95th percentile).",
    ]
    lines += [
        f"- By the score worse: {b.cell.key} gives {b.requests_per_s:.4g}, auto {a.requests_per_s:.4g} requests/s."
        for a, b in worse
    ]
    lines += [f"- By the simulator worse: {text}." for text in lost]
    return "\n".join(lines)


def _by_simulator(results: Results) -> tuple[int, list[str], float]:
    """(contenders, those that beat auto beyond noise, the noise)."""
    autos = dict[str, list[Peak]]()
    for problem, by_name in by_problem(results).items():
        if "auto" in by_name:
            runs = [results.get(peak_key(by_name["auto"].key, seed)) for seed in SEEDS]
            found = [run for run in runs if isinstance(run, Peak)]
            if found:
                autos[problem] = found
    spreads = sorted(
        abs(a.requests_per_s / b.requests_per_s - 1)
        for a, b in (runs for runs in autos.values() if len(runs) == 2)
    )
    noise = spreads[int(0.95 * (len(spreads) - 1))] if spreads else 0.0
    n, lost = 0, []
    for one in planned(results):
        run, of = results.get(peak_key(one.key, SEEDS[0])), autos.get(one.cell.problem)
        if one.cell.algorithm == "auto" or not isinstance(run, Peak) or of is None:
            continue
        n += 1
        best = max(peak.requests_per_s for peak in of)
        if run.requests_per_s > best * (1 + noise):
            lost.append(f"{one.key} {run.requests_per_s:.4g}, auto {best:.4g} requests/s")
    return n, lost, noise


def _values(results: Results) -> str:
    """Rates as shares of the best, by fleet: the mean over classes and models."""
    shares = defaultdict[tuple[str, str], list[float]](list)
    for members in by_problem(results).values():
        best = max(one.requests_per_s for one in members.values())
        for name, one in members.items():
            shares[one.cell.fleet, name].append(one.requests_per_s / best if best > 0 else 0.0)
    fleets = list(dict.fromkeys(fleet for fleet, _ in shares))
    names = list(dict.fromkeys(name for _, name in shares))
    return rows(
        ["fleet", "GPUs", *names],
        (
            [
                fleet,
                str(len_of(fleet)),
                *(
                    f"{statistics.fmean(shares[fleet, name]):.3f}" if (fleet, name) in shares else ""
                    for name in names
                ),
            ]
            for fleet in fleets
        ),
    )


def _gaps(results: Results) -> str:
    """What auto leaves to the bound."""
    gaps = defaultdict[str, list[float]](list)
    for one in planned(results):
        if one.cell.algorithm == "auto":
            gaps[one.cell.fleet].append(one.gap)
    return rows(
        ["fleet", "GPUs", "least", "mean", "greatest", "goal"],
        (
            [
                fleet,
                str(len_of(fleet)),
                f"{min(found):.1%}",
                f"{statistics.fmean(found):.1%}",
                f"{max(found):.1%}",
                ("5 %: " + ("holds" if max(found) <= GAP_GOAL else f"missed in {_over(found)}"))
                if fleet in DATA_CENTRES
                else "",
            ]
            for fleet, found in gaps.items()
        ),
    )


def _over(gaps: Sequence[float]) -> str:
    return f"{sum(gap > GAP_GOAL for gap in gaps)} of {len(gaps)}"


def _fidelity(results: Results) -> str:
    """The simulator's peak as a share of the score's, by fleet, of all plans simulated."""
    shares = defaultdict[str, list[float]](list)
    for one in results.values():
        if isinstance(one, Peak) and one.scored_requests_per_s > 0:
            shares[one.of.split("/")[0]].append(one.requests_per_s / one.scored_requests_per_s)
    return rows(
        ["fleet", "plans", "least", "median", "greatest"],
        (
            [
                fleet,
                str(len(found)),
                f"{min(found):.2f}",
                f"{statistics.median(found):.2f}",
                f"{max(found):.2f}",
            ]
            for fleet, found in shares.items()
        ),
    )


def _ratios(results: Results) -> str:
    return rows(
        ["", "what", "paper", "here", "direction", "band", "in numbers"],
        (
            [one.id, one.what, one.paper, one.found, _said(one.holds), _said(one.in_band), one.why]
            for one in ratios(results)
        ),
    )


def _said(claim: bool | None) -> str:
    return {True: "holds", False: "**not**", None: "-"}[claim]


def speed_runs(results: Results) -> dict[str, tuple[Planned, Planned]]:
    """By fleet: at its budget, and at ten times that."""
    found = dict[str, tuple[Planned, Planned]]()
    for fleet in SPEED_FLEETS:
        runs = {
            one.cell.budget_s: one
            for one in results.values()
            if isinstance(one, Planned) and one.cell.is_speed and one.cell.fleet == fleet
        }
        short, long = runs.get(budget_s(fleet)), runs.get(10 * budget_s(fleet))
        if short is not None and long is not None:
            found[fleet] = short, long
    return found


def _speed(results: Results) -> str:
    return rows(
        [
            "fleet",
            "GPUs",
            "first plan",
            "budget",
            "took",
            "requests/s",
            "at 10x",
            "share",
            "goal 99 %",
            "gap",
        ],
        (
            [
                fleet,
                str(len_of(fleet)),
                f"{short.trace[0][0]:.2f} s" if short.trace else "none",
                f"{short.cell.budget_s:g} s",
                f"{short.seconds:.1f} s",
                f"{short.requests_per_s:.4g}",
                f"{long.requests_per_s:.4g}",
                f"{_share(short, long):.3f}",
                _said(_share(short, long) >= 0.99),
                f"{short.gap:.1%}",
            ]
            for fleet, (short, long) in speed_runs(results).items()
        ),
    )


def _share(short: Planned, long: Planned) -> float:
    return short.requests_per_s / long.requests_per_s if long.requests_per_s > 0 else 0.0


TABLES: Mapping[str, Table] = {
    "verdict": _verdict,
    "values": _values,
    "gaps": _gaps,
    "fidelity": _fidelity,
    "ratios": _ratios,
    "speed": _speed,
}
