"""The analytic score of a plan over a cluster: what its replicas do together in steady state."""

from __future__ import annotations

from collections.abc import Iterable

from hexmesh.cluster import Cluster
from hexmesh.plan import DTYPE_BYTES, Replica
from hexmesh.score.capacity import Capacities
from hexmesh.score.flows import FlowScore, ReplicaRates, best_flow
from hexmesh.score.pipeline import pipeline_of


def score_replicas(replicas: Iterable[Replica], cluster: Cluster, capacities: Capacities) -> FlowScore:
    """The most requests per second that a plan's replicas serve, within the workload's limits.

    Raises InvalidInput where a replica uses a link or a fabric that the cluster does not have.
    """
    rates = [replica_rates(replica, cluster, capacities) for replica in replicas]
    return best_flow(rates, cluster, kv_layer_bytes(capacities))


def replica_rates(replica: Replica, cluster: Cluster, capacities: Capacities) -> ReplicaRates:
    """What one replica does at most in its role. A mixed one that cannot do both in time does prompts alone."""
    pipeline, role = pipeline_of(replica.stages, cluster), replica.role
    uses = capacities.mixed(pipeline).uses if role == "mixed" else ()
    decodes = role == "decode" or len(uses) > 0
    return ReplicaRates(
        name=replica.id,
        role=role,
        prefill=capacities.prefill(pipeline).requests_per_s if role != "decode" else 0.0,
        decode=capacities.decode(pipeline).requests_per_s if decodes else 0.0,
        stages=replica.stages,
        uses=uses,
    )


def kv_layer_bytes(capacities: Capacities) -> float:
    """KV of a mean prompt in one layer: what a handoff sends."""
    costs = capacities.costs
    return capacities.workload.prompt_tokens * costs.spec.kv_values_per_token * DTYPE_BYTES[costs.dtype]
