"""Configs of models that people plan for, so that a plan needs no download: what their config.json says, by name."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from hexmesh.errors import InvalidInput


def _config(model_type: str, hidden: int, mlp: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


KNOWN: Mapping[str, Mapping[str, Any]] = {
    "Llama-2-7B": _config("llama", 4096, 11008, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    "Llama-2-13B": _config("llama", 5120, 13824, 40, 40, vocab_size=32000, max_position_embeddings=4096),
    "Llama-2-70B": _config(
        "llama", 8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096
    ),
    "Llama-3-8B": _config(
        "llama", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192
    ),
    "Llama-3-70B": _config(
        "llama", 8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192
    ),
    "OPT-30B": {
        "model_type": "opt",
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "vocab_size": 50272,
        "word_embed_proj_dim": 7168,
        "max_position_embeddings": 2048,
    },
    "Mixtral-8x7B": _config(
        "mixtral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000, max_position_embeddings=32768
    ),
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
        max_position_embeddings=163840,
    ),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
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


def known_config(name: str) -> Mapping[str, Any] | None:
    """The config of that name, whatever its case; None if it is none of these."""
    return next((config for known, config in KNOWN.items() if known.lower() == name.lower()), None)


def unknown_model(text: str) -> InvalidInput:
    """The error that `text` names no model to plan for."""
    names = {name.lower(): name for name in KNOWN}
    close = get_close_matches(text.lower(), names, n=1)
    hint = f"write {names[close[0]]}" if close else f"one of {', '.join(KNOWN)}"
    return InvalidInput(
        f"{text!r} is no model folder, config.json, hub id or known name",
        code="unknown_model",
        next_step=f"{hint}, or give a config.json",
    )
