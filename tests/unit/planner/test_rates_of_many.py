"""Rates in numpy against the score's own, one layout at a time."""

from __future__ import annotations

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.planner.every_layout import PRICES, Choice, EveryLayout, polygon_reach
from hexmesh.planner.handoff_caps import HandoffCaps
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import ROLES
from hexmesh.planner.problem import Problem
from hexmesh.score import best_flow
from hexmesh.score.plan_score import kv_layer_bytes
from hexmesh.workload import CLASSES, Slo, Workload
from tests.unit.planner.small_fleets import cluster, model, problem

EXPERTS = model_spec_from_config(
    {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
)
TIED = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 20000,
        "num_hidden_layers": 5,
        "num_attention_heads": 64,
        "num_key_value_heads": 2,
        "vocab_size": 200000,
        "tie_word_embeddings": True,
    }
)


def _problem(seed: int, spec: ModelSpec, slo: Slo) -> Problem:
    fleet = cluster(random.Random(seed), 4, 5)
    nodes = tuple(
        msgspec.structs.replace(
            node, devices=tuple(msgspec.structs.replace(one, row_s=1e-5) for one in node.devices)
        )
        for node in fleet.nodes
    )
    fleet = msgspec.structs.replace(fleet, nodes=nodes)
    base = problem(fleet, 5, slo=slo, workload=Workload.of(CLASSES["LPHD"], slo=slo))
    return replace(base, spec=spec)


@pytest.mark.parametrize("slo", [Slo(), Slo(tpot_s=0.02), Slo(ttft_s=0.03, tpot_s=0.004)])
@pytest.mark.parametrize("spec", [model(5), EXPERTS, TIED], ids=["dense", "experts", "tied"])
def test_every_rate_is_the_score_s_own(spec: ModelSpec, slo: Slo) -> None:
    n_compared = 0
    for seed in range(4):
        given = _problem(seed, spec, slo)
        for role, choice in EveryLayout(given).of(given.whole).items():
            for at in range(0, len(choice.parts), 1 + len(choice.parts) // 8):
                layout = given.layouts.rated(choice.parts[at], role)
                assert layout is not None
                expected = layout.prefill, layout.decode if role != "prefill" else 0.0
                assert (choice.prefill[at], choice.decode[at]) == pytest.approx(expected, rel=1e-9)
                if role == "mixed":
                    halfway = choice.reach[at, len(PRICES) // 2]
                    assert halfway * (1 + 1e-9) >= layout.requests_per_s
                n_compared += 1
    assert n_compared > 0


@pytest.mark.parametrize("seed", range(8))
def test_a_polygon_reaches_as_far_as_its_best_point(seed: int) -> None:
    """Against a fine grid of points, and against the corner of a single row."""
    rng = np.random.default_rng(seed)
    uses, prefill, decode = rng.uniform(0.01, 0.3, (5, 6, 2)), rng.uniform(3, 20, 5), rng.uniform(3, 20, 5)
    found = polygon_reach(prefill, decode, uses)
    for at in range(5):
        x = np.linspace(0, prefill[at], 4000)
        y = np.minimum(((1 - x[:, None] * uses[at, :, 0]) / uses[at, :, 1]).min(axis=1), decode[at])
        x, y = x[y >= 0], y[y >= 0]
        grid = (x[:, None] * PRICES + y[:, None] * (1 - PRICES)).max(axis=0)
        assert found[at] == pytest.approx(grid, rel=2e-3)
        assert (found[at] >= grid * (1 - 1e-9)).all()


def _layout(given: Problem, choice: Choice, at: int) -> Layout:
    found = given.layouts.rated(choice.parts[at], choice.role)
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(10))
def test_a_cap_is_what_one_pair_alone_hands_over(seed: int) -> None:
    """With replicas that are faster than any wire."""
    given = problem(cluster(random.Random(seed), 4, 5, slow=True), 5, roles=frozenset(ROLES) - {"mixed"})
    layer_bytes = kv_layer_bytes(given.capacities)
    found = EveryLayout(given).of(given.whole)
    if len(found) < 2:
        pytest.skip("nothing fits")
    prefill, decode = found["prefill"], found["decode"]
    caps = HandoffCaps(given.cluster, layer_bytes).of(prefill.placements[0], decode.placements[0])
    for p in range(0, len(prefill.parts), 1 + len(prefill.parts) // 5):
        for d in range(0, len(decode.parts), 1 + len(decode.parts) // 5):
            cap = caps[prefill.placements[1][p], decode.placements[1][d]]
            pair = _layout(given, prefill, p), _layout(given, decode, d)
            source, target = given.rates(pair)
            rates = [replace(source, prefill=1e9), replace(target, decode=1e9)]
            flow = best_flow(rates, given.network, layer_bytes).requests_per_s
            assert flow == pytest.approx(min(cap, 1e9), rel=1e-6)
