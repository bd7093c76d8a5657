"""Counts from config.json against the modules that transformers builds on the meta device."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hexmesh.cost import CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec, model_spec_from_config, supported_model_types

_LAYER_OF = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_HEAD_DIM_IS_FIXED = {"gpt2", "gpt_bigcode", "gpt_neox", "opt", "stablelm", "olmoe", "gptj", "falcon"}


def _dims(rng: random.Random, model_type: str) -> dict[str, Any]:
    """Odd sizes under the key names that most families share."""
    kv_heads = rng.choice((1, 2, 3))
    heads = kv_heads * rng.choice((1, 2, 3))
    config = {
        "vocab_size": rng.randrange(51, 300),
        "hidden_size": heads * rng.choice((4, 10, 12)),
        "intermediate_size": rng.randrange(17, 90),
        "num_hidden_layers": rng.randrange(2, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": rng.randrange(33, 200),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": 3,
        "eos_token_id": [4, 5],
        "pad_token_id": None,
    }
    if model_type not in _HEAD_DIM_IS_FIXED and rng.random() < 0.5:
        config["head_dim"] = rng.choice((6, 14, 16))
    return config


def _gpt2(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    own = {
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_positions": config["max_position_embeddings"],
        "n_inner": rng.choice((None, config["intermediate_size"])),
    }
    shared = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return own | {key: config[key] for key in shared}


def _opt(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    config["ffn_dim"] = config.pop("intermediate_size")
    config["word_embed_proj_dim"] = rng.choice((config["hidden_size"], 22))
    return config


def _deepseek(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    config.pop("head_dim", None)
    config["num_key_value_heads"] = config["num_attention_heads"]
    return config | {
        "q_lora_rank": rng.choice((None, 11)),
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "first_k_dense_replace": rng.choice((0, 1)),
        "moe_intermediate_size": rng.randrange(5, 40),
        "n_shared_experts": rng.randrange(1, 3),
    }


def _falcon(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    config["ffn_hidden_size"] = config.pop("intermediate_size")
    config["num_kv_heads"] = config.pop("num_key_value_heads")
    if rng.random() < 0.3:
        config["num_ln_in_parallel_attn"] = 1
    return config


_OWN_KEYS = {
    "falcon": _falcon,
    "gptj": _gpt2,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "opt": _opt,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
_FLAGS = {
    "arcee": ("attention_bias", "mlp_bias"),
    "cohere": ("attention_bias", "use_qk_norm"),
    "cohere2": ("attention_bias",),
    "ernie4_5": ("use_bias",),
    "falcon": ("bias", "new_decoder_architecture", "multi_query", "parallel_attn"),
    "glm": ("attention_bias",),
    "glm4": ("attention_bias",),
    "glm4_moe": ("attention_bias", "use_qk_norm"),
    "granitemoe": ("attention_bias",),
    "olmo3": ("attention_bias",),
    "phimoe": ("attention_bias", "lm_head_bias"),
    "seed_oss": ("attention_bias", "attention_out_bias", "mlp_bias"),
    "deepseek_v2": ("attention_bias", "mlp_bias"),
    "deepseek_v3": ("attention_bias",),
    "gpt_bigcode": ("multi_query",),
    "gpt_oss": ("attention_bias",),
    "olmoe": ("attention_bias",),
    "llama": ("attention_bias", "mlp_bias"),
    "qwen2_moe": ("qkv_bias",),
    "qwen3": ("attention_bias",),
    "qwen3_moe": ("attention_bias",),
    "gemma": ("attention_bias",),
    "gemma2": ("attention_bias",),
    "gemma3_text": ("attention_bias",),
    "olmo": ("attention_bias",),
    "olmo2": ("attention_bias",),
    "granite": ("attention_bias", "mlp_bias"),
    "smollm3": ("attention_bias", "mlp_bias"),
    "stablelm": ("use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
    "starcoder2": ("use_bias",),
    "phi": ("qk_layernorm",),
    "gpt_neox": ("attention_bias",),
    "opt": (
        "enable_bias",
        "layer_norm_elementwise_affine",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
    ),
}
_EXPERTS = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
    "gpt_oss": "num_local_experts",
    "granitemoe": "num_local_experts",
    "phimoe": "num_local_experts",
    "glm4_moe": "n_routed_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}


def _random_config(model_type: str, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{model_type}/{seed}")
    config = _dims(rng, model_type)
    if model_type in _OWN_KEYS:
        config = _OWN_KEYS[model_type](config, rng)
    config |= {flag: rng.random() < 0.5 for flag in _FLAGS.get(model_type, ())}
    if model_type == "phi":
        config.pop("head_dim", None)  # its query norm ignores head_dim
    if model_type in _EXPERTS:
        config |= {_EXPERTS[model_type]: rng.randrange(2, 9), "num_experts_per_tok": 2}
    if model_type.startswith("qwen") and model_type in _EXPERTS:
        config |= {
            "moe_intermediate_size": rng.randrange(5, 40),
            "decoder_sparse_step": rng.choice((1, 2)),
            "mlp_only_layers": rng.choice(([], [0], [1])),
        }
    if model_type == "qwen2_moe":
        config["shared_expert_intermediate_size"] = rng.randrange(5, 40)
    return {"model_type": model_type, **config}


def _build(config: dict[str, Any]) -> torch.nn.Module:
    own = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **own)
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(hf_config)
    return model


def _layer_params(model: torch.nn.Module, n_layers: int) -> tuple[int, ...]:
    counts = [0] * n_layers
    for name, parameter in model.named_parameters():
        if found := _LAYER_OF.search(f".{name}"):
            counts[int(found.group(1))] += parameter.numel()
    return tuple(counts)


@pytest.mark.parametrize("model_type", supported_model_types())
@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_transformers(model_type: str, seed: int) -> None:
    config = _random_config(model_type, seed)
    spec, model = model_spec_from_config(config), _build(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert (spec.n_params, spec.layer_params) == (expected, _layer_params(model, spec.n_layers))
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    assert spec.embedding_params == embedding.weight.numel()
    assert spec.eos_token_ids == (4, 5)


@pytest.mark.parametrize("model_type", supported_model_types())
def test_missing_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    spec, hf_config = model_spec_from_config({"model_type": model_type}), AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    assert spec.n_params == sum(parameter.numel() for parameter in model.parameters())
    eos = hf_config.eos_token_id
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    assert (
        spec.eos_token_ids,
        spec.vocab_size,
        spec.max_position_tokens,
        spec.ties_embeddings,
    ) == (
        ids,
        hf_config.vocab_size,
        hf_config.max_position_embeddings,
        hf_config.tie_word_embeddings,
    )


def test_at_least_twelve_architectures() -> None:
    assert len(supported_model_types()) >= 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_one_stage_are_the_bytes_of_the_model(dtype: Any) -> None:
    for model_type in supported_model_types():
        config = _random_config(model_type, seed=9)
        spec, model = model_spec_from_config(config), _build(config).to(getattr(torch, dtype))
        whole = CostModel(spec, dtype, 16, StepLimits()).weight_bytes(0, spec.n_layers)
        assert whole == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen3", "gemma2", "olmo2", "gpt2", "gpt_bigcode", "opt", "gpt_neox", "phi3", "deepseek_v2"],
)
def test_kv_per_token_is_what_the_cache_of_transformers_holds(model_type: str) -> None:
    config = _random_config(model_type, seed=2) | {"tie_word_embeddings": True}
    if model_type == "deepseek_v2":
        config["first_k_dense_replace"] = 9  # experts do not run on the meta device
    spec, model = model_spec_from_config(config), _build(config)
    n_tokens = 7
    with torch.no_grad():
        cache = model(input_ids=torch.zeros((1, n_tokens), dtype=torch.long, device="meta")).past_key_values
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert held == [n_tokens * spec.kv_values_per_token] * spec.n_layers


def test_flops_count_active_experts_only() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    spec = model_spec_from_config(config)
    attention = 4096 * (4096 + 1024 + 1024) + 4096 * 4096
    expert = 3 * 4096 * 14336
    assert spec.layers[0].flops_per_token == 2 * (attention + 8 * 4096 + 2 * expert)
    assert spec.layers[0].params_read(1) == pytest.approx(spec.layers[0].params - 6 * expert)
    assert spec.layers[0].params_read(10_000) == pytest.approx(spec.layers[0].params)


def test_dense_first_layers_differ_from_expert_layers() -> None:
    spec = model_spec_from_config({"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]})
    assert len(set(spec.layer_params)) == 2
    assert spec.layer_params[0] == spec.layer_params[1] < spec.layer_params[2]


def test_end_of_text_of_the_generation_config_wins() -> None:
    spec = model_spec_from_config(
        {"model_type": "llama", "eos_token_id": 2}, generation_config={"eos_token_id": [7, 8]}
    )
    assert spec.eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mamba2"}, "mamba2"),
        ({}, "None"),
        ({"model_type": "llama", "hidden_size": "4096"}, "hidden_size"),
        ({"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 4}, "6 attention heads"),
        ({"model_type": "llama", "attention_bias": 3}, "attention_bias"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "llama", "eos_token_id": "</s>"}, "</s>"),
    ],
)
def test_what_has_no_formulas_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(named)):
        model_spec_from_config(config)


def test_the_refusal_of_a_type_names_those_that_are_supported() -> None:
    with pytest.raises(InvalidInput) as refusal:
        model_spec_from_config({"model_type": "bert"})
    assert all(model_type in refusal.value.next_step for model_type in supported_model_types())


def test_the_spec_is_a_value() -> None:
    first, second = (model_spec_from_config({"model_type": "gpt2"}) for _ in range(2))
    assert first == second
    assert isinstance(first, ModelSpec)
    assert hash(first) == hash(second)
