"""Counts of models that people serve, from their published config values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hexmesh.errors import InvalidInput
from hexmesh.model_spec import model_spec_from_config
from hexmesh.model_spec.known import KNOWN, known_config, unknown_model

GiB, KiB = 2**30, 2**10


def _build(config: Mapping[str, Any]) -> torch.nn.Module:
    own = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **own)
        )
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_counts_equal_transformers(name: str) -> None:
    spec, model = model_spec_from_config(KNOWN[name]), _build(KNOWN[name])
    assert spec.n_params == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-2-13B", 13_015_864_320),
        ("Llama-2-70B", 68_976_648_192),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mixtral-8x7B", 46_702_792_704),
        ("DeepSeek-V2-Lite", 15_706_484_224),
        ("Qwen3-30B-A3B", 30_532_122_624),
        ("Gemma-2-27B", 27_227_128_320),
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt-oss-120b", 116_829_156_672),
    ],
)
def test_counts_are_the_published_ones(name: str, n_params: int) -> None:
    assert model_spec_from_config(KNOWN[name]).n_params == n_params


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("Llama-2-70B", 320 * KiB),
        ("OPT-30B", 1344 * KiB),
        ("DeepSeek-V2-Lite", 27 * (512 + 64) * 2),
        ("Qwen3-30B-A3B", 96 * KiB),
    ],
)
def test_kv_bytes_of_a_token(name: str, per_token: int) -> None:
    spec = model_spec_from_config(KNOWN[name])
    assert spec.n_layers * spec.kv_values_per_token * 2 == per_token


@pytest.mark.parametrize(
    ("name", "active"),
    [
        ("Mixtral-8x7B", 12.88e9),
        ("DeepSeek-V2-Lite", 2.66e9),
        ("Qwen3-30B-A3B", 3.35e9),
        ("gpt-oss-20b", 3.6e9),
    ],
)
def test_active_parameters_are_about_what_their_makers_say(name: str, active: float) -> None:
    spec = model_spec_from_config(KNOWN[name])
    used = sum(layer.flops_per_token // 2 for layer in spec.layers) + spec.head_matmul_params
    assert used + spec.embedding_params == pytest.approx(active, rel=0.19)


def _windows_of_modules(config: Mapping[str, Any]) -> list[int | None]:
    """What the attention modules of every layer were built with."""
    model = _build(config)
    modules = [layer.self_attn for layer in model.model.layers]
    is_per_layer = any(hasattr(module, "sliding_window") for module in modules)
    everywhere = None if is_per_layer else getattr(model.config, "sliding_window", None)
    return [
        (getattr(module, "sliding_window", everywhere) or None)
        if getattr(module, "is_sliding", True)
        else None
        for module in modules
    ]


_SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {"sliding_window": 7}),
        ("phi3", {"sliding_window": 7}),
        ("starcoder2", {"sliding_window": 7}),
        ("gemma2", {}),
        ("gemma2", {"sliding_window": 9}),
        ("gemma3_text", {}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7 + ["sliding_attention"]}),
        ("gpt_oss", {"num_local_experts": 2}),
        ("qwen2", {"sliding_window": 7, "max_window_layers": 3}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 5, "num_experts": 2}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 3}),
        ("qwen3_moe", {"use_sliding_window": True, "num_experts": 2}),
        ("qwen3_moe", {"num_experts": 2}),
        ("ministral3", {"sliding_window": 7}),
        ("phimoe", {"sliding_window": 7, "num_local_experts": 2}),
        ("olmo3", {}),
        ("exaone4", {}),
        ("exaone4", {"sliding_window_pattern": 3}),
        ("cohere2", {}),
        ("cohere2", {"sliding_window_pattern": 2}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [1, 0] * 4}),
    ],
)
def test_windows_are_those_of_the_modules(model_type: str, more: dict[str, Any]) -> None:
    config = {"model_type": model_type, **_SMALL, "num_hidden_layers": 8, **more}
    spec = model_spec_from_config(config)
    assert [layer.window_tokens for layer in spec.layers] == _windows_of_modules(config)


def test_a_window_bounds_what_a_layer_sees() -> None:
    sliding, full = model_spec_from_config(KNOWN["gpt-oss-20b"]).layers[:2]
    assert (sliding.seen_tokens(1000), full.seen_tokens(1000)) == (128, 1000)
    assert sliding.seen_tokens(100) == 100


def test_latents_are_copied_to_every_rank_and_heads_are_dealt_out() -> None:
    latent, grouped = (model_spec_from_config(KNOWN[name]) for name in ("DeepSeek-V2-Lite", "Llama-2-70B"))
    assert [latent.kv_values_per_rank(tp) for tp in (1, 4)] == [576, 576]
    assert [grouped.kv_values_per_rank(tp) for tp in (1, 2, 8, 16)] == [2048, 1024, 256, 256]


def test_degrees_that_attention_splits_into() -> None:
    spec = model_spec_from_config(KNOWN["OPT-30B"])
    assert [tp for tp in range(1, 17) if spec.splits_into(tp)] == [1, 2, 4, 7, 8, 14]
    spec = model_spec_from_config(KNOWN["Llama-2-70B"])
    assert [tp for tp in range(1, 17) if spec.splits_into(tp)] == [1, 2, 4, 8, 16]


def test_attention_on_latents_costs_more_than_on_keys_at_hand() -> None:
    spec = model_spec_from_config(KNOWN["DeepSeek-V2-Lite"])
    assert spec.attention_flops == 2 * 16 * (192 + 128)
    assert spec.decode_attention_flops == 2 * 16 * (576 + 512)
    dense = model_spec_from_config(KNOWN["Llama-2-70B"])
    assert dense.decode_attention_flops == dense.attention_flops


def test_the_language_part_of_a_model_that_sees_is_counted() -> None:
    text = {key: value for key, value in KNOWN["Gemma-3-27B"].items() if key != "model_type"}
    spec = model_spec_from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert spec == model_spec_from_config(KNOWN["Gemma-3-27B"])
    with pytest.raises(InvalidInput, match="text_config"):
        model_spec_from_config({"model_type": "gemma3"})


def test_layer_types_too_short_are_refused() -> None:
    with pytest.raises(InvalidInput, match="layer_types"):
        model_spec_from_config({"model_type": "gemma2", "layer_types": ["full_attention"]})


def test_known_models_are_found_whatever_the_case() -> None:
    assert known_config("llama-2-70b") == KNOWN["Llama-2-70B"]
    assert known_config("llama") is None
    assert "write Llama-3-70B" in unknown_model("llama-3-70").one_line()
    assert "Mixtral-8x7B" in unknown_model("xyz").one_line()
