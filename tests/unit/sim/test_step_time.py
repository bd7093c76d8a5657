"""A stage's time for a step against the score's roofline, of which it is the general form."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.cluster import Device, Fabric
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.roofline import Group, Roofline
from hexmesh.score import Seat
from hexmesh.serving.batcher import ScheduledRow
from hexmesh.sim.step_time import StageTimes, decode_load, load_of, windows_of
from tests.unit.serving.fake_replica import sequence
from tests.unit.sim.plans import SMALL

MIXTURE = model_spec_from_config(
    {
        "model_type": "mixtral",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "vocab_size": 1000,
    }
)
WINDOWED = model_spec_from_config(
    {
        "model_type": "mistral",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 100,
        "vocab_size": 1000,
    }
)
SPECS = st.sampled_from([SMALL, MIXTURE, WINDOWED])


@st.composite
def groups(draw: st.DrawFn) -> Group:
    device = Device(
        index=0,
        kind="cuda",
        name="",
        budget_bytes=2**34,
        flops_per_s=draw(st.floats(1e12, 1e15)),
        bytes_per_s=draw(st.floats(1e11, 1e13)),
        row_s=draw(st.sampled_from([0.0, 1e-5])),
    )
    fabric = Fabric(kind="", bytes_per_s=draw(st.floats(1e9, 1e12)), step_s=draw(st.floats(0, 1e-5)))
    return Group(
        device=device, fabric=fabric, tp=draw(st.sampled_from([1, 2, 4])), launch_s=2e-5, step_s=1e-4
    )


def _row(start: int, n_tokens: int, n_wanted: int) -> ScheduledRow:
    return ScheduledRow(sequence("a", start + n_tokens), start, n_tokens, n_wanted)


def _times(group: Group, spec: ModelSpec, start: int, stop: int) -> StageTimes:
    return StageTimes(Seat(group=group, start=start, stop=stop), spec, "float16")


def _seconds(times: StageTimes, spec: ModelSpec, rows: list[ScheduledRow]) -> float:
    return times.seconds(load_of(rows, windows_of(spec)))


@settings(deadline=None, max_examples=50)
@given(group=groups(), spec=SPECS, batch=st.integers(1, 300), context=st.integers(1, 3000))
def test_decoding_rows_alone_take_what_the_score_says(
    group: Group, spec: ModelSpec, batch: int, context: int
) -> None:
    model = Roofline(spec, "float16")
    expected = sum(model.decode_layer_s(group, layer, batch, context) for layer in spec.layers)
    expected += model.head_s(group, batch) + group.step_s
    times = _times(group, spec, 0, spec.n_layers)
    rows = [_row(context - 1, 1, 1) for _ in range(batch)]
    assert _seconds(times, spec, rows) == pytest.approx(expected)
    assert times.seconds(decode_load([context] * batch, 0, windows_of(spec))) == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(group=groups(), spec=SPECS, n_tokens=st.integers(2, 3000))
def test_a_whole_prompt_alone_takes_what_the_score_says(group: Group, spec: ModelSpec, n_tokens: int) -> None:
    model = Roofline(spec, "float16")
    layers_s = sum(model.prefill_layer_s(group, layer, n_tokens) for layer in spec.layers[:3])
    times = _times(group, spec, 0, 3)
    assert _seconds(times, spec, [_row(0, n_tokens, 1)]) == pytest.approx(layers_s + group.step_s)


@settings(deadline=None, max_examples=50)
@given(
    group=groups(),
    spec=SPECS,
    contexts=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
    chunk=st.tuples(st.integers(0, 2000), st.integers(2, 256)),
)
def test_both_together_take_no_less_than_either_and_no_more_than_both(
    group: Group, spec: ModelSpec, contexts: list[int], chunk: tuple[int, int]
) -> None:
    times = _times(group, spec, 0, spec.n_layers)
    decoding, prompt = [_row(one, 1, 1) for one in contexts], [_row(*chunk, 0)]
    apart = [_seconds(times, spec, rows) for rows in (decoding, prompt)]
    together = _seconds(times, spec, decoding + prompt)
    assert max(apart) * (1 - 1e-9) <= together <= sum(apart) * (1 + 1e-9)


@settings(deadline=None, max_examples=50)
@given(
    group=groups(),
    spec=st.sampled_from([SMALL, WINDOWED]),
    n_tokens=st.integers(20, 1000),
    share=st.floats(0.05, 0.95),
)
def test_a_prompt_in_chunks_does_the_same_multiplications(
    group: Group, spec: ModelSpec, n_tokens: int, share: float
) -> None:
    cut = max(2, min(n_tokens - 2, round(share * n_tokens)))
    windows = windows_of(spec)
    whole = load_of([_row(0, n_tokens, 1)], windows)
    parts = [load_of([_row(0, cut, 0)], windows), load_of([_row(cut, n_tokens - cut, 1)], windows)]
    for window in windows:
        products = sum(part.attended[window].prompt_products for part in parts)
        assert products == pytest.approx(whole.attended[window].prompt_products)
    assert sum(part.n_heads for part in parts) == whole.n_heads == 1


def test_later_contexts_are_longer_up_to_the_window() -> None:
    load = decode_load([50, 98, 200], 5, (None, 100))
    assert load.attended[None].decode_tokens == 55 + 103 + 205
    assert load.attended[100].decode_tokens == 55 + 100 + 100
