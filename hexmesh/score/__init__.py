"""What replicas can do at best, in steady state: the analytic score that searches compare layouts by.

`Capacities` rates one replica in each role, `best_flow` puts replicas together, `score_replicas` does both for a plan.
"""

from hexmesh.score.bound import Density, density_of, latency_bound, price_bound
from hexmesh.score.capacity import Capacities, Decode, Mixed, Prefill, Residency
from hexmesh.score.flows import FlowScore, Held, Limit, ReplicaRates, best_flow, handoff_bytes
from hexmesh.score.fluid import fluid_bound
from hexmesh.score.pipeline import Hop, Pipeline, Seat, pipeline_of
from hexmesh.score.plan_score import replica_rates, score_replicas

__all__ = [
    "Capacities",
    "Decode",
    "Density",
    "FlowScore",
    "Held",
    "Hop",
    "Limit",
    "Mixed",
    "Pipeline",
    "Prefill",
    "ReplicaRates",
    "Residency",
    "Seat",
    "best_flow",
    "density_of",
    "fluid_bound",
    "handoff_bytes",
    "latency_bound",
    "pipeline_of",
    "price_bound",
    "replica_rates",
    "score_replicas",
]
