"""Closed forms of a replica's rates against a simulated pipeline, and what must always hold of them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.cluster import Cluster, Device, Fabric
from hexmesh.cost import CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Stage
from hexmesh.roofline import Group
from hexmesh.score import Capacities, Hop, Pipeline, Seat, pipeline_of
from hexmesh.workload import LognormalLengths, Slo, Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
SMALL = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
)
LLAMA_2_70B = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
)


def _capacities(workload: Workload | None = None, spec: object = SMALL) -> Capacities:
    assert spec is SMALL or spec is LLAMA_2_70B
    model = SMALL if spec is SMALL else LLAMA_2_70B
    return Capacities(CostModel(model, "float16", 16, StepLimits()), workload or Workload())


@st.composite
def _pipelines(draw: st.DrawFn) -> Pipeline:
    """One to four seats over the small model's eight layers."""
    cuts = sorted(draw(st.sets(st.integers(1, 7), max_size=3)))
    seats = tuple(
        Seat(group=_group(draw), start=start, stop=stop)
        for start, stop in zip([0, *cuts], [*cuts, 8], strict=True)
    )
    hops = tuple(Hop(draw(st.floats(0, 0.05)), draw(st.floats(1e6, 1e10))) for _ in cuts)
    return Pipeline(seats=seats, hops=hops, back=Hop(draw(st.floats(0, 0.05)), 1e9))


def _group(draw: st.DrawFn) -> Group:
    device = Device(
        index=0,
        kind="cuda",
        name="",
        budget_bytes=draw(st.integers(2**29, 2**33)),
        flops_per_s=draw(st.floats(1e12, 1e15)),
        bytes_per_s=draw(st.floats(1e11, 1e13)),
    )
    fabric = Fabric(kind="", bytes_per_s=draw(st.floats(1e9, 1e12)), step_s=draw(st.floats(0, 1e-5)))
    return Group(device=device, fabric=fabric, tp=draw(st.sampled_from([1, 2, 4])), launch_s=2e-5)


def _simulated_period_s(pipeline: Pipeline, steps: list[float], payload: float, n_jobs: int) -> float:
    """Time between two micro-batches of a closed pipeline, by moving every job through it many times."""
    ways = [(hop.send_s(payload), hop.delay_s) for hop in pipeline.hops]
    servers = [(steps[0], 0.0)]
    for way, step in zip(ways, steps[1:], strict=True):
        servers += [way, (step, 0.0)]
    free = [0.0] * len(servers)
    ready = [0.0] * n_jobs
    rounds, started = 60, list[float]()
    for _ in range(rounds):
        for job in range(n_jobs):
            now = ready[job]
            for at, (busy_s, delay_s) in enumerate(servers):
                free[at] = now = max(now, free[at]) + busy_s
                now += delay_s
            ready[job] = now + pipeline.back.delay_s
            started.append(ready[job])
    half = len(started) // 2
    return (started[-1] - started[half - 1]) / (len(started) - half)


def _simulated_rate(capacities: Capacities, pipeline: Pipeline, batch: float, n_jobs: int) -> float:
    """Tokens per second of the closed pipeline with so many micro-batches of that size."""
    context = capacities.workload.mean_context
    steps = [
        sum(
            capacities.model.decode_layer_s(seat.group, layer, batch, context)
            for layer in SMALL.layers[seat.start : seat.stop]
        )
        for seat in pipeline.seats
    ]
    steps[-1] += capacities.model.head_s(pipeline.seats[-1].group, batch)
    return batch / _simulated_period_s(pipeline, steps, batch * capacities.model.hidden_bytes, n_jobs)


@settings(deadline=None, max_examples=30)
@given(_pipelines())
def test_the_rate_is_that_of_a_simulated_pipeline(pipeline: Pipeline) -> None:
    capacities = _capacities()
    found = capacities.decode(pipeline)
    if found.batch == 0:
        return
    rate = _simulated_rate(capacities, pipeline, found.batch, found.micro_batches)
    assert found.tokens_per_s == pytest.approx(rate, rel=0.01)
    assert found.tpot_s == pytest.approx(found.micro_batches * found.batch / rate, rel=0.01)


@settings(deadline=None, max_examples=30)
@given(pipeline=_pipelines(), n_jobs=st.integers(1, 12))
def test_no_other_number_of_micro_batches_is_better(pipeline: Pipeline, n_jobs: int) -> None:
    capacities = _capacities()
    resident = capacities.resident(pipeline)
    if resident < n_jobs:
        return
    rate = _simulated_rate(capacities, pipeline, min(resident / n_jobs, 256), n_jobs)
    assert rate <= capacities.decode(pipeline).tokens_per_s * 1.01


