"""What whole replicas can do at most: never less than exhaustive search finds, and near a plan on one host."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from hexmesh.cluster import Cluster, Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.planner.algorithms import exhaustive
from hexmesh.planner.front import search
from hexmesh.planner.objective import Goodput, LeastCost, Throughput
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Problem
from hexmesh.planner.run import Run
from hexmesh.workload import CLASSES, Slo, Workload
from tests.unit.planner.small_fleets import cluster, problem

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
MIXED: frozenset[Role] = frozenset({"mixed"})
STRICT: frozenset[Role] = frozenset({"prefill", "decode"})


def _exhaustive(given: Problem) -> float:
    run = Run(problem=given, rng=random.Random(0), clock=lambda: 0.0, budget_s=1.0)
    exhaustive.search(run)
    return 0.0 if run.best is None else run.best.flow.requests_per_s


@pytest.mark.parametrize("roles", [frozenset(ROLES), MIXED, STRICT], ids=["free", "mixed", "strict"])
@pytest.mark.parametrize("seed", range(500, 506))
def test_no_plan_beats_it(seed: int, roles: frozenset[Role]) -> None:
    rng = random.Random(seed)
    given = problem(cluster(rng, rng.randint(2, 4), 5), 5, roles=roles)
    limited = replace(
        given,
        objective=Goodput(),
        workload=msgspec.structs.replace(given.workload, slo=Slo(ttft_s=2.0, tpot_s=0.1)),
    )
    for one in (given, limited):
        assert _exhaustive(one) <= one.near_bound_requests_per_s * (1 + 1e-9)
        assert one.near_bound_requests_per_s <= one.bound_requests_per_s


def _one_host(n_devices: int) -> Cluster:
    """The first devices of eight H100 in a host."""
    fleet = cluster_of(read_fleet((FLEETS / "hexgen2-h100.toml").read_text(encoding="utf-8")), "float16")
    [node] = fleet.nodes
    return Cluster(nodes=(msgspec.structs.replace(node, devices=node.devices[:n_devices]),), links=())


def _long_requests(n_devices: int) -> Problem:
    return Problem(
        cluster=_one_host(n_devices),
        spec=model_spec_from_config(dict(KNOWN["Llama-2-70B"])),
        dtype="float16",
        workload=Workload.of(CLASSES["HPHD"]),
        objective=Throughput(),
    )


def test_whole_replicas_bring_the_bound_near_a_plan_for_one_host() -> None:
    given = _long_requests(8)
    found = search(given, "columns", seed=1, clock=lambda: 0.0)
    assert found.best is not None
    assert found.best.flow.requests_per_s > 0.96 * found.bound
    assert found.bound < 0.97 * given.bound_requests_per_s
    assert found.gap == pytest.approx(1 - found.best.flow.requests_per_s / found.bound)
    assert found.bound_requests_per_s == found.bound


def test_a_device_more_never_lowers_it() -> None:
    bounds = [_long_requests(n).near_bound_requests_per_s for n in range(1, 6)]
    assert f"{bounds[0]}" == "0.0"
    assert all(before <= after * (1 + 3e-6) for before, after in pairwise(bounds))


def test_it_is_left_out_where_it_says_nothing() -> None:
    """For other objectives, for many teams, and where hosts have roles."""
    given = _long_requests(8)
    cheap = search(replace(given, objective=LeastCost(1.0)), "greedy", seed=1, clock=lambda: 0.0)
    assert cheap.bound_requests_per_s == given.bound_requests_per_s
    [node] = given.cluster.nodes
    decoding = Cluster(nodes=(msgspec.structs.replace(node, roles=("mixed", "decode")),), links=())
    one = replace(given, cluster=decoding)
    assert one.near_bound_requests_per_s == one.bound_requests_per_s
