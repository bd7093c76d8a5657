"""HexGen's figures with HexGen's simplifications (ids A1 to A7, A9 and A11 of the planner's acceptance list)."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from hexmesh.catalogue import device_named
from hexmesh.catalogue.rates import usable_bytes
from hexmesh.model_spec import model_spec_from_config
from hexmesh.papers.hexgen_cost import HexGenCost, Simplifications, gpt_spec
from hexmesh.papers.hexgen_layout import Machine, degree_splits, even_layers, group_plans, max_replicas
from hexmesh.papers.hexgen_network import delay_matrix, elbow, regions

GiB = 2**30
COST = HexGenCost(spec=gpt_spec(8192, 80))


def test_a1_weights_of_a_layer_and_of_all() -> None:
    assert COST.layer_bytes == 1_610_612_736
    assert 80 * COST.layer_bytes == 120 * GiB


@pytest.mark.parametrize(
    ("n_layers", "tp", "expected_gib"),
    [
        (48, 4, 18.244),
        (20, 2, 15.107),
        (12, 2, 9.068),
        (80, 8, 15.400),
        (40, 4, 15.205),
        (20, 1, 30.107),
        (10, 1, 15.059),
    ],
)
def test_a2_memory_of_a_stage(n_layers: int, tp: int, expected_gib: float) -> None:
    assert COST.memory_bytes(n_layers, tp) / GiB == pytest.approx(expected_gib, abs=6e-4)


@pytest.mark.parametrize(
    ("device", "n_layers", "tp", "fits"),
    [
        ("RTX-A6000", 48, 4, True),
        ("RTX-A5000", 20, 2, True),
        ("RTX-A4000", 12, 2, True),
        ("RTX-A4000", 80, 8, False),
        ("RTX-A4000", 10, 1, False),
    ],
)
def test_a3_the_motivating_case_fits_only_as_the_paper_lays_it_out(
    device: str, n_layers: int, tp: int, fits: bool
) -> None:
    entry = device_named(device)
    usable = usable_bytes(entry.memory_bytes, entry.usable)
    assert (COST.memory_bytes(n_layers, tp) <= usable) is fits


def test_a4_compute_of_a_layer() -> None:
    assert COST.compute_s(32) == pytest.approx(0.0531502, rel=1e-5)
    assert COST.compute_s(1) == pytest.approx(0.00322123, rel=1e-5)


@pytest.mark.parametrize(
    ("tp", "prefill_s", "decode_s"),
    [
        (2, 1.15886e-3, 3.46214e-4),
        (4, 2.21829e-3, 9.99322e-4),
        (8, 3.70801e-3, 2.28588e-3),
    ],
)
def test_a5_all_reduces(tp: int, prefill_s: float, decode_s: float) -> None:
    assert COST.tp_s(32, 80, tp) == pytest.approx(prefill_s, rel=1e-5)
    assert COST.tp_s(1, 80, tp) == pytest.approx(decode_s, rel=1e-5)


def test_a6_a_hop_of_a_request() -> None:
    assert COST.request_hop_s() == pytest.approx(1.179715e-4, rel=1e-5)


@pytest.mark.parametrize(
    (
        "n_gpus",
        "gib",
        "ability",
        "n_plans",
        "n_feasible",
        "degrees",
        "layers",
        "cost_s",
        "second",
        "second_s",
    ),
    [
        ([8], 24, 0.75, 18, 9, ((8,),), (80,), 2.9411, ((4, 4),), 5.5340),
        ([8, 8], 24, 0.75, 324, 306, ((8,), (8,)), (40, 40), 2.9412, ((4, 4), (8,)), 4.6590),
        ([8], 48, 1.0, 18, 18, ((8,),), (80,), 3.8470, ((4, 4),), 7.3459),
        ([4], 48, 1.0, 5, 4, ((4,),), (80,), 7.3459, ((2, 2),), 14.530),
    ],
)
def test_a7_the_best_layout_of_a_group(
    n_gpus: list[int],
    gib: int,
    ability: float,
    n_plans: int,
    n_feasible: int,
    degrees: tuple[tuple[int, ...], ...],
    layers: tuple[int, ...],
    cost_s: float,
    second: tuple[tuple[int, ...], ...],
    second_s: float,
) -> None:
    plans = group_plans(COST, [Machine(n, gib * GiB, ability) for n in n_gpus])
    feasible = [plan for plan in plans if plan.fits]
    assert (len(plans), len(feasible)) == (n_plans, n_feasible)
    assert (feasible[0].degrees, feasible[0].layers) == (degrees, layers)
    assert feasible[0].cost_s == pytest.approx(cost_s, abs=6e-5)
    assert sorted(feasible[1].degrees) == sorted(second)
    assert feasible[1].cost_s == pytest.approx(second_s, abs=6e-4)


def test_degrees_and_layers_are_dealt_out_as_published() -> None:
    assert sorted(degree_splits(4)) == [(1, 1, 1, 1), (1, 1, 2), (1, 3), (2, 2), (4,)]
    assert even_layers(80, 3) == (26, 27, 27)


def test_the_58_gpus_hold_at_most_twelve_replicas() -> None:
    regions_gib = (20 * 48 + 8 * 24, 16 * 24, 6 * 24, 8 * 24)
    assert max_replicas([gib * GiB for gib in regions_gib]) == 12


@pytest.mark.parametrize("seed", range(5))
def test_a9_k_means_finds_the_four_regions(seed: int) -> None:
    rng = random.Random(seed)
    delays = delay_matrix(rng)
    assert delays.shape == (58, 58)
    found = regions(delays, 4, rng)
    assert found == [0] * 28 + [1] * 16 + [2] * 8 + [3] * 6
    assert sorted(Counter(found).values(), reverse=True) == [28, 16, 8, 6]
    assert elbow(delays, rng) == 4


def test_a9_the_drawn_matrix_has_the_statistics_of_the_published_one() -> None:
    delays = delay_matrix(random.Random(0))
    inside = delays[(delays > 0) & (delays < 1)]
    between = delays[delays > 1]
    assert float(inside.mean()) == pytest.approx(0.474, abs=0.002)
    assert float(between.mean()) == pytest.approx(9.996, abs=0.01)
    assert not np.array_equal(delays, delays.T)


def test_a9_regions_are_found_in_any_order_of_the_gpus() -> None:
    rng = random.Random(1)
    order = rng.sample(range(58), 58)
    delays = delay_matrix(rng)[np.ix_(order, order)]
    truth = [0] * 28 + [1] * 16 + [2] * 8 + [3] * 6
    shuffled = [truth[at] for at in order]
    found = regions(delays, 4, rng)
    assert len(set(zip(found, shuffled, strict=True))) == 4


def test_a11_weights_of_opt_30b() -> None:
    cost = HexGenCost(spec=gpt_spec(7168, 48))
    assert 48 * cost.layer_bytes / GiB == pytest.approx(55.1, abs=0.05)


def test_what_the_simplifications_hide() -> None:
    """The real layer is 6.25 % larger, its KV an eighth, and TP divides it."""
    real = model_spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        }
    )
    exact = HexGenCost(spec=real, simplifications=Simplifications(kv_on_every_rank=False))
    assert exact.layer_bytes / COST.layer_bytes == pytest.approx(1.0625, rel=1e-3)
    assert COST.spec.kv_values_per_token == 8 * real.kv_values_per_token
    kv = 160 * 80 * real.kv_values_per_token * 2
    assert exact.memory_bytes(80, 8) == pytest.approx(
        80 * exact.layer_bytes / 8 + kv / 8 + 4 * 160 * 8192 * 2
    )


def test_rates_and_lengths_of_their_own() -> None:
    cost = HexGenCost(
        spec=gpt_spec(8192, 80),
        simplifications=Simplifications(one_rate=False, output_counts_prompt=False),
        flops_per_s=4e12,
        bytes_per_s=2e12,
    )
    assert cost.compute_s(1) == pytest.approx(1_610_612_736 / 2e12 + 24 * 8192**2 / 4e12)
    assert cost.decode_steps == 128
    assert COST.decode_steps == 96
