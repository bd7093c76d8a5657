"""The layout search against brute force, and what it says about its choices."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.cost import CostModel
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import Plan
from hexmesh.planner.objective import Throughput
from hexmesh.schedule.check import check_plan
from hexmesh.schedule.layout import lay_out
from hexmesh.schedule.misfit import NoFit
from hexmesh.schedule.wish import Wish
from hexmesh.score.pipeline import NOWHERE, Pipeline, Seat, group_like, hop_between, pipeline_of
from hexmesh.workload import Workload

MIB = 2**20
BLOCK_TOKENS = 16
STEP_TOKENS = 64


def _spec(n_layers: int = 8, *, tied: bool = True, vocab: int = 2000) -> ModelSpec:
    return model_spec_from_config(
        {
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": tied,
        }
    )


def _node(name: str, *budgets: int, bytes_per_s: float = 2e10, flops_per_s: float = 1e11) -> Node:
    devices = tuple(
        Device(
            index=index,
            kind="cpu",
            name="cpu",
            budget_bytes=budget,
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
        )
        for index, budget in enumerate(budgets)
    )
    return Node(id=name, name=name, site="site", devices=devices, tp_degrees=(1,), roles=("mixed",))


def _link(src: str, dst: str, rtt_s: float = 1e-3, bytes_per_s: float = 1e8) -> Link:
    return Link(
        src=src, dst=dst, rtt_p50_s=rtt_s, rtt_p95_s=2 * rtt_s, bytes_per_s=bytes_per_s, lower_bound=False
    )


def _mesh(*nodes: Node, rtt_s: float = 1e-3) -> Cluster:
    pairs = itertools.permutations([node.id for node in nodes], 2)
    return Cluster(nodes=nodes, links=tuple(_link(src, dst, rtt_s) for src, dst in pairs))


def _lay_out(
    cluster: Cluster,
    spec: ModelSpec,
    workload: Workload,
    *,
    max_model_tokens: int = 256,
    tolerance: float = 0.01,
    current: Plan | None = None,
) -> Plan | NoFit:
    return lay_out(
        cluster,
        spec,
        "float32",
        workload,
        model_id="id",
        model_name="name",
        hosts={node.id: 1 for node in cluster.nodes},
        max_model_tokens=max_model_tokens,
        step_tokens=STEP_TOKENS,
        tolerance=tolerance,
        current=current,
    )


def _plan(result: Plan | NoFit) -> Plan:
    assert isinstance(result, Plan), result
    return result


def _cut(plan: Plan) -> list[tuple[str, int, int, int]]:
    return [(stage.node, stage.devices[0], stage.start, stage.stop) for stage in plan.replicas[0].stages]


# --- brute force ---


def _wish(cluster: Cluster, spec: ModelSpec, workload: Workload, max_model_tokens: int) -> Wish:
    return Wish(
        everywhere=cluster,
        hosts={node.id: 1 for node in cluster.nodes},
        spec=spec,
        dtype="float32",
        workload=workload,
        objective=Throughput(),
        max_model_tokens=max_model_tokens,
        block_tokens=BLOCK_TOKENS,
        step_tokens=STEP_TOKENS,
    )


def _costs(spec: ModelSpec, workload: Workload, max_model_tokens: int) -> CostModel:
    return _wish(Cluster(nodes=(), links=()), spec, workload, max_model_tokens).costs


def _compositions(n_layers: int, n_stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, n_layers), n_stages - 1):
        yield (0, *inner, n_layers)


def _best_rates(
    cluster: Cluster, spec: ModelSpec, workload: Workload, max_model_tokens: int, floor_tokens: int
) -> dict[frozenset[tuple[str, int]], float]:
    """The best rate over all devices of each set, in tokens per second: of all orders and cuts."""
    wish = _wish(cluster, spec, workload, max_model_tokens)
    capacities, links = wish.problem(floor_tokens).capacities, cluster.link_table()
    devices = [(node, device) for node in cluster.nodes for device in node.devices]
    best: dict[frozenset[tuple[str, int]], float] = {}
    for n_stages in range(1, len(devices) + 1):
        for order in itertools.permutations(devices, n_stages):
            nodes = [node for node, _ in order]
            ring = [*itertools.pairwise(nodes), (nodes[-1], nodes[0])]
            if any(a is not b and (a.id, b.id) not in links for a, b in ring):
                continue
            members = frozenset((node.id, device.index) for node, device in order)
            hops = tuple(hop_between(a, b, links) for a, b in ring)
            for bounds in _compositions(spec.n_layers, n_stages):
                seats = tuple(
                    Seat(group=group_like(node, device, 1), start=start, stop=stop)
                    for (node, device), (start, stop) in zip(order, itertools.pairwise(bounds), strict=True)
                )
                back = NOWHERE if n_stages == 1 else hops[-1]
                pipeline = Pipeline(seats=seats, hops=hops[:-1], back=back)
                if capacities.prefill(pipeline).requests_per_s > 0:
                    rate = capacities.mixed(pipeline).requests_per_s * wish.asked.output_tokens
                    best[members] = max(best.get(members, 0.0), rate)
    return {members: rate for members, rate in best.items() if rate > 0}


def _best_sum(rates: dict[frozenset[tuple[str, int]], float]) -> float:
    """The greatest sum over disjoint sets of devices; 0 if none holds the model."""
    return max(
        (
            rate + _best_sum({other: its for other, its in rates.items() if not other & members})
            for members, rate in rates.items()
        ),
        default=0.0,
    )


def _total(plan: Plan) -> float:
    return sum(replica.predicted_tokens_per_s for replica in plan.replicas)


def _random_case(seed: int) -> tuple[Cluster, ModelSpec, Workload]:
    rng = random.Random(seed)
    spec = _spec(rng.randrange(4, 7), tied=rng.random() < 0.5, vocab=rng.choice((500, 2000, 5000)))
    workload = Workload(
        prompt_tokens=rng.choice((32, 96)),
        output_tokens=64,
        max_concurrent_sequences=rng.choice((1, 2, 4, 8)),
    )
    costs = _costs(spec, workload, 96)
    whole = costs.needed_bytes(0, spec.n_layers, 12, "cpu")
    n_devices = rng.choice((1, 2, 3, 3, 4))
    nodes: list[Node] = []
    while n_devices:
        on_node = rng.randint(1, min(2, n_devices))
        n_devices -= on_node
        budgets = [int(whole * rng.uniform(0.1, 1.3)) for _ in range(on_node)]
        nodes.append(
            _node(
                f"n{len(nodes)}",
                *budgets,
                bytes_per_s=10 ** rng.uniform(8.5, 11),
                flops_per_s=10 ** rng.uniform(9, 12),
            )
        )
    links = tuple(
        _link(a.id, b.id, 10 ** rng.uniform(-4, -1), 10 ** rng.uniform(5, 9))
        for a, b in itertools.permutations(nodes, 2)
        if rng.random() < 0.8
    )
    return Cluster(nodes=tuple(nodes), links=links), spec, workload


@pytest.mark.parametrize("first_seed", range(0, 60, 10))
def test_the_sum_of_rates_equals_brute_force(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 10):
        cluster, spec, workload = _random_case(seed)
        rates = _best_rates(cluster, spec, workload, 96, 96)
        result = _lay_out(cluster, spec, workload, max_model_tokens=96, tolerance=0.0)
        if not rates:
            assert isinstance(result, NoFit), f"seed {seed}"
            continue
        plan, best = _plan(result), _best_sum(rates)
        assert check_plan(plan, cluster, spec, workload) == [], f"seed {seed}"
        assert _total(plan) == pytest.approx(best, rel=1e-6), f"seed {seed}"
        near = _plan(_lay_out(cluster, spec, workload, max_model_tokens=96))
        assert _total(near) >= 0.99 * _total(plan) * (1 - 1e-6), f"seed {seed}"
        assert len(near.replicas) >= len(plan.replicas), f"seed {seed}"


@pytest.mark.parametrize("seed", range(12))
def test_sequences_are_as_long_as_costs_a_fifth_at_most(seed: int) -> None:
    cluster, spec, workload = _random_case(seed)
    must = workload.prompt_tokens + workload.output_tokens
    sums = {
        floor: _best_sum(_best_rates(cluster, spec, workload, 1024, floor))
        for floor in {must, *(1024 >> halvings for halvings in range(4))}
        if floor >= must
    }
    result = _lay_out(cluster, spec, workload, max_model_tokens=1024, tolerance=0.0)
    if not sums[must]:
        assert isinstance(result, NoFit)
        return
    longest = max(floor for floor, rate in sums.items() if rate >= 0.8 * sums[must])
    plan = _plan(result)
    assert _total(plan) == pytest.approx(sums[longest], rel=1e-6)
    assert all(replica.kv_blocks * BLOCK_TOKENS >= longest for replica in plan.replicas)


def test_the_cases_are_not_all_easy() -> None:
    """Some fit nowhere, some on one device, some need several, some hold several replicas."""
    shapes = set()
    for seed in range(100):
        result = _lay_out(*_random_case(seed), max_model_tokens=96)
        replicas = result.replicas if isinstance(result, Plan) else ()
        shapes.add(tuple(sorted(len(replica.stages) for replica in replicas)))
    assert shapes >= {(), (1,), (2,), (3,), (1, 1), (1, 2), (1, 1, 1)}


def test_prediction_is_the_score_of_the_plan() -> None:
    """The score is asked of the plan's own stages; what its KV pools may hold is what the search was told."""
    for seed in range(30):
        cluster, spec, workload = _random_case(seed)
        result = _lay_out(cluster, spec, workload, max_model_tokens=96)
        wish = _wish(cluster, spec, workload, 96)
        for replica in result.replicas if isinstance(result, Plan) else ():
            pipeline = pipeline_of(replica.stages, wish.cluster)
            mixed = wish.problem(wish.floors[0]).capacities.mixed(pipeline)
            assert replica.predicted_tokens_per_s == pytest.approx(
                mixed.requests_per_s * wish.asked.output_tokens, rel=1e-9
            )
            assert 1 <= replica.predicted_batch <= workload.max_concurrent_sequences


