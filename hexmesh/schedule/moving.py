"""Whether a better plan is worth carrying out: what it gains over a while, against what moving costs."""

from __future__ import annotations

from collections import Counter

from hexmesh.plan import Plan

HORIZON_S = 600.0
"""A plan should pay for itself within this time: about as long as one can hope that nothing else changes."""
PAUSE_S = 2.0
"""For which a replica that moves gives nothing, beside loading: what ran in it is computed again elsewhere."""


def why_move(now: Plan, better: Plan, *, load_s: float, least_gain: float) -> str | None:
    """What `better` gains over the present replicas, in words; None where that does not pay for moving.

    Both with today's figures. A replica that moves is taken to give nothing while its weights are loaded, and for
    PAUSE_S.
    """
    before, after = _tokens_per_s(now), _tokens_per_s(better)
    lost_tokens = moved_tokens_per_s(now, better) * (load_s + PAUSE_S)
    is_same = lost_tokens == 0 and len(now.replicas) == len(better.replicas)
    if is_same or after < least_gain * before or (after - before) * HORIZON_S <= lost_tokens:
        return None
    return f"another layout gives {after:.4g} instead of {before:.4g} tokens/s"


def moved_tokens_per_s(now: Plan, better: Plan) -> float:
    """What those replicas of `now` give that are not in `better` as they are."""
    stay = Counter(better.placement_of(replica) for replica in better.replicas)
    moved = 0.0
    for replica in now.replicas:
        placement = now.placement_of(replica)
        if stay[placement]:
            stay[placement] -= 1
        else:
            moved += replica.predicted_tokens_per_s
    return moved


def _tokens_per_s(plan: Plan) -> float:
    return sum(replica.predicted_tokens_per_s for replica in plan.replicas if replica.role != "prefill")
