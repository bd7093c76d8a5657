"""Which hosts a plan may use by their own word, and when that word makes the present plan wrong.

As with Nomad's eligibility and drain: a cordon places nothing new and moves nothing; a drain moves what is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from hexmesh.cluster import Availability, Cluster
from hexmesh.plan import Plan, Unused

Word = Mapping[str, Availability]
"""What hosts say of themselves, by node id."""

WHY_BARRED: Mapping[Availability, str] = {
    "cordoned": "cordoned by the operator",
    "drained": "drained by the operator",
    "leaving": "its node is leaving",
    "left": "its node left the mesh",
}
_MOVES_AWAY: Mapping[Availability, str] = {
    "drained": "drained by the operator",
    "leaving": "is leaving",
    "left": "left",
}


def barred_hosts(word: Word) -> frozenset[str]:
    """Hosts on which nothing new may be placed."""
    return frozenset(node for node, availability in word.items() if availability != "active")


def kept_hosts(word: Word, current: Plan | None) -> frozenset[str]:
    """Cordoned hosts that hold stages now: they may go on where the model fits nowhere else."""
    if current is None:
        return frozenset()
    busy = current.hosts.keys() - current.idle_hosts()
    return frozenset(node for node in busy if word.get(node) == "cordoned")


def with_barred(plan: Plan, word: Word, barred: Iterable[str], cluster: Cluster) -> Plan:
    """The plan with the hosts that it was not to use, and why, for each of their devices in `cluster`."""
    left_out = frozenset(barred)
    unused = tuple(
        Unused(node=node.id, device=device.index, reason=WHY_BARRED[word[node.id]])
        for node in cluster.nodes
        if node.id in left_out
        for device in node.devices
    )
    return msgspec.structs.replace(plan, barred=tuple(sorted(left_out)), unused=(*plan.unused, *unused))


def why_outdated(plan: Plan, word: Word) -> str | None:
    """Why the plan must be replaced now; None while it may stay. `word` is of hosts still in the plan."""
    busy = plan.hosts.keys() - plan.idle_hosts()
    reasons = [
        f"node {node} {_MOVES_AWAY[availability]}"
        for node, availability in sorted(word.items())
        if node in busy and availability in _MOVES_AWAY
    ]
    reasons += [
        f"node {node} uncordoned by the operator" for node in plan.barred if word.get(node) == "active"
    ]
    return "; ".join(reasons) or None