def test_many_devices_are_laid_out_in_time_and_soundly() -> None:
    cluster = _mesh(*(_node(f"n{index:03d}", 6 * MIB) for index in range(40)))
    plan = _plan(_lay_out(cluster, _spec(), SHORT))
    assert check_plan(plan, cluster, _spec(), SHORT) == []
    n_used = sum(len(replica.stages) for replica in plan.replicas)
    assert len(plan.unused) == 40 - n_used
    assert len(plan.replicas) >= 13


# --- what the operator sees ---

SHORT = Workload(prompt_tokens=64, output_tokens=64, max_concurrent_sequences=4)


def test_unequal_memory_gives_unequal_layers() -> None:
    layers = {
        stage.node: stage.n_layers
        for stage in _plan(_lay_out(_mesh(_node("a", 5 * MIB), _node("b", 8 * MIB)), _spec(), SHORT))
        .replicas[0]
        .stages
    }
    assert sum(layers.values()) == 8
    assert layers["b"] > layers["a"]


def test_equal_nodes_get_about_equal_shares() -> None:
    plan = _plan(_lay_out(_mesh(_node("a", 7 * MIB), _node("b", 7 * MIB)), _spec(vocab=100), SHORT))
    assert sorted(stage.n_layers for stage in plan.replicas[0].stages) == [4, 4]


