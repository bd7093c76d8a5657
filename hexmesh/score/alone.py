"""The most requests that replicas serve which hand nothing over: each its own, so the sum of what each does."""

from __future__ import annotations

from collections.abc import Sequence

from hexmesh.score.flow_program import Limit, ReplicaRates
from hexmesh.score.flows import FlowScore


def serve_alone(replicas: Sequence[ReplicaRates]) -> FlowScore:
    """As `best_flow` where hosts do neither prefill nor decode for others."""
    tightest = {replica.name: _tightest(replica) for replica in replicas if replica.role == "mixed"}
    rates = {replica.name: tightest.get(replica.name, (0.0, None))[0] for replica in replicas}
    total = sum(rates.values())
    return FlowScore(
        requests_per_s=total,
        prefill=rates,
        decode=rates,
        flows={(name, name): rate for name, rate in rates.items() if rate > 0},
        shares={limit: rate / total for rate, limit in tightest.values() if rate > 0},
    )


def _tightest(replica: ReplicaRates) -> tuple[float, Limit]:
    """The rate that it keeps up in both phases, and what limits it."""
    limits = [
        (1 / (prompt_s + output_s), Limit("mixed", f"{replica.name}/{part}"))
        for part, (prompt_s, output_s) in enumerate(replica.uses)
    ]
    limits += [
        (replica.prefill, Limit("prefill", replica.name)),
        (replica.decode, Limit("decode", replica.name)),
    ]
    return min(limits, key=lambda limit: limit[0])
