"""Layer times against what was measured (ids B1 to B8 of the planner's acceptance list), and what must always hold."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.catalogue import device_named, efficiency_of, link_named
from hexmesh.catalogue.efficiency import fitted
from hexmesh.catalogue.rates import fabric_of, sustained_bytes_per_s, sustained_flops_per_s, usable_bytes
from hexmesh.cluster import Device, Fabric
from hexmesh.model_spec import model_spec_from_config
from hexmesh.roofline import Group, Roofline, all_reduce_s

LLAMA_2_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
MODEL = Roofline(model_spec_from_config(LLAMA_2_70B), "float16")
LAYER = MODEL.spec.layers[0]
GPT_OSS = Roofline(
    model_spec_from_config({"model_type": "gpt_oss", "num_hidden_layers": 4, "num_local_experts": 8}),
    "bfloat16",
)


def _group(name: str, tp: int = 1) -> Group:
    entry = device_named(name)
    return Group(
        device=Device(
            index=0,
            kind=entry.kind,
            name=entry.name,
            budget_bytes=usable_bytes(entry.memory_bytes, entry.usable),
            flops_per_s=sustained_flops_per_s(entry, "float16"),
            bytes_per_s=sustained_bytes_per_s(entry),
        ),
        fabric=fabric_of(link_named(entry.link)),
        tp=tp,
        launch_s=efficiency_of(entry).launch_s,
    )


def _request_s(name: str, tp: int, prompt_tokens: int) -> tuple[float, float]:
    """Time to the first token and per token after it, end to end, framework included."""
    group, n_layers, added_s = _group(name, tp), MODEL.spec.n_layers, fitted().framework_step_s
    prefill_s = n_layers * MODEL.prefill_layer_s(group, LAYER, prompt_tokens)
    token_s = n_layers * MODEL.decode_layer_s(group, LAYER, 1, prompt_tokens)
    return prefill_s + MODEL.head_s(group, 1) + added_s, token_s + MODEL.head_s(group, 1) + added_s


def test_each_sequence_of_a_step_takes_its_own_time_beside_the_rates() -> None:
    group = _group("A100-SXM-80GB")
    slower = replace(group, device=msgspec.structs.replace(group.device, row_s=1e-5))
    for batch in (1, 8, 300):
        more_s = MODEL.decode_layer_s(slower, LAYER, batch, 500) - MODEL.decode_layer_s(
            group, LAYER, batch, 500
        )
        assert more_s == pytest.approx(batch * 1e-5)
    more_s = MODEL.prefill_layer_s(slower, LAYER, 700) - MODEL.prefill_layer_s(group, LAYER, 700)
    assert more_s == pytest.approx(1e-5)


@pytest.mark.parametrize(("name", "ms"), [("H100-SXM", 0.625), ("A100-SXM-80GB", 1.118), ("A40", 3.228)])
def test_b1_decode_of_one_token(name: str, ms: float) -> None:
    assert MODEL.decode_layer_s(_group(name), LAYER, 1, 0) == pytest.approx(ms / 1e3, rel=0.10)


@pytest.mark.parametrize(("name", "ms"), [("H100-SXM", 5.289), ("A100-SXM-80GB", 15.532), ("A40", 31.139)])
def test_b2_prefill_of_2048_tokens(name: str, ms: float) -> None:
    assert MODEL.decode_layer_s(_group(name), LAYER, 2048, 0) == pytest.approx(ms / 1e3, rel=0.12)


@pytest.mark.parametrize(
    ("name", "prompt_ms", "decode_ms"),
    [("A100-SXM-40GB", 14, 1.4), ("V100-SXM-16GB", 37, 2.3), ("L4", 72, 6.9), ("T4", 128, 7.1)],
)
def test_b3_whole_layers(name: str, prompt_ms: float, decode_ms: float) -> None:
    group = _group(name)
    assert MODEL.prefill_layer_s(group, LAYER, 2000) == pytest.approx(prompt_ms / 1e3, rel=0.20)
    assert MODEL.decode_layer_s(group, LAYER, 2, 3500) == pytest.approx(decode_ms / 1e3, rel=0.20)


@pytest.mark.parametrize(
    ("name", "tp", "ms"),
    [("H100-SXM", 4, 106), ("H100-SXM", 8, 78), ("A100-SXM-80GB", 4, 227), ("A100-SXM-80GB", 8, 154)],
)
def test_b4_prefill_end_to_end(name: str, tp: int, ms: float) -> None:
    assert _request_s(name, tp, 1024)[0] == pytest.approx(ms / 1e3, rel=0.20)


@pytest.mark.parametrize(("tp", "ratio"), [(4, 2.1), (8, 2.0)])
def test_b4_how_much_faster_an_h100_prefills(tp: int, ratio: float) -> None:
    a100, h100 = (_request_s(name, tp, 1024)[0] for name in ("A100-SXM-80GB", "H100-SXM"))
    assert a100 / h100 == pytest.approx(ratio, rel=0.20)


def test_b5_decoding_end_to_end_differs_less_than_prefill() -> None:
    (a100_prefill, a100), (h100_prefill, h100) = (
        _request_s(name, 4, 1024) for name in ("A100-SXM-80GB", "H100-SXM")
    )
    assert (h100, a100) == pytest.approx((29.4e-3, 44.9e-3), rel=0.15)
    assert a100 / h100 == pytest.approx(1.53, rel=0.15)
    assert a100 / h100 < 0.8 * a100_prefill / h100_prefill


@pytest.mark.parametrize(
    ("link", "small_ms", "large_ms", "algorithm_bytes_per_s"),
    [("nvlink4", 0.037, 0.322, 208e9), ("nvlink3", 0.062, 0.675, 99e9)],
)
def test_b7_all_reduce(link: str, small_ms: float, large_ms: float, algorithm_bytes_per_s: float) -> None:
    fabric, size = fabric_of(link_named(link)), 2**26
    assert fabric is not None
    assert all_reduce_s(fabric, 8, size) == pytest.approx(large_ms / 1e3, rel=0.25)
    assert size / all_reduce_s(fabric, 8, size) == pytest.approx(algorithm_bytes_per_s, rel=0.25)
    assert small_ms / 1e3 / 1.6 < all_reduce_s(fabric, 8, 2048) < small_ms / 1e3 * 1.6


@pytest.mark.parametrize(
    ("bytes_per_s", "seconds"),
    [(35.9e9, 4.7e-3), (7.8e9, 21.5e-3), (1.25e9, 0.134), (125e6, 1.34), (12.5e6, 13.4)],
)
def test_b8_kv_of_512_tokens_over_a_link(bytes_per_s: float, seconds: float) -> None:
    assert MODEL.kv_bytes(512) == 160 * 2**20
    assert MODEL.kv_bytes(512) / bytes_per_s == pytest.approx(seconds, rel=0.01)


def test_b8_kv_of_opt_30b_is_four_times_as_much() -> None:
    config = {
        "model_type": "opt",
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
    }
    opt = Roofline(model_spec_from_config(config), "float16")
    assert opt.kv_bytes(512) / MODEL.kv_bytes(512) == pytest.approx(4.2)


def test_a_window_caps_what_decode_reads_and_what_a_prompt_attends_to() -> None:
    group = _group("H100-SXM")
    sliding, full = GPT_OSS.spec.layers[:2]
    assert sliding.window_tokens == 128
    at_once = [GPT_OSS.decode_layer_s(group, sliding, 64, context) for context in (128, 4096)]
    assert at_once[0] == at_once[1]
    assert GPT_OSS.decode_layer_s(group, full, 64, 4096) > at_once[0]
    assert GPT_OSS.prefill_layer_s(group, full, 8192) > GPT_OSS.prefill_layer_s(group, sliding, 8192)


_DEVICES = st.builds(
    Device,
    index=st.just(0),
    kind=st.just("cuda"),
    name=st.just(""),
    budget_bytes=st.just(0),
    flops_per_s=st.floats(1e12, 1e15),
    bytes_per_s=st.floats(1e10, 1e13),
)
_FABRICS = st.builds(Fabric, kind=st.just(""), bytes_per_s=st.floats(1e9, 1e12), step_s=st.floats(0.0, 1e-5))


@settings(deadline=None)
@given(
    device=_DEVICES,
    fabric=_FABRICS,
    tp=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 256),
    context=st.floats(1, 1e5),
    factor=st.floats(1.0, 10.0),
    which=st.sampled_from(["flops_per_s", "bytes_per_s", "fabric"]),
)
def test_faster_parts_never_slow_a_layer_down(
    device: Device, fabric: Fabric, tp: int, batch: int, context: float, factor: float, which: str
) -> None:
    group = Group(device=device, fabric=fabric, tp=tp, launch_s=1e-5)
    if which == "fabric":
        faster = Group(
            device=device,
            fabric=msgspec.structs.replace(fabric, bytes_per_s=fabric.bytes_per_s * factor),
            tp=tp,
            launch_s=1e-5,
        )
    else:
        better = msgspec.structs.replace(device, **{which: getattr(device, which) * factor})
        faster = Group(device=better, fabric=fabric, tp=tp, launch_s=1e-5)
    for model in (MODEL, GPT_OSS):
        layer = model.spec.layers[0]
        assert model.decode_layer_s(faster, layer, batch, context) <= model.decode_layer_s(
            group, layer, batch, context
        )
        assert model.prefill_layer_s(faster, layer, context) <= model.prefill_layer_s(group, layer, context)


@settings(deadline=None)
@given(device=_DEVICES, batch=st.integers(1, 255), context=st.floats(1, 1e5))
def test_more_sequences_take_longer_and_give_no_fewer_tokens_a_second(
    device: Device, batch: int, context: float
) -> None:
    group = Group(device=device, fabric=None, tp=1, launch_s=1e-5)
    one, more = (MODEL.decode_layer_s(group, LAYER, n, context) for n in (batch, batch + 1))
    assert one <= more * (1 + 1e-12)
    assert (batch + 1) / more >= batch / one * (1 - 1e-12)
