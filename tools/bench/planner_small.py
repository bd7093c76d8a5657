"""How close searches come to exhaustive search, on seeded clusters of 2 to 8 devices.

Clusters are drawn: one to three hosts of one or two kinds of devices, 30 % at two sites, NICs of 1 to 100 Gbit/s; with
free roles, strict roles, and a limit of the time per token in turn. `auto` must equal exhaustive search in all cases;
the way that large fleets are planned ("large", without its simulations) is run on the same ones, and two of its parts.

`auto` goes on from what "large" found, so the two are one search with a look in between.

A run writes one JSON line a result and goes on where it stopped. Run:
`python -m tools.bench.planner_small [--cases 300] [--algorithms auto,large,columns,annealing] [--jobs 2] [--fresh]`
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import msgspec

from hexmesh.cluster import Cluster, Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.planner.algorithms import auto
from hexmesh.planner.algorithms.exhaustive import SMALL
from hexmesh.planner.front import ALGORITHMS
from hexmesh.planner.objective import Goodput, Throughput
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.workload import Slo, Workload
from tools.bench.report import progress

Stage = tuple[str, Callable[[Run], None]]

RESULTS = Path("build") / "planner_small.jsonl"
REFERENCE = "exhaustive"
COMPARED = ("auto", "large", "columns", "annealing")
STAGES: dict[str, tuple[Stage, ...]] = {
    **{name: ((name, search),) for name, search in ALGORITHMS.items()},
    **dict.fromkeys(("large", "auto"), (("large", auto.search_by_score), ("auto", auto.conclude))),
}
"""What is done for a name: searches one after the other, each with a name for what was found until then."""
N_CASES = 300
KINDS = ("free", "strict", "tpot")
MODELS = ("Llama-2-70B", "OPT-30B", "Llama-2-13B")
DEVICES = ("H100-SXM", "A100-SXM-80GB", "L40", "RTX-A6000", "A100-SXM-40GB", "RTX 4090", "L4")
NICS_GBIT = (1, 2.5, 10, 25, 100)
ROOM = {"free": 1.25, "tpot": 1.25, "strict": 2.5}
"""Memory of a drawn cluster, at least, in weights of its model: strict roles need two copies."""
BUDGET_S = 60.0
"""Of processor time, for one search; none needs it."""
WITHIN = 0.99
EQUAL = 1 - 2e-6


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a search found for a case."""

    case: int
    kind: str
    n_devices: int
    algorithm: str
    requests_per_s: float
    elapsed_s: float
    notes: tuple[str, ...]


def main() -> None:
    """The table on stdout."""
    arguments = _arguments()
    path: Path = arguments.results
    path.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        path.unlink(missing_ok=True)
    known = read(path)
    algorithms = [name for name in arguments.algorithms.split(",") if name in STAGES]
    missing = {
        case: [name for name in (REFERENCE, *algorithms) if (case, name) not in known]
        for case in range(arguments.cases)
    }
    with ProcessPoolExecutor(arguments.jobs) as pool, path.open("ab") as file:
        asked = [pool.submit(outcomes, case, names) for case, names in missing.items() if names]
        for n_done, done in enumerate(as_completed(asked), start=1):
            for found in done.result():
                known[found.case, found.algorithm] = found
                file.write(msgspec.json.encode(found) + b"\n")
            file.flush()
            progress(f"{n_done} of {len(asked)} cases")
    kept = [found for (case, _), found in sorted(known.items()) if case < arguments.cases]
    print("\n".join(table(kept, algorithms)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=N_CASES)
    parser.add_argument("--algorithms", default=",".join(COMPARED), help="separated by commas")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where results are kept, a JSON line each"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, each on a processor of its own")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    return parser.parse_args()


def read(path: Path) -> dict[tuple[int, str], Outcome]:
    """What earlier runs found; a line that was cut off is left out."""
    found = dict[tuple[int, str], Outcome]()
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            one = msgspec.json.decode(line, type=Outcome)
        except msgspec.DecodeError:
            continue
        found[one.case, one.algorithm] = one
    return found


def outcomes(case: int, names: Sequence[str]) -> list[Outcome]:
    """What those searches find for a case, each from nothing."""
    wanted = dict.fromkeys(STAGES[name] for name in names)
    return [found for stages in wanted for found in _outcomes(case, stages) if found.algorithm in names]


def _outcomes(case: int, stages: Sequence[Stage]) -> Iterator[Outcome]:
    problem = problem_of(case)
    run = Run(problem=problem, rng=random.Random(case), clock=time.process_time, budget_s=BUDGET_S)
    for name, search in stages:
        search(run)
        yield Outcome(
            case=case,
            kind=KINDS[case % len(KINDS)],
            n_devices=sum(pool.size for pool in problem.pools),
            algorithm=name,
            requests_per_s=max((one.flow.requests_per_s for one in run.best_by.values()), default=0.0),
            elapsed_s=run.elapsed_s,
            notes=tuple(run.notes),
        )