def test_one_node_that_holds_all_works_alone_and_says_why() -> None:
    cluster = _mesh(_node("a", 64 * MIB), _node("b", 5 * MIB), rtt_s=0.02)
    plan = _plan(_lay_out(cluster, _spec(), SHORT))
    assert _cut(plan) == [("a", 0, 0, 8)]
    (unused,) = plan.unused
    assert (unused.node, unused.device) == ("b", 0)
    assert unused.reason.startswith("the replicas are no faster with it: ")


def test_two_devices_of_one_node_are_two_stages() -> None:
    cluster = _mesh(_node("a", 6 * MIB, 6 * MIB))
    plan = _plan(_lay_out(cluster, _spec(), SHORT))
    assert [(node, start, stop) for node, _, start, stop in _cut(plan)] == [("a", 0, 4), ("a", 4, 8)]
    assert {stage.devices for stage in plan.replicas[0].stages} == {(0,), (1,)}


def test_a_pair_without_a_link_is_never_used() -> None:
    nodes = (_node("a", 6 * MIB), _node("b", 6 * MIB))
    one_way = Cluster(nodes=nodes, links=(_link("a", "b"),))
    result = _lay_out(one_way, _spec(), SHORT)
    assert isinstance(result, NoFit)
    assert "measured links" in result.message
    both_ways = Cluster(nodes=nodes, links=(_link("a", "b"), _link("b", "a")))
    assert len(_plan(_lay_out(both_ways, _spec(), SHORT)).replicas[0].stages) == 2


