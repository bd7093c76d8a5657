"""Which replica gets a request: the least loaded among those that are whole and have a place in their queue.

What is known of a replica's work is its driver's last word and what this gateway itself has sent there since. One
whose KV pool has room for the request now comes before one where it would wait for room. Among those a load is the
replica's requests, this one included, by its rate. Loads within NEAR of the least are equal, being below what
figures tell apart: a replica that the asking node drives itself wins then, else chance, so that gateways that know
nothing of each other's newest requests do not all choose the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from hexmesh.plan import Plan, Replica
from hexmesh.wire.data import ReplicaStats

NEAR = 1.1
STALE_S = 5.0
"""A driver's word is told once a second; one this old says nothing of its queue any more."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What a gateway has under way in a replica."""

    n_requests: int = 0
    n_new: int = 0
    """Those of them sent since the driver's last word."""
    new_tokens: int = 0
    """What the KV of the new ones takes to begin with."""


NOTHING_SENT = Sent()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What is known of a replica's work. What is None is not known."""

    n_requests: int = 0
    n_waiting: int = 0
    queue_room: int | None = None
    """Requests that it takes yet."""
    kv_room_tokens: int | None = None
    """Tokens that its KV pool takes at once; 0 where requests wait for room already."""
    tokens_per_s: float = 0.0
    tokens_left: int = 0

    @property
    def is_full(self) -> bool:
        return self.queue_room is not None and self.queue_room <= 0


NOTHING_KNOWN = ReplicaLoad()


def load_of(
    stats: ReplicaStats | None, age_s: float, block_tokens: int, sent: Sent = NOTHING_SENT
) -> ReplicaLoad:
    """A replica's load, from its driver's last word and its age."""
    if stats is None or age_s > STALE_S:
        return ReplicaLoad(n_requests=sent.n_requests)
    n_known = stats.requests_running + stats.requests_waiting
    kv_room_tokens = stats.kv_blocks_free * block_tokens - sent.new_tokens
    return ReplicaLoad(
        n_requests=max(n_known + sent.n_new, sent.n_requests),
        n_waiting=stats.requests_waiting,
        queue_room=stats.queue_room - sent.n_new,
        kv_room_tokens=0 if stats.requests_waiting else max(0, kv_room_tokens),
        tokens_per_s=stats.tokens_per_s,
        tokens_left=stats.tokens_left,
    )


def broken_stages(replica: Replica, lost_nodes: Set[str]) -> list[str]:
    """The nodes of this replica that are known to be gone."""
    return [stage.node for stage in replica.stages if stage.node in lost_nodes]


def whole_replicas(plan: Plan, lost_nodes: Set[str]) -> list[Replica]:
    """The replicas whose nodes all answer."""
    return [replica for replica in plan.replicas if not broken_stages(replica, lost_nodes)]


def choose_replica(
    plan: Plan,
    *,
    loads: Mapping[str, ReplicaLoad],
    n_tokens: int,
    lost_nodes: Set[str],
    avoid: Set[str],
    here: str,
    rng: random.Random,
    may_wait: bool = False,
) -> Replica | None:
    """The replica to send a request of so many tokens to from node `here`.

    None when every replica lacks a stage; or is full, unless the request `may_wait` for a place. One to `avoid` is
    taken if there is no other.
    """
    whole = whole_replicas(plan, lost_nodes)
    wanted = [replica for replica in whole if replica.id not in avoid]
    taking = _with_place(wanted, loads) or _with_place(whole, loads) or (wanted or whole if may_wait else [])
    if not taking:
        return None
    candidates = [one for one in taking if _has_kv_room(_load(loads, one), n_tokens)] or taking
    delays = {replica.id: _delay(replica, _load(loads, replica)) for replica in candidates}
    least = min(delays.values())
    near = [replica for replica in candidates if delays[replica.id] <= NEAR * least]
    local = [replica for replica in near if replica.driver == here]
    return rng.choice(local or near)


def retry_after_s(loads: Iterable[ReplicaLoad]) -> float:
    """When a place should be free where all are full: when the first replica ends a request, at its rate."""
    soonest = min((_time_of_one_s(load) for load in loads), default=MIN_RETRY_S)
    return min(MAX_RETRY_S, max(MIN_RETRY_S, soonest))


def _time_of_one_s(load: ReplicaLoad) -> float:
    """For how long its whole rate is busy with one of its requests, of average length."""
    if not load.tokens_per_s:
        return MIN_RETRY_S
    return load.tokens_left / max(1, load.n_requests) / load.tokens_per_s


def _load(loads: Mapping[str, ReplicaLoad], replica: Replica) -> ReplicaLoad:
    return loads.get(replica.id, NOTHING_KNOWN)


def _with_place(replicas: list[Replica], loads: Mapping[str, ReplicaLoad]) -> list[Replica]:
    return [replica for replica in replicas if not _load(loads, replica).is_full]


def _has_kv_room(load: ReplicaLoad, n_tokens: int) -> bool:
    return load.kv_room_tokens is None or n_tokens <= load.kv_room_tokens


def _delay(replica: Replica, load: ReplicaLoad) -> float:
    """Requests by rate: as planned, or as measured where all of the replica is in use."""
    is_busy = bool(load.n_waiting and load.tokens_per_s)
    return (load.n_requests + 1) / (load.tokens_per_s if is_busy else replica.predicted_tokens_per_s)