def problem_of(case: int) -> Problem:
    """The case of that number; the same one always."""
    rng, kind = random.Random(case), KINDS[case % len(KINDS)]
    while True:
        n_devices = rng.randint(2, SMALL)
        spec = model_spec_from_config(KNOWN[rng.choice(MODELS)])
        cluster = cluster_of(read_fleet("\n".join(fleet_lines(rng, n_devices))), "float16")
        if _room_bytes(cluster) >= ROOM[kind] * 2 * spec.n_params:
            return _problem(rng, kind, cluster, spec)


def _room_bytes(cluster: Cluster) -> int:
    return sum(device.budget_bytes for node in cluster.nodes for device in node.devices)


def _problem(rng: random.Random, kind: str, cluster: Cluster, spec: ModelSpec) -> Problem:
    prompt, output = rng.choice([(512, 128), (1024, 64), (256, 256)])
    strict: frozenset[Role] = frozenset({"prefill", "decode"})
    slo = Slo(tpot_s=rng.choice([0.05, 0.1, 0.2])) if kind == "tpot" else Slo()
    return Problem(
        cluster=cluster,
        spec=spec,
        dtype="float16",
        workload=Workload(prompt_tokens=prompt, output_tokens=output, slo=slo),
        objective=Goodput() if kind == "tpot" else Throughput(),
        roles=strict if kind == "strict" else frozenset(ROLES),
    )


def fleet_lines(rng: random.Random, n_devices: int) -> Iterator[str]:
    """A cluster file."""
    n_hosts = rng.randint(1, min(3, n_devices))
    cuts = [0, *sorted(rng.sample(range(1, n_devices), n_hosts - 1)), n_devices]
    two_sites = n_hosts > 1 and rng.random() < 0.3
    yield 'name = "drawn"'
    yield "[defaults]"
    yield f'nic = "{rng.choice(NICS_GBIT)}Gbit/s"'
    if two_sites:
        yield f'wan_rate = "{rng.choice([0.2, 1, 5])}Gbit/s"'
        yield f'wan_rtt = "{rng.choice([10, 30, 80])}ms"'
    for at in range(n_hosts):
        yield "[[host]]"
        yield f'name = "h{at}"'
        yield f'site = "{"far" if two_sites and at == n_hosts - 1 else "near"}"'
        kinds = [rng.choice(DEVICES) for _ in range(rng.randint(1, 2))]
        drawn = [rng.choice(kinds) for _ in range(cuts[at + 1] - cuts[at])]
        devices = ", ".join(
            f'{{ type = "{kind}", count = {drawn.count(kind)} }}' for kind in dict.fromkeys(drawn)
        )
        yield f"devices = [{devices}]"


def table(outcomes: Sequence[Outcome], algorithms: Sequence[str]) -> Iterator[str]:
    """Shares of the exhaustive rate by algorithm and kind, and every case that is not within 1 %."""
    best = {one.case: one.requests_per_s for one in outcomes if one.algorithm == REFERENCE}
    yield (
        "| algorithm | cases | n | within 1 % | equal | better | least | 1st percentile | mean s | longest s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in (REFERENCE, *algorithms):
        for kind in (*KINDS, "all"):
            own = [one for one in outcomes if one.algorithm == name and kind in (one.kind, "all")]
            if own:
                yield _row(name, kind, own, best)
    notes = [one.notes for one in outcomes if one.algorithm == REFERENCE]
    coarse = sum(any("too many layouts" in note for note in own) for own in notes)
    ended = sum(any("ended before" in note for note in own) for own in notes)
    yield f"\n{coarse} cases have teams with more layouts than were all tried (`every_layout.MOST_LAYOUTS`),"
    yield f"{ended} ended before all partitions were looked into."
    for one in outcomes:
        if one.algorithm != REFERENCE and best[one.case] > 0 and one.requests_per_s < WITHIN * best[one.case]:
            ratio = one.requests_per_s / best[one.case]
            yield f"case {one.case} ({one.kind}, {one.n_devices} devices): {one.algorithm} {ratio:.4f}"


def _row(name: str, kind: str, own: Sequence[Outcome], best: dict[int, float]) -> str:
    """Cases that nothing can serve are left out of the ratios."""
    ratios = sorted(one.requests_per_s / best[one.case] for one in own if best[one.case] > 0)
    first = ratios[len(ratios) // 100]
    times = [one.elapsed_s for one in own]
    shares = [sum(map(test, ratios)) / len(ratios) for test in (_is_close, _is_equal, _is_better)]
    return (
        f"| {name} | {kind} | {len(ratios)} | {shares[0]:.1%} | {shares[1]:.1%} | {shares[2]:.1%} | {ratios[0]:.4f} "
        f"| {first:.4f} | {statistics.fmean(times):.2f} | {max(times):.1f} |"
    )


def _is_close(ratio: float) -> bool:
    return ratio >= WITHIN


def _is_equal(ratio: float) -> bool:
    return ratio >= EQUAL


def _is_better(ratio: float) -> bool:
    return ratio > 2 - EQUAL


if __name__ == "__main__":
    main()
