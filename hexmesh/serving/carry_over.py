"""Which replicas a new plan leaves exactly as they are: those keep their KV, and what runs in them goes on."""

from __future__ import annotations

from hexmesh.plan import Plan


def carried_over(old: Plan, new: Plan) -> dict[str, str]:
    """Replicas of `new` that `old` has too, stage for stage on hosts that have not restarted: new id -> old id.

    Predictions do not count, nor do the ids, and no replica of `old` is carried over twice.
    """
    before: dict[object, list[str]] = {}
    for replica in old.replicas:
        before.setdefault((replica.role, old.placement_of(replica)), []).append(replica.id)
    carried = {}
    for replica in new.replicas:
        if candidates := before.get((replica.role, new.placement_of(replica))):
            carried[replica.id] = candidates.pop(0)
    return carried
