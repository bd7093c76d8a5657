"""Tiny random models of every supported architecture, saved as real model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 160

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "llama": {},
    "mistral": {"sliding_window": 12},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmo2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32, "init_std": 0.25},
    "phi3": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "mlp_only_layers": [1]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0]},
    "starcoder2": {"sliding_window": 12},
}


_WITHOUT_GROUPED_HEADS = ("gpt2", "gpt_neox", "opt")
_SEEDS = {"granite": 1, "olmo2": 3, "qwen2_moe": 1, "qwen3_moe": 4}
"""Where seed 0 gives a reference whose two likeliest tokens come too close somewhere."""


def save_tiny_model(model_type: str, folder: Path, **save_options: Any) -> PreTrainedModel:
    """Make the model, save it to `folder` and return what `transformers` reads back from there."""
    torch.manual_seed(_SEEDS.get(model_type, 0))
    options = {**_SMALL, **TINY_CONFIGS[model_type]}
    if model_type in _WITHOUT_GROUPED_HEADS:
        del options["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or "bias" in name or "sinks" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, **save_options)
    return read_reference(folder)


def read_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The one-process reference: eager attention, no end-of-sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model
