"""Requests follow the plan's flows by turns, and leave them where a replica cannot keep up."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Set

import pytest

from hexmesh.cluster import Role
from hexmesh.plan import Flow, Plan, Replica, Stage
from hexmesh.serving.router import ReplicaLoad, choose_pair
from hexmesh.serving.turns import Turns


def replica(name: str, role: Role = "mixed", batch: int = 8, rate: float = 100.0) -> Replica:
    """On the node of its own name."""
    stage = Stage(
        node=name,
        devices=(0,),
        start=0,
        stop=1,
        kv_blocks=8,
        needed_bytes=0,
        room_bytes=0,
        predicted_step_s=0.0,
    )
    return Replica(
        id=name,
        role=role,
        stages=(stage,),
        block_tokens=16,
        predicted_tokens_per_s=rate,
        predicted_batch=batch,
    )


def plan(replicas: tuple[Replica, ...], *shares: tuple[str, str, float]) -> Plan:
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=1,
        dtype="float32",
        max_model_tokens=64,
        hosts={one.id: 1 for one in replicas},
        replicas=replicas,
        flows=tuple(Flow(src=src, dst=dst, share=share) for src, dst, share in shares),
    )


MIXED = plan(
    (replica("a"), replica("b"), replica("c")), ("a", "a", 0.625), ("b", "b", 0.25), ("c", "c", 0.125)
)
SPLIT = plan(
    (replica("p", "prefill", batch=1), replica("d", "decode"), replica("e", "decode"), replica("m")),
    ("p", "d", 0.5),
    ("p", "e", 0.25),
    ("m", "e", 0.125),
    ("m", "m", 0.125),
)


class Gateway:
    """Chooses, with what the test says of loads."""

    def __init__(self, plan: Plan, seed: int = 0, here: str = "z") -> None:
        self.plan = plan
        self.turns = Turns(random.Random(seed))
        self.here = here

    def choose(
        self,
        loads: Mapping[str, ReplicaLoad] | None = None,
        *,
        lost: Set[str] = frozenset(),
        avoid: Set[str] = frozenset(),
        n_tokens: int = 10,
        may_wait: bool = False,
    ) -> str | None:
        pair = choose_pair(
            self.plan,
            turns=self.turns,
            loads=loads or {},
            n_tokens=n_tokens,
            lost_nodes=lost,
            avoid=avoid,
            here=self.here,
            rng=random.Random(0),
            may_wait=may_wait,
        )
        return None if pair is None else f"{pair.entry.id}{pair.decode.id}"

    def counts(
        self, n: int, loads: Mapping[str, ReplicaLoad] | None = None, *, n_tokens: int = 10
    ) -> Counter[str | None]:
        return Counter(self.choose(loads, n_tokens=n_tokens) for _ in range(n))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("wanted", "counts"),
    [
        (MIXED, {"aa": 5, "bb": 2, "cc": 1}),
        (SPLIT, {"pd": 4, "pe": 2, "me": 1, "mm": 1}),
    ],
)
def test_every_cycle_has_the_plans_shares_exactly(wanted: Plan, counts: dict[str, int], seed: int) -> None:
    gateway = Gateway(wanted, seed)
    for _ in range(20):
        assert gateway.counts(8) == counts


def test_turns_are_spread_evenly() -> None:
    """No two of the rarer ones in a row, and never more than two of the frequent one."""
    gateway = Gateway(MIXED)
    chosen = "".join(str(gateway.choose())[0] for _ in range(80))
    assert not {"bb", "cc", "aaa"} & {chosen[at : at + n] for at in range(80) for n in (2, 3)}


def test_the_same_seed_gives_the_same_turns_and_others_begin_elsewhere() -> None:
    def turns(seed: int) -> tuple[str | None, ...]:
        gateway = Gateway(MIXED, seed)
        return tuple(gateway.choose() for _ in range(16))

    assert turns(3) == turns(3)
    assert len({turns(seed) for seed in range(20)}) > 3


def test_shares_come_about_while_requests_stay_as_long_as_planned() -> None:
    """Those of a leave after 5 requests, of b after 10: each holds what the plan means it to."""
    wanted = plan((replica("a", batch=4), replica("b", batch=2)), ("a", "a", 0.8), ("b", "b", 0.2))
    gateway, there, counts = Gateway(wanted), {"a": list[int](), "b": list[int]()}, Counter[str]()
    for now in range(100):
        for name, stay in (("a", 5), ("b", 10)):
            there[name] = [since for since in there[name] if now - since < stay]
        chosen = gateway.choose({name: ReplicaLoad(n_requests=len(ones)) for name, ones in there.items()})
        assert chosen is not None
        there[chosen[0]].append(now)
        counts[chosen] += 1
    assert counts == {"aa": 80, "bb": 20}


def test_an_overloaded_replica_sheds_and_is_not_flooded_afterwards() -> None:
    gateway = Gateway(MIXED)
    loads = {"a": ReplicaLoad(n_requests=5), "b": ReplicaLoad(n_requests=1), "c": ReplicaLoad(n_requests=1)}
    assert gateway.counts(12, loads) == {"bb": 8, "cc": 4}
    assert gateway.counts(8) == {"aa": 5, "bb": 2, "cc": 1}


def test_load_counts_by_what_the_plan_means_to_be_there() -> None:
    wanted = plan((replica("a", batch=40), replica("b", batch=4)), ("a", "a", 0.5), ("b", "b", 0.5))
    alike = {"a": ReplicaLoad(n_requests=19), "b": ReplicaLoad(n_requests=1)}
    assert Gateway(wanted).counts(10, alike) == {"aa": 5, "bb": 5}
    over = {"a": ReplicaLoad(n_requests=19), "b": ReplicaLoad(n_requests=5)}
    assert Gateway(wanted).counts(10, over) == {"aa": 10}


def test_where_requests_wait_a_replica_slower_than_planned_sheds() -> None:
    slow = ReplicaLoad(n_requests=9, n_waiting=2, tokens_per_s=30.0, kv_room_tokens=0)
    fast = ReplicaLoad(n_requests=9, n_waiting=2, tokens_per_s=100.0, kv_room_tokens=0)
    loads = {"a": slow, "b": fast, "c": fast}
    assert Gateway(MIXED).counts(12, loads) == {"bb": 8, "cc": 4}


def test_a_pair_is_overloaded_if_either_of_it_is() -> None:
    at_prefill = {"p": ReplicaLoad(n_requests=40), "m": ReplicaLoad(n_requests=1)}
    assert Gateway(SPLIT).counts(8, at_prefill) == {"me": 4, "mm": 4}
    at_decode = {"e": ReplicaLoad(n_requests=40)}
    assert Gateway(SPLIT).counts(10, at_decode) == {"pd": 8, "mm": 2}


def test_prompts_in_a_queue_count_by_its_share_of_them() -> None:
    """Though a replica that computes prompts alone holds no outputs, and another does both."""
    wanted = plan(
        (replica("p", "prefill", batch=1), replica("q", "prefill", batch=1), replica("m", batch=100)),
        ("p", "m", 0.6),
        ("q", "m", 0.2),
        ("m", "m", 0.2),
    )
    in_proportion = {
        "p": ReplicaLoad(n_requests=30),
        "q": ReplicaLoad(n_requests=10),
        "m": ReplicaLoad(n_requests=110),
    }
    assert Gateway(wanted).counts(10, in_proportion) == {"pm": 6, "qm": 2, "mm": 2}
    too_many = {**in_proportion, "q": ReplicaLoad(n_requests=30)}
    assert Gateway(wanted).counts(8, too_many) == {"pm": 6, "mm": 2}
    a_few = {"p": ReplicaLoad(n_requests=1), "q": ReplicaLoad(n_requests=8)}
    assert Gateway(wanted).counts(10, a_few) == {"pm": 6, "qm": 2, "mm": 2}


def test_kv_room_and_places_count_at_both_ends() -> None:
    no_room = ReplicaLoad(queue_room=3, kv_room_tokens=9)
    full = ReplicaLoad(queue_room=0)
    assert Gateway(SPLIT).counts(8, {"d": no_room}) == {"pe": 4, "me": 2, "mm": 2}
    assert Gateway(SPLIT).counts(8, {"d": no_room}, n_tokens=9)["pd"] == 4
    assert Gateway(SPLIT).counts(8, {"p": full}) == {"me": 4, "mm": 4}
    everywhere = dict.fromkeys("pdem", full)
    assert Gateway(SPLIT).choose(everywhere) is None
    assert Gateway(SPLIT).choose(everywhere, may_wait=True) is not None


def test_a_lost_replica_is_skipped_and_the_rest_keep_their_shares() -> None:
    gateway = Gateway(SPLIT)
    assert Counter(gateway.choose(lost={"d"}) for _ in range(8)) == {"pe": 4, "me": 2, "mm": 2}
    assert Counter(gateway.choose(lost={"p"}) for _ in range(8)) == {"me": 4, "mm": 4}
    assert gateway.choose(lost={"p", "m"}) is None


def test_where_no_flow_is_whole_a_mixed_replica_serves_alone() -> None:
    wanted = plan((replica("m"), replica("d", "decode")), ("m", "d", 1.0))
    assert Gateway(wanted).choose(lost={"d"}) == "mm"


def test_one_to_avoid_is_taken_only_without_another() -> None:
    gateway = Gateway(MIXED)
    assert Counter(gateway.choose(avoid={"a"}) for _ in range(6)) == {"bb": 4, "cc": 2}
    assert gateway.choose(avoid={"a", "b", "c"}) is not None


def test_an_idle_replica_driven_here_is_taken_and_costs_no_turn() -> None:
    gateway = Gateway(MIXED, here="c")
    assert gateway.counts(50) == {"cc": 50}
    busy = dict.fromkeys("abc", ReplicaLoad(n_requests=1))
    assert gateway.counts(8, busy) == {"aa": 5, "bb": 2, "cc": 1}


def test_a_new_plan_begins_anew() -> None:
    gateway = Gateway(MIXED)
    gateway.choose()
    gateway.plan = SPLIT
    assert gateway.counts(8) == {"pd": 4, "pe": 2, "me": 1, "mm": 1}


def test_prompts_that_wait_for_others_do_not_keep_a_replica_from_decoding_its_own() -> None:
    """It looks slow and full, but nearly all that waits there is to be decoded elsewhere."""
    wanted = plan(
        (replica("m", batch=40), replica("d", "decode", batch=100)), ("m", "m", 0.4), ("m", "d", 0.6)
    )
    loads = {
        "m": ReplicaLoad(n_requests=440, n_waiting=400, tokens_per_s=5.0, kv_room_tokens=0),
        "d": ReplicaLoad(n_requests=104, n_waiting=4, tokens_per_s=100.0, kv_room_tokens=0),
    }
    assert Gateway(wanted).counts(10, loads) == {"mm": 4, "md": 6}
    crowded = {**loads, "m": ReplicaLoad(n_requests=500, n_waiting=100, kv_room_tokens=0)}
    assert Gateway(wanted).counts(10, crowded) == {"md": 10}
