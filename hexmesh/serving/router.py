"""Which replica gets a request: the one that serves it fastest, among those that are whole.

A replica's load is its requests, this one included, by its predicted rate. Loads within NEAR of the least are
equal, being below what predictions tell apart: a replica that the asking node drives itself wins then, else
chance, so that gateways that know nothing of each other's newest requests do not all choose the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Set

from hexmesh.plan import Plan, Replica

NEAR = 1.1


def broken_stages(replica: Replica, lost_nodes: Set[str]) -> list[str]:
    """The nodes of this replica that are known to be gone."""
    return [stage.node for stage in replica.stages if stage.node in lost_nodes]


def whole_replicas(plan: Plan, lost_nodes: Set[str]) -> list[Replica]:
    """The replicas whose nodes all answer."""
    return [replica for replica in plan.replicas if not broken_stages(replica, lost_nodes)]


def choose_replica(
    plan: Plan,
    *,
    n_requests: Mapping[str, int],
    lost_nodes: Set[str],
    avoid: Set[str],
    here: str,
    rng: random.Random,
) -> Replica | None:
    """The replica to send a request to from node `here`; None when every replica lacks a stage.

    `n_requests` run or wait in each replica, by id. One to `avoid` is taken if there is no other.
    """
    whole = whole_replicas(plan, lost_nodes)
    wanted = [replica for replica in whole if replica.id not in avoid] or whole
    if not wanted:
        return None
    loads = {
        replica.id: (n_requests.get(replica.id, 0) + 1) / replica.predicted_tokens_per_s for replica in wanted
    }
    least = min(loads.values())
    near = [replica for replica in wanted if loads[replica.id] <= NEAR * least]
    local = [replica for replica in near if replica.driver == here]
    return rng.choice(local or near)
