"""Where a request goes: the plan's flows by turns, corrected by what is known of the replicas' work.

A flow is a pair of replicas, one that computes the prompt and one that decodes; for a mixed replica on its own they
are the same. Only pairs that are whole and have a place in their queue come into question. What is known of a
replica's work is its driver's last word and what this gateway itself has sent there since.

- Pairs whose KV pools have room for the request now come before those where it would wait for room.
- A replica that draws tokens is overloaded if it has more than SHED times the requests that would make it as full as
  the least full one, by what the plan means each to hold at once; where requests wait, by what it really gives, too.
- One that computes prompts is overloaded if more than a few requests are there beyond those, and by its share of the
  prompts more than SHED times as many as where fewest are.
- An idle replica that the asking node drives itself is taken at once: it costs no hop, and nobody waits for it.
- Else the turn decides (`turns`), so that over time the plan's shares come about.

Plans without flows are of mixed replicas alone; there the least loaded one is taken: its requests, this one
included, by its rate. Loads within NEAR of the least are equal, being below what figures tell apart: a replica that
the asking node drives itself wins then, else chance, so that gateways that know nothing of each other's newest
requests do not all choose the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from hexmesh.plan import Flow, Plan, Replica
from hexmesh.serving.turns import Turns
from hexmesh.wire.data import ReplicaStats

NEAR = 1.1
SHED = 2.0
"""Loads that differ by less are what chance and words that are a second old make of equal ones."""
A_FEW = 8
"""Prompts in a queue, which say nothing yet."""
STALE_S = 5.0
"""A driver's word is told once a second; one this old says nothing of its queue any more."""
_LEAST_TOKENS_PER_S = 1e-9
"""For a replica that no flow went through when it was planned."""
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


@dataclass(frozen=True, slots=True)
class Pair:
    """Where a request's prompt is computed, and where its tokens are drawn."""

    entry: Replica
    decode: Replica

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return (self.entry,) if self.entry is self.decode else (self.entry, self.decode)


def choose_pair(
    plan: Plan,
    *,
    turns: Turns,
    loads: Mapping[str, ReplicaLoad],
    n_tokens: int,
    lost_nodes: Set[str],
    avoid: Set[str],
    here: str,
    rng: random.Random,
    may_wait: bool = False,
) -> Pair | None:
    """The replicas to send a request of so many tokens to from node `here`.

    None when every pair lacks a stage; or is full, unless the request `may_wait` for a place. One to `avoid` is
    taken if there is no other. Where no flow is whole, a mixed replica serves alone.
    """
    pairs = _whole_pairs(plan, lost_nodes)
    if not pairs:
        alone = choose_replica(
            plan,
            loads=loads,
            n_tokens=n_tokens,
            lost_nodes=lost_nodes,
            avoid=avoid,
            here=here,
            rng=rng,
            may_wait=may_wait,
        )
        return None if alone is None else Pair(alone, alone)
    wanted = {at: pair for at, pair in pairs.items() if not any(one.id in avoid for one in pair.replicas)}
    taking = _pairs_with_place(wanted, loads) or _pairs_with_place(pairs, loads)
    if not taking and may_wait:
        taking = wanted or pairs
    if not taking:
        return None
    roomy = {at: pair for at, pair in taking.items() if _pair_has_room(pair, loads, n_tokens)} or taking
    calm = _calm(roomy, loads, plan.flows)
    for pair in calm.values():
        if pair.entry.driver == here and not any(_load(loads, one.id).n_requests for one in pair.replicas):
            return pair
    return pairs[turns.take(plan.flows, list(calm))]


def _whole_pairs(plan: Plan, lost_nodes: Set[str]) -> dict[int, Pair]:
    """By place in the plan's flows: those that something goes through and that have all their nodes."""
    whole = {replica.id: replica for replica in whole_replicas(plan, lost_nodes)}
    return {
        at: Pair(whole[flow.src], whole[flow.dst])
        for at, flow in enumerate(plan.flows)
        if flow.share > 0 and flow.src in whole and flow.dst in whole
    }


def _pairs_with_place(pairs: Mapping[int, Pair], loads: Mapping[str, ReplicaLoad]) -> dict[int, Pair]:
    return {
        at: pair
        for at, pair in pairs.items()
        if not any(_load(loads, replica.id).is_full for replica in pair.replicas)
    }


def _pair_has_room(pair: Pair, loads: Mapping[str, ReplicaLoad], n_tokens: int) -> bool:
    return all(_has_kv_room(_load(loads, replica.id), n_tokens) for replica in pair.replicas)


