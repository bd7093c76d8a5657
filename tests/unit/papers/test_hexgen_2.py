"""HexGen-2's flow network, KV sizes and budgets (ids A8, A10 and A12 of the planner's acceptance list)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.catalogue import device_named
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import model_spec_from_config
from hexmesh.papers.pd_flow import max_flow
from hexmesh.roofline import Roofline

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"


def test_a8_the_toy_network() -> None:
    found = max_flow(
        {"P1": 60, "P2": 70},
        {"D1": 65, "D2": 55},
        {("P1", "D1"): 40, ("P1", "D2"): 25, ("P2", "D1"): 30, ("P2", "D2"): 50},
    )
    assert found.value == 120
    assert (found.of_decode("D1"), found.of_decode("D2")) == (65, 55)


_CAPACITIES = st.integers(0, 50)


@settings(deadline=None)
@given(
    prefill=st.lists(_CAPACITIES, min_size=1, max_size=4),
    decode=st.lists(_CAPACITIES, min_size=1, max_size=4),
    data=st.data(),
)
def test_a_flow_keeps_every_capacity_and_equals_some_cut(
    prefill: list[int], decode: list[int], data: st.DataObject
) -> None:
    handoff = {
        (f"P{p}", f"D{d}"): data.draw(_CAPACITIES) for p in range(len(prefill)) for d in range(len(decode))
    }
    found = max_flow(
        {f"P{p}": capacity for p, capacity in enumerate(prefill)},
        {f"D{d}": capacity for d, capacity in enumerate(decode)},
        handoff,
    )
    assert all(0 <= flow <= handoff[ends] for ends, flow in found.flows.items())
    assert all(found.of_prefill(f"P{p}") <= capacity for p, capacity in enumerate(prefill))
    assert all(found.of_decode(f"D{d}") <= capacity for d, capacity in enumerate(decode))
    assert sum(found.flows.values()) == found.value
    cuts = (
        sum(prefill[p] for p in range(len(prefill)) if not p_side & 1 << p)
        + sum(decode[d] for d in range(len(decode)) if d_side & 1 << d)
        + sum(
            handoff[f"P{p}", f"D{d}"]
            for p in range(len(prefill))
            for d in range(len(decode))
            if p_side & 1 << p and not d_side & 1 << d
        )
        for p_side in range(1 << len(prefill))
        for d_side in range(1 << len(decode))
    )
    assert found.value == min(cuts)


def _model(config: dict[str, object]) -> Roofline:
    return Roofline(model_spec_from_config(config), "float16")


def test_a10_kv_of_the_two_models() -> None:
    llama = _model(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        }
    )
    opt = _model(
        {
            "model_type": "opt",
            "hidden_size": 7168,
            "ffn_dim": 28672,
            "num_hidden_layers": 48,
            "num_attention_heads": 56,
        }
    )
    assert (llama.kv_bytes(1), opt.kv_bytes(1)) == (320 * 2**10, 1.3125 * 2**20)
    assert (llama.kv_bytes(512), opt.kv_bytes(512)) == (160 * 2**20, 672 * 2**20)


def _price_per_h(name: str) -> float:
    fleet = read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8"))
    prices = [node.price_per_h for node in cluster_of(fleet, "float16").nodes]
    return sum(price for price in prices if price is not None)


def test_a12_budgets() -> None:
    assert _price_per_h("hexgen2-h100") / 8 == pytest.approx(3.69) == device_named("H100").price_per_h
    assert 20.5 / _price_per_h("hexgen2-h100") == pytest.approx(0.694, abs=5e-4)
    assert _price_per_h("hexgen2-5") == pytest.approx(20.5, abs=0.2)
    for name in ("hexgen2-1", "hexgen2-2", "hexgen2-3", "hexgen2-4"):
        assert 26.25 < _price_per_h(name) < 28.85
