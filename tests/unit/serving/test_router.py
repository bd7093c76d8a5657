"""Which replica a request goes to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Set
from typing import Any

from hexmesh.plan import Plan, Replica, Stage
from hexmesh.serving.router import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    STALE_S,
    ReplicaLoad,
    Sent,
    choose_replica,
    load_of,
    retry_after_s,
)
from hexmesh.wire.control import LEAST_BALLOT, Epoch
from hexmesh.wire.data import ReplicaStats


def replica(name: str, nodes: str, rate: float = 10.0) -> Replica:
    stages = tuple(
        Stage(
            node=node,
            devices=(0,),
            start=at,
            stop=at + 1,
            kv_blocks=8,
            needed_bytes=0,
            room_bytes=0,
            predicted_step_s=0.0,
        )
        for at, node in enumerate(nodes)
    )
    return Replica(
        id=name, role="mixed", stages=stages, block_tokens=16, predicted_tokens_per_s=rate, predicted_batch=1
    )


def choose(
    *replicas: Replica,
    n_requests: Mapping[str, int] | None = None,
    loads: Mapping[str, ReplicaLoad] | None = None,
    n_tokens: int = 10,
    lost: Set[str] = frozenset(),
    avoid: Set[str] = frozenset(),
    here: str = "z",
    seed: int = 0,
    may_wait: bool = False,
) -> str | None:
    plan = Plan(
        model_id="m",
        model_name="m",
        n_layers=2,
        dtype="float32",
        max_model_tokens=64,
        hosts=dict.fromkeys("abcdz", 1),
        replicas=replicas,
    )
    chosen = choose_replica(
        plan,
        loads=loads or {name: ReplicaLoad(n_requests=n) for name, n in (n_requests or {}).items()},
        n_tokens=n_tokens,
        lost_nodes=lost,
        avoid=avoid,
        here=here,
        rng=random.Random(seed),
        may_wait=may_wait,
    )
    return chosen.id if chosen is not None else None


R0, R1 = replica("r0", "ab"), replica("r1", "cd")


def test_the_least_loaded_one() -> None:
    assert choose(R0, R1, n_requests={"r0": 3, "r1": 2}) == "r1"
    assert choose(R0, R1, n_requests={"r0": 0, "r1": 2}) == "r0"


def test_load_counts_by_speed() -> None:
    slow, fast = replica("r0", "a", 10.0), replica("r1", "b", 45.0)
    counts = Counter[str]()
    for _ in range(55):
        name = choose(slow, fast, n_requests=counts)
        assert name is not None
        counts[name] += 1
    assert 8 <= counts["r0"] <= 12, counts


def test_the_one_driven_here_among_equals() -> None:
    assert choose(R0, R1, here="c") == "r1"
    assert choose(R0, R1, here="d", n_requests={"r0": 1}) == "r1"
    assert choose(R0, R1, here="a", n_requests={"r0": 1}) == "r1"


def test_chance_decides_among_equals() -> None:
    names = Counter(choose(R0, R1, seed=seed) for seed in range(100))
    assert min(names["r0"], names["r1"]) > 25


def test_a_replica_without_one_of_its_nodes_is_never_chosen() -> None:
    assert choose(R0, R1, n_requests={"r1": 50}, lost={"b"}) == "r1"
    assert choose(R0, R1, lost={"b", "c"}) is None


def test_one_to_avoid_is_taken_only_without_another() -> None:
    assert choose(R0, R1, n_requests={"r1": 50}, avoid={"r0"}) == "r1"
    assert choose(R0, R1, avoid={"r0", "r1"}, n_requests={"r1": 5}) == "r0"
    assert choose(R0, R1, avoid={"r0"}, lost={"d"}) == "r0"


ROOM = ReplicaLoad(n_requests=5, queue_room=3, kv_room_tokens=100)
NO_KV_ROOM = ReplicaLoad(n_requests=1, queue_room=3, kv_room_tokens=9)
FULL = ReplicaLoad(n_requests=0, queue_room=0, kv_room_tokens=100)


def test_one_with_kv_room_comes_before_a_less_loaded_one_without() -> None:
    assert choose(R0, R1, loads={"r0": ROOM, "r1": NO_KV_ROOM}) == "r0"
    assert choose(R0, R1, loads={"r0": ROOM, "r1": NO_KV_ROOM}, n_tokens=9) == "r1"
    assert choose(R0, R1, loads={"r0": ROOM, "r1": NO_KV_ROOM}, n_tokens=101) == "r1"


def test_a_full_one_is_not_asked_unless_the_request_may_wait() -> None:
    assert choose(R0, R1, loads={"r0": FULL, "r1": ROOM}) == "r1"
    assert choose(R0, R1, loads={"r0": FULL, "r1": FULL}) is None
    assert choose(R0, R1, loads={"r0": FULL, "r1": FULL}, avoid={"r0"}, may_wait=True) == "r1"


def test_one_to_avoid_comes_before_a_full_one() -> None:
    assert choose(R0, R1, loads={"r0": FULL, "r1": ROOM}, avoid={"r1"}) == "r1"
    assert choose(R0, R1, loads={"r0": FULL, "r1": ROOM}, avoid={"r1"}, may_wait=True) == "r1"


def test_where_requests_wait_the_measured_rate_counts() -> None:
    planned_alike = {
        "r0": ReplicaLoad(n_requests=10, n_waiting=4, tokens_per_s=5.0),
        "r1": ReplicaLoad(n_requests=12, n_waiting=4, tokens_per_s=20.0),
    }
    assert choose(R0, R1, loads=planned_alike) == "r1"


def stats(**changes: Any) -> ReplicaStats:
    fields: dict[str, Any] = {
        "replica": "r0",
        "epoch": Epoch(ballot=LEAST_BALLOT, n=1),
        "requests_running": 4,
        "requests_waiting": 0,
        "kv_blocks_total": 20,
        "kv_blocks_free": 10,
        "tokens_per_s": 50.0,
        "stage_busy": [],
        "queue_room": 8,
        "tokens_left": 400,
    }
    return ReplicaStats(**fields | changes)


def test_what_was_sent_since_the_drivers_last_word_counts() -> None:
    sent = Sent(n_requests=5, n_new=3, new_tokens=70)
    assert load_of(stats(), 0.5, 16, sent) == ReplicaLoad(
        n_requests=7, queue_room=5, kv_room_tokens=90, tokens_per_s=50.0, tokens_left=400
    )
    assert load_of(stats(), 0.5, 16, Sent(n_requests=9)).n_requests == 9
    assert load_of(stats(), 0.5, 16, Sent(n_new=8)).is_full


def test_where_requests_wait_there_is_no_kv_room() -> None:
    assert load_of(stats(requests_waiting=1), 0.0, 16).kv_room_tokens == 0


def test_an_old_word_says_nothing() -> None:
    assert load_of(stats(queue_room=0), STALE_S, 16).is_full
    assert load_of(stats(queue_room=0), STALE_S + 0.1, 16, Sent(n_requests=2)) == ReplicaLoad(n_requests=2)
    assert load_of(None, 0.0, 16, Sent(n_requests=2)) == ReplicaLoad(n_requests=2)


def test_a_full_mesh_says_when_the_first_request_should_end() -> None:
    slow = ReplicaLoad(n_requests=10, tokens_left=1000, tokens_per_s=10.0)
    fast = ReplicaLoad(n_requests=10, tokens_left=1000, tokens_per_s=25.0)
    assert retry_after_s([slow, fast]) == 4.0
    assert retry_after_s([ReplicaLoad(n_requests=1, tokens_left=10**6, tokens_per_s=1.0)]) == MAX_RETRY_S
    assert retry_after_s([ReplicaLoad(n_requests=10, tokens_left=10, tokens_per_s=1e9)]) == MIN_RETRY_S
    assert retry_after_s([ReplicaLoad(n_requests=10, tokens_left=10)]) == MIN_RETRY_S
