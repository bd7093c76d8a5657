"""Counts of models that people serve, from their published config values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hexmesh.errors import InvalidInput
from hexmesh.model_spec import model_spec_from_config

GiB, KiB = 2**30, 2**10


def _config(model_type: str, hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


KNOWN: dict[str, dict[str, Any]] = {
    "Llama-2-70B": _config("llama", 8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=32000),
    "Llama-3-70B": _config("llama", 8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=128256),
    "OPT-30B": {
        "model_type": "opt",
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "vocab_size": 50272,
        "word_embed_proj_dim": 7168,
    },
    "Mixtral-8x7B": _config("mixtral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000),
    "DeepSeek-V2-Lite": _config(
        "deepseek_v2",
        2048,
        10944,
        27,
        16,
        num_key_value_heads=16,
        q_lora_rank=None,
        first_k_dense_replace=1,
        moe_intermediate_size=1408,
        num_experts_per_tok=6,
        vocab_size=102400,
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe", 2048, 6144, 48, 32, num_key_value_heads=4, head_dim=128, vocab_size=151936
    ),
    "Gemma-2-27B": _config("gemma2", 4608, 36864, 46, 32, num_key_value_heads=16, head_dim=128),
    "Gemma-3-27B": _config(
        "gemma3_text",
        5376,
        21504,
        62,
        32,
        num_key_value_heads=16,
        head_dim=128,
        sliding_window=1024,
        vocab_size=262208,
    ),
    "gpt-oss-20b": _config("gpt_oss", 2880, 2880, 24, 64, num_key_value_heads=8, num_local_experts=32),
    "gpt-oss-120b": _config("gpt_oss", 2880, 2880, 36, 64, num_key_value_heads=8, num_local_experts=128),
}


def _build(config: dict[str, Any]) -> torch.nn.Module:
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
        ("Llama-2-70B", 68_976_648_192),
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


def _windows_of_modules(config: dict[str, Any]) -> list[int | None]:
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
