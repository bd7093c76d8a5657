"""How long the best layout of a team takes to find, and whether it is the best (`hexmesh.planner.layouts`).

Teams are of Llama-2-70B (512 tokens in, 128 out) in one site; times are CPU seconds of one call on a fresh search, all
tables made, the least of the rounds. With `--brute N` also N small random groups against trying every layout.
Run: `python -m tools.bench.layouts [--brute 2000] [--first SEED] [--twin] [--quick] [--json]`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.native import load
from hexmesh.planner.layouts import Layouts
from hexmesh.planner.pools import ROLES, Team, pools_of
from hexmesh.score import Capacities
from hexmesh.workload import Slo, Workload
from tools.bench.layout_groups import brute_rate, random_scene, whole
from tools.bench.report import Report, bench_arguments, print_report, progress

LLAMA_2_70B = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
)
KINDS = ("H100-SXM", "A100-SXM-80GB", "L40", "RTX-A6000")
Hosts = Sequence[Sequence[tuple[str, int]]]
"""Of each host, its devices by type."""
TEAMS: dict[str, tuple[Hosts, dict[str, float]]] = {
    "8, 1 type": ([[(KINDS[1], 8)]], {"prefill": 0.3e-3, "decode": 2e-3}),
    "8, 4 types": ([[(kind, 2)] for kind in KINDS], {"prefill": 0.3e-3}),
    "16, 1 type": ([[(KINDS[1], 8)]] * 2, {"prefill": 0.3e-3}),
    "16, 4 types": ([[(kind, 4)] for kind in KINDS], {"prefill": 0.3e-3, "decode": 30e-3}),
    "32, 1 type in 4 hosts": ([[(KINDS[1], 8)]] * 4, {"prefill": 0.3e-3}),
    "32, 4 types in 4 hosts": ([[(kind, 8)] for kind in KINDS], {"prefill": 0.3e-3, "decode": 80e-3}),
    "32, 4 types in 8 hosts": ([[(kind, 4)] for kind in (*KINDS, *KINDS)], {"prefill": 0.3e-3}),
    "32, 32 hosts of 4 types": ([[(kind, 1)] for kind in KINDS for _ in range(8)], {}),
}
LIMITS = {"no limit": Slo(), "TPOT 0.1 s": Slo(tpot_s=0.1)}


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--brute", type=int, default=0, metavar="N", help="groups to try every layout of")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the groups' seeds")
    parser.add_argument("--twin", action="store_true", help="the Python twin, not the compiled kernel")
    arguments = parser.parse_args()
    compiled = not arguments.twin and load("layout") is not None
    kernel = "compiled" if compiled else "Python"
    report = Report(name="layouts", method=f"{kernel} kernel; CPU time of one solve, least of the rounds")
    for limits, slo in LIMITS.items():
        for name, (hosts, goals) in TEAMS.items():
            progress(f"{name}, {limits}")
            bench_team(report, f"{name}, {limits}", hosts, slo, goals if compiled else {}, arguments.quick)
    if arguments.brute:
        compare(report, range(arguments.first, arguments.first + arguments.brute))
    print_report(report, "json" if arguments.json else "text")
    return 0 if all(figure.holds is not False for figure in report.figures.values()) else 1


def bench_team(
    report: Report, name: str, hosts: Hosts, slo: Slo, goals: dict[str, float], quick: bool
) -> None:
    """Seconds of every role."""
    cluster = cluster_with(hosts)
    pools = pools_of(cluster, LLAMA_2_70B)
    capacities = Capacities(CostModel(LLAMA_2_70B, "float16", 16, StepLimits()), Workload(slo=slo))
    for role in ROLES:
        least_s = min(
            solve_s(Layouts(cluster, pools, capacities), whole(pools), role) for _ in range(2 if quick else 5)
        )
        report.add(
            f"{name}: {role}", least_s * 1e3, "ms", at_most=goals[role] * 1e3 if role in goals else None
        )


def solve_s(layouts: Layouts, team: Team, role: str) -> float:
    started_s = time.process_time()
    layouts.best(team, next(one for one in ROLES if one == role))
    return time.process_time() - started_s


def cluster_with(hosts: Hosts) -> Cluster:
    """The hosts in one site, with NICs of 100 Gbit/s."""
    text = ['name = "team"', "[defaults]", 'nic = "100Gbit/s"']
    for at, devices in enumerate(hosts):
        listed = ", ".join(f'{{ type = "{kind}", count = {n} }}' for kind, n in devices)
        text += ["[[host]]", f'name = "h{at}"', f"devices = [{listed}]"]
    return cluster_of(read_fleet("\n".join(text)), "float16")


def compare(report: Report, seeds: range) -> None:
    """Small groups against trying every layout; a difference is named on stderr."""
    n_compared = n_possible = n_equal = 0
    for seed in seeds:
        scene = random_scene(seed)
        layouts, team = scene.layouts(), whole(scene.pools)
        for role in ROLES:
            layout, best = layouts.best(team, role), brute_rate(scene, role)
            rate = 0.0 if layout is None else layout.requests_per_s
            is_equal = abs(rate - best) <= 1e-8 * best
            n_compared, n_possible, n_equal = n_compared + 1, n_possible + (best > 0), n_equal + is_equal
            if not is_equal:
                progress(f"seed {seed}, {role}: {rate} requests/s, and {best} are possible")
        if seed % 100 == 99:
            progress(f"{seed + 1 - seeds.start} groups, {n_compared - n_equal} differences")
    report.add("solves compared with brute force", n_compared, "solves")
    report.add("of them with a layout at all", n_possible, "solves")
    report.add("equal to brute force", n_equal / n_compared, "share", at_least=1.0)


if __name__ == "__main__":
    sys.exit(main())