def _calm(
    pairs: Mapping[int, Pair], loads: Mapping[str, ReplicaLoad], flows: Iterable[Flow]
) -> dict[int, Pair]:
    """Pairs without an overloaded replica; where every pair has one, those whose worst is least so."""
    entries = _excess_prompts({pair.entry.id: pair.entry for pair in pairs.values()}, loads, flows)
    decodes = _excess({pair.decode.id: pair.decode for pair in pairs.values()}, loads, flows)
    worst = {at: max(entries[pair.entry.id], decodes[pair.decode.id]) for at, pair in pairs.items()}
    most = max(SHED, min(worst.values()))
    return {at: pair for at, pair in pairs.items() if worst[at] <= most}


def _excess(
    replicas: Mapping[str, Replica], loads: Mapping[str, ReplicaLoad], flows: Iterable[Flow]
) -> dict[str, float]:
    """The requests of each, by as many as would make it as full as the least full one with another request.

    What waits at one that computes prompts for others are mostly those, and says nothing of its room to decode.
    """
    gives = {flow.src for flow in flows if flow.share > 0 and flow.src != flow.dst}
    there = {
        name: load.n_requests - load.n_waiting if name in gives else _weight(replicas[name], load)
        for name, load in ((name, _load(loads, name)) for name in replicas)
    }
    least = min((n + 1) / replicas[name].predicted_batch for name, n in there.items())
    return {name: n / max(1.0, least * replicas[name].predicted_batch) for name, n in there.items()}


def _excess_prompts(
    replicas: Mapping[str, Replica], loads: Mapping[str, ReplicaLoad], flows: Iterable[Flow]
) -> dict[str, float]:
    """The prompts in each, by as many as would be there if all queues took as long as the shortest.

    What a replica means to hold is taken to draw tokens already. 0 where there are but a few prompts.
    """
    shares = dict.fromkeys(replicas, 0.0)
    for flow in flows:
        if flow.src in shares:
            shares[flow.src] += flow.share
    held = {name: one.predicted_batch for name, one in replicas.items() if one.role == "mixed"}
    queued = {name: max(0, _load(loads, name).n_requests - held.get(name, 0)) for name in replicas}
    least = min((n + 1) / shares[name] for name, n in queued.items())
    return {name: n / max(1.0, least * shares[name]) if n > A_FEW else 0.0 for name, n in queued.items()}


def _weight(replica: Replica, load: ReplicaLoad) -> float:
    """Its requests; where some wait, those of a replica that is slower than planned count for more."""
    if load.n_waiting and load.tokens_per_s and replica.predicted_tokens_per_s:
        return load.n_requests * replica.predicted_tokens_per_s / load.tokens_per_s
    return load.n_requests


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
    """The mixed replica to send a request of so many tokens to from node `here`, where no flows say so.

    None when every replica lacks a stage; or is full, unless the request `may_wait` for a place. One to `avoid` is
    taken if there is no other.
    """
    whole = [replica for replica in whole_replicas(plan, lost_nodes) if replica.role == "mixed"]
    wanted = [replica for replica in whole if replica.id not in avoid]
    taking = _with_place(wanted, loads) or _with_place(whole, loads) or (wanted or whole if may_wait else [])
    if not taking:
        return None
    candidates = [one for one in taking if _has_kv_room(_load(loads, one.id), n_tokens)] or taking
    delays = {replica.id: _delay(replica, _load(loads, replica.id)) for replica in candidates}
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


def _load(loads: Mapping[str, ReplicaLoad], replica: str) -> ReplicaLoad:
    return loads.get(replica, NOTHING_KNOWN)


def _with_place(replicas: list[Replica], loads: Mapping[str, ReplicaLoad]) -> list[Replica]:
    return [replica for replica in replicas if not _load(loads, replica.id).is_full]


def _has_kv_room(load: ReplicaLoad, n_tokens: int) -> bool:
    return load.kv_room_tokens is None or n_tokens <= load.kv_room_tokens


def _delay(replica: Replica, load: ReplicaLoad) -> float:
    """Requests by rate: as planned, or as measured where all of the replica is in use."""
    is_busy = bool(load.n_waiting and load.tokens_per_s)
    rate = load.tokens_per_s if is_busy else replica.predicted_tokens_per_s
    return (load.n_requests + 1) / max(rate, _LEAST_TOKENS_PER_S)