def test_a_device_too_small_for_a_layer_is_named_with_both_figures() -> None:
    cluster = _mesh(_node("a", 64 * MIB), _node("b", 1 * MIB))
    spec = _spec()
    plan = _plan(_lay_out(cluster, spec, SHORT))
    assert [one.reason for one in plan.unused] == [
        "too little memory: one layer with KV for 128 tokens needs 1.3 MiB, its budget is 1.0 MiB"
    ]
    assert _costs(spec, SHORT, 256).needed_bytes(1, 2, 8, "cpu") == pytest.approx(1.3 * MIB, rel=0.04)


def test_devices_of_hosts_outside_the_plan_or_unmeasured_stay_out() -> None:
    cluster = _mesh(_node("a", 64 * MIB), _node("b", 64 * MIB), _node("c", 64 * MIB, bytes_per_s=0.0))
    plan = lay_out(
        cluster,
        _spec(),
        "float32",
        SHORT,
        model_id="id",
        model_name="name",
        hosts={"a": 5, "c": 6},
        max_model_tokens=256,
    )
    assert isinstance(plan, Plan)
    assert [(one.node, one.reason) for one in plan.unused] == [
        ("b", "its host is not part of this plan"),
        ("c", "its speed is not measured yet"),
    ]
    assert plan.hosts == {"a": 5, "c": 6}


def test_no_fit_says_what_is_needed_and_what_there_is() -> None:
    spec, workload = _spec(), SHORT
    costs = _costs(spec, workload, 256)
    result = _lay_out(_mesh(_node("a", 2 * MIB), _node("b", 3 * MIB)), spec, workload)
    assert isinstance(result, NoFit)
    needed = costs.needed_bytes(0, 7, 8, "cpu") + costs.needed_bytes(7, 8, 8, "cpu")
    assert (result.needed_bytes, result.room_bytes) == (needed, 5 * MIB)
    assert result.next_step.startswith("raise --memory or join nodes with at least ")
    assert [(one.node, one.reason.split(":")[0]) for one in result.unused] == [
        ("a", "its 2.0 MiB could hold 1 of 8 layers"),
        ("b", "its 3.0 MiB could hold 3 of 8 layers"),
    ]


def test_no_fit_has_a_line_for_every_device() -> None:
    result = _lay_out(_mesh(_node("a", 2 * MIB), _node("b", MIB)), _spec(), SHORT)
    assert isinstance(result, NoFit)
    assert result.explanation == (
        result.message,
        *(f"{one.node} cpu:0: {one.reason}" for one in result.unused),
    )


def test_no_fit_at_the_smallest_budget() -> None:
    result = _lay_out(_mesh(_node("a", MIB)), _spec(), SHORT)
    assert isinstance(result, NoFit)
    assert result.needed_bytes > result.room_bytes == MIB


def test_no_fit_without_any_device() -> None:
    result = _lay_out(Cluster(nodes=(), links=()), _spec(), SHORT)
    assert isinstance(result, NoFit)
    assert (result.message, result.room_bytes) == ("no device with measured speed is part of the mesh", 0)


def test_kv_fills_the_budget_but_never_beyond_what_can_be_used() -> None:
    spec = _spec()
    roomy = _plan(_lay_out(_mesh(_node("a", 512 * MIB)), spec, SHORT)).replicas[0]
    assert roomy.kv_blocks == SHORT.max_concurrent_sequences * 256 // BLOCK_TOKENS
    tight = _plan(_lay_out(_mesh(_node("a", 9 * MIB)), spec, SHORT, max_model_tokens=2048)).replicas[0]
    (stage,) = tight.stages
    costs = _costs(spec, SHORT, 2048)
    block_bytes = costs.kv_block_bytes(8) + costs.gather_block_bytes("cpu")
    assert 0 <= stage.room_bytes - stage.needed_bytes < block_bytes


def test_longer_sequences_are_made_room_for_where_that_is_cheap() -> None:
    """One node holds the model and 128 tokens, the other not even the model; both hold the model's 2048."""
    spec = _spec()
    nodes = _node("a", 12 * MIB, bytes_per_s=2e9), _node("b", 8 * MIB, bytes_per_s=2e9)
    near, far = _mesh(*nodes, rtt_s=1e-5), _mesh(*nodes, rtt_s=0.5)
    workload = Workload(prompt_tokens=64, output_tokens=64, max_concurrent_sequences=1)
    costs = _costs(spec, workload, 2048)
    assert costs.blocks_of(128) < costs.room_blocks(0, 8, nodes[0].devices[0]) < costs.blocks_of(2048)
    plan = _plan(_lay_out(near, spec, workload, max_model_tokens=2048))
    assert plan.replicas[0].kv_blocks * BLOCK_TOKENS >= 2048
    alone = _plan(_lay_out(far, spec, workload, max_model_tokens=2048))
    assert len(alone.replicas[0].stages) == 1
    assert alone.replicas[0].kv_blocks * BLOCK_TOKENS < 2048


