"""Problems over the fleets of docs/fleets."""

from __future__ import annotations

from pathlib import Path

from hexmesh.cluster import Role
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import KNOWN
from hexmesh.planner.objective import Throughput
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Problem
from hexmesh.workload import Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"


def named_problem(
    fleet: str, model: str = "Llama-2-70B", roles: frozenset[Role] = frozenset(ROLES)
) -> Problem:
    """Throughput of prompts of 512 and outputs of 128 tokens."""
    return Problem(
        cluster=cluster_of(read_fleet((FLEETS / f"{fleet}.toml").read_text(encoding="utf-8")), "float16"),
        spec=model_spec_from_config(dict(KNOWN[model])),
        dtype="float16",
        workload=Workload(),
        objective=Throughput(),
        roles=roles,
    )
