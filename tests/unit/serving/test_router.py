"""Which replica a request goes to."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Set

from hexmesh.plan import Plan, Replica, Stage
from hexmesh.serving.router import choose_replica


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
    lost: Set[str] = frozenset(),
    avoid: Set[str] = frozenset(),
    here: str = "z",
    seed: int = 0,
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
        plan, n_requests=n_requests or {}, lost_nodes=lost, avoid=avoid, here=here, rng=random.Random(seed)
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