@settings(deadline=None, max_examples=30)
@given(_pipelines())
def test_resident_sequences_fit_and_one_more_would_not(pipeline: Pipeline) -> None:
    capacities = _capacities()
    resident, context = capacities.resident(pipeline), capacities.workload.mean_context

    def needed(seat: Seat, n_sequences: float) -> float:
        tp, n_layers = seat.group.tp, seat.stop - seat.start
        weights = -(-capacities.costs.weight_bytes(seat.start, seat.stop) // tp)
        beside = (weights + capacities.costs.workspace_bytes(seat.stop)) * 51 // 50
        kv = n_sequences * context * (n_layers + 1.25) * SMALL.kv_values_per_rank(tp) * 2
        return beside + kv

    budgets = [seat.group.device.budget_bytes for seat in pipeline.seats]
    pairs = list(zip(pipeline.seats, budgets, strict=True))
    if resident > 0:
        assert all(needed(seat, resident * (1 - 1e-9)) <= budget for seat, budget in pairs)
    assert any(needed(seat, resident * (1 + 1e-9) + 1e-6) > budget for seat, budget in pairs)


@settings(deadline=None, max_examples=30)
@given(pipeline=_pipelines(), factor=st.floats(1.0, 4.0), data=st.data())
def test_a_better_part_never_lowers_a_rate(pipeline: Pipeline, factor: float, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(pipeline.seats) - 1))
    seat = pipeline.seats[at]
    field = data.draw(st.sampled_from(["flops_per_s", "bytes_per_s", "budget_bytes"]))
    better = msgspec.structs.replace(
        seat.group.device,
        **{field: type(getattr(seat.group.device, field))(getattr(seat.group.device, field) * factor)},
    )
    seats = list(pipeline.seats)
    seats[at] = Seat(
        group=Group(device=better, fabric=seat.group.fabric, tp=seat.group.tp, launch_s=seat.group.launch_s),
        start=seat.start,
        stop=seat.stop,
    )
    hops = tuple(Hop(hop.delay_s / factor, hop.bytes_per_s * factor) for hop in pipeline.hops)
    upgraded = Pipeline(seats=tuple(seats), hops=hops, back=pipeline.back)
    for workload in (Workload(), Workload(slo=Slo(ttft_s=0.05, tpot_s=0.02))):
        capacities = _capacities(workload)
        for rates in (capacities.prefill, capacities.decode, capacities.mixed):
            before, after = rates(pipeline).requests_per_s, rates(upgraded).requests_per_s
            assert after >= before * (1 - 1e-6), rates


@settings(deadline=None, max_examples=30)
@given(pipeline=_pipelines(), limit_s=st.floats(1e-4, 1.0))
def test_a_limit_is_kept_and_costs_rate(pipeline: Pipeline, limit_s: float) -> None:
    free = _capacities().decode(pipeline)
    limited = _capacities(Workload(slo=Slo(tpot_s=limit_s))).decode(pipeline)
    looser = _capacities(Workload(slo=Slo(tpot_s=limit_s * 1.5))).decode(pipeline)
    if limited.tokens_per_s > 0:
        assert limited.tpot_s <= limit_s * (1 + 1e-9)
    assert limited.tokens_per_s <= looser.tokens_per_s * (1 + 1e-6)
    assert looser.tokens_per_s <= free.tokens_per_s * (1 + 1e-6)


@settings(deadline=None, max_examples=30)
@given(_pipelines())
def test_doing_both_is_slower_than_either(pipeline: Pipeline) -> None:
    capacities = _capacities()
    mixed = capacities.mixed(pipeline).requests_per_s
    assert mixed <= capacities.decode(pipeline).requests_per_s * (1 + 1e-9)
    if prefill := capacities.prefill(pipeline).requests_per_s:
        assert mixed <= prefill * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(_pipelines())
def test_the_busiest_part_of_a_mixed_replica_decides_its_balanced_rate(pipeline: Pipeline) -> None:
    mixed = _capacities().mixed(pipeline)
    if mixed.requests_per_s > 0:
        assert len(mixed.uses) == 2 * len(pipeline.seats)
        busiest = max(prompt + output for prompt, output in mixed.uses)
        assert mixed.requests_per_s == pytest.approx(1 / busiest)


def _mixed_24() -> Cluster:
    return cluster_of(read_fleet((FLEETS / "mixed-24.toml").read_text(encoding="utf-8")), "float16")


def _stage(node: str, devices: tuple[int, ...], start: int, stop: int) -> Stage:
    return Stage(
        node=node,
        devices=devices,
        start=start,
        stop=stop,
        kv_blocks=1,
        needed_bytes=0,
        room_bytes=0,
        predicted_step_s=0.0,
    )


