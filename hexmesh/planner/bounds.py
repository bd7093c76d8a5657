"""What no plan for a problem can beat, by what its objective looks at."""

from __future__ import annotations

from hexmesh.planner.objective import Latency, LeastCost
from hexmesh.planner.problem import Problem
from hexmesh.score import latency_bound, price_bound


def bound_for(problem: Problem) -> float:
    """The most requests per second; for the least cost the least price per hour, for latency the least seconds."""
    match problem.objective:
        case LeastCost(requests_per_s):
            return price_bound(problem.cluster, problem.capacities, requests_per_s, problem.roles)
        case Latency():
            return latency_bound(problem.cluster, problem.capacities)
        case _:
            return problem.near_bound_requests_per_s