def test_the_same_input_gives_the_same_plan_whatever_the_order_of_nodes() -> None:
    for seed in range(30):
        cluster, spec, workload = _random_case(seed)
        mirrored = Cluster(nodes=cluster.nodes[::-1], links=cluster.links[::-1])
        first = _lay_out(cluster, spec, workload, max_model_tokens=96)
        second = _lay_out(mirrored, spec, workload, max_model_tokens=96)
        assert first == _lay_out(cluster, spec, workload, max_model_tokens=96)
        if isinstance(first, Plan):
            assert first.replicas == _plan(second).replicas


# --- re-planning ---

HALF = int(7.1 * MIB)
"""Room for seven of the eight layers and a sequence of 256 tokens."""


def _with_speed(cluster: Cluster, node_id: str, factor: float) -> Cluster:
    nodes = tuple(
        _node(
            node.id,
            *(device.budget_bytes for device in node.devices),
            bytes_per_s=node.devices[0].bytes_per_s * (factor if node.id == node_id else 1.0),
        )
        for node in cluster.nodes
    )
    return Cluster(nodes=nodes, links=cluster.links)


def test_a_small_change_of_speed_moves_nothing() -> None:
    spec = _spec(vocab=100)
    cluster = _mesh(_node("a", HALF), _node("b", HALF))
    before = _plan(_lay_out(cluster, spec, SHORT))
    drifted = _with_speed(cluster, "b", 1.3)
    assert _cut(_plan(_lay_out(drifted, spec, SHORT, tolerance=0.0))) != _cut(before)
    kept = _plan(_lay_out(drifted, spec, SHORT, tolerance=0.0, current=before))
    assert _cut(kept) == _cut(before)
    assert "kept the present layout" in kept.explanation[-1]
    assert check_plan(kept, drifted, spec, SHORT) == []


def test_a_large_gain_moves_layers() -> None:
    spec = _spec(vocab=100)
    cluster = _with_speed(_mesh(_node("a", HALF), _node("b", HALF)), "a", 0.01)
    cluster = _with_speed(cluster, "b", 0.01)
    before = _plan(_lay_out(cluster, spec, SHORT))
    faster = _with_speed(cluster, "b", 20.0)
    after = _plan(_lay_out(faster, spec, SHORT, current=before))
    assert _cut(after) != _cut(before)


def test_a_node_that_restarted_is_not_clung_to() -> None:
    spec = _spec(vocab=100)
    cluster = _mesh(_node("a", HALF), _node("b", HALF))
    before = _plan(_lay_out(cluster, spec, SHORT))
    drifted = _with_speed(cluster, "b", 1.3)
    after = lay_out(
        drifted,
        spec,
        "float32",
        SHORT,
        model_id="id",
        model_name="name",
        hosts={"a": 1, "b": 2},
        max_model_tokens=256,
        step_tokens=STEP_TOKENS,
        tolerance=0.0,
        current=before,
    )
    assert isinstance(after, Plan)
    assert _cut(after) != _cut(before)


# --- explanation ---


def test_explanation_has_a_line_for_every_device() -> None:
    cluster = _mesh(_node("a", 6 * MIB), _node("b", 6 * MIB), _node("c", MIB))
    plan = _plan(_lay_out(cluster, _spec(), SHORT))
    summary, *shares, unused = plan.explanation
    replica = plan.replicas[0]
    assert summary.startswith(f"r0: 2 stages, {replica.predicted_tokens_per_s:.1f} tokens/s with 4 sequences")
    assert f"KV for {replica.kv_blocks * BLOCK_TOKENS} tokens in {replica.kv_blocks} blocks" in summary
    for line, stage in zip(shares, replica.stages, strict=True):
        assert line.startswith(
            f"{stage.node} cpu:0 layers {stage.start}-{stage.stop - 1} ({stage.n_layers} of 8): "
        )
        assert "MiB weights + " in line
        assert "workspace of 6.0 MiB; step " in line
        assert line.endswith(("bound by memory bandwidth", "bound by compute", "bound by call overhead"))
    assert unused.startswith("c cpu:0 unused: too little memory: ")