def test_a_plans_replica_over_two_hosts_by_hand() -> None:
    """70B on 4 A100 (layers 0 to 60) and 4 L40 (60 to 80): what the formulas say, computed here again."""
    cluster = _mixed_24()
    pipeline = pipeline_of(
        [_stage("a100", (0, 1, 2, 3), 0, 60), _stage("l40", (0, 1, 2, 3), 60, 80)], cluster
    )
    workload = Workload(prompt_tokens=512, output_tokens=128)
    capacities = _capacities(workload, LLAMA_2_70B)
    a100, l40 = (seat.group for seat in pipeline.seats)
    layer, model = LLAMA_2_70B.layers[0], capacities.model
    assert (a100.tp, l40.tp) == (4, 4)
    found = capacities.prefill(pipeline)
    slow = 20 * model.prefill_layer_s(l40, layer, 512) + model.head_s(l40, 1)
    fast = 60 * model.prefill_layer_s(a100, layer, 512)
    payload = 512 * 8192 * 2
    assert found.requests_per_s == pytest.approx(1 / max(slow, fast))
    there_and_back_s = 2 * 1e-4
    assert found.latency_s == pytest.approx(slow + fast + there_and_back_s + payload / 12.5e9)
    decode = capacities.decode(pipeline)
    assert decode.batch * decode.micro_batches <= capacities.resident(pipeline) * (1 + 1e-9)
    assert decode.requests_per_s == pytest.approx(decode.tokens_per_s / 128)


def test_longer_contexts_leave_room_for_fewer_sequences() -> None:
    pipeline = pipeline_of([_stage("a100", (0, 1, 2, 3), 0, 80)], _mixed_24())
    alike = _capacities(Workload(prompt_tokens=512, output_tokens=128), LLAMA_2_70B)
    spread = LognormalLengths(prompt=512, output=128, prompt_cv=1.0, output_cv=1.5)
    spread_out = _capacities(Workload.of(spread), LLAMA_2_70B)
    assert alike.resident(pipeline) / spread_out.resident(pipeline) == pytest.approx(
        spread.mean_context / 576, rel=1e-9
    )


def test_what_does_not_fit_has_no_rate() -> None:
    pipeline = pipeline_of([_stage("l40", (0,), 0, 80)], _mixed_24())
    capacities = _capacities(spec=LLAMA_2_70B)
    assert capacities.prefill(pipeline).requests_per_s == 0
    assert capacities.decode(pipeline).tokens_per_s == 0
    assert capacities.mixed(pipeline).requests_per_s == 0


def test_a_prompt_that_comes_too_late_counts_for_nothing() -> None:
    pipeline = pipeline_of([_stage("a100", (0, 1, 2, 3), 0, 80)], _mixed_24())
    latency_s = _capacities(spec=LLAMA_2_70B).prefill(pipeline).latency_s
    for limit_s, is_kept in ((latency_s * 1.01, True), (latency_s * 0.99, False)):
        capacities = _capacities(Workload(slo=Slo(ttft_s=limit_s)), LLAMA_2_70B)
        assert (capacities.prefill(pipeline).requests_per_s > 0) is is_kept


def test_missing_ways_are_named() -> None:
    cluster = _mixed_24()
    alone = Cluster(nodes=cluster.nodes, links=())
    with pytest.raises(InvalidInput, match="no link from a100 to l40"):
        pipeline_of([_stage("a100", (0,), 0, 40), _stage("l40", (0,), 40, 80)], alone)
    bare = Cluster(
        nodes=tuple(msgspec.structs.replace(node, fabric=None) for node in cluster.nodes), links=cluster.links
    )
    with pytest.raises(InvalidInput, match="a100: no way between its devices is known"):
        pipeline_of([_stage("a100", (0, 1), 0, 80)], bare)


def test_a_group_of_unlike_devices_is_as_fast_as_its_slowest_and_as_roomy_as_its_tightest() -> None:
    text = """
[[host]]
name = "odd"
devices = [
  { name = "big", budget = 4e10, flops = { float16 = 1e14 }, bandwidth = 1e12 },
  { name = "quick", budget = 1e10, flops = { float16 = 3e14 }, bandwidth = 2e12 },
]
fabric_rate = 1e10
"""
    cluster = cluster_of(read_fleet(text), "float16")
    (seat,) = pipeline_of([_stage("odd", (0, 1), 0, 8)], cluster).seats
    device = seat.group.device
    assert (device.budget_bytes, device.flops_per_s, device.bytes_per_s) == (10**10, 1e14, 1e12)
    assert seat.group.tp == 2


def test_prefill_needs_room_for_the_prompt_it_computes_and_the_one_it_hands_over() -> None:
    capacities = _capacities()
    weights = capacities.costs.fixed_bytes(0, 8)
    kv = 2 * 512 * (8 + 1.25) * SMALL.kv_values_per_token * 2
    for budget, fits in ((weights + int(kv), True), (weights + int(kv) - 1, False)):
        device = Device(
            index=0, kind="cuda", name="", budget_bytes=budget, flops_per_s=1e14, bytes_per_s=1e12
        )
        group = Group(device=device, fabric=None, tp=1, launch_s=0.0)
        pipeline = Pipeline(seats=(Seat(group=group, start=0, stop=8),), hops=(), back=Hop(0.0, 1e9))
        assert (capacities.prefill(pipeline).requests_per_s > 0) is fits
