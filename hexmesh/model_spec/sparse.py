"""Architectures with experts: every token uses a few of a layer's MLPs."""

from __future__ import annotations

from dataclasses import replace

from hexmesh.model_spec.config import Config
from hexmesh.model_spec.family import LAYER_NORM, Experts, Family, Shape, defaults_of, norm_per_head
from hexmesh.model_spec.windows import alternate, every_layer, windows

_MISTRAL_SIZES = (32000, 4096, 14336, 32, 32, 131072)
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
_DEEPSEEK_ACTIVE = 6
"""transformers has no default; DeepSeek-V2's own."""
_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def _mixtral_experts(config: Config, layer: int) -> Experts:
    return Experts(
        n=config.count("num_local_experts"),
        n_active=config.count("num_experts_per_tok"),
        size=config.count("intermediate_size"),
    )


def _qwen_experts(config: Config, layer: int) -> Experts | None:
    dense_layers = config.value("mlp_only_layers") or []
    n = config.value("num_experts")
    if not n or layer in dense_layers or (layer + 1) % config.count("decoder_sparse_step"):
        return None
    return Experts(
        n=config.count("num_experts"),
        n_active=config.count("num_experts_per_tok"),
        size=config.count("moe_intermediate_size"),
    )


def _qwen2_experts(config: Config, layer: int) -> Experts | None:
    experts = _qwen_experts(config, layer)
    size = config.count("shared_expert_intermediate_size")
    return experts and replace(experts, shared_size=size, shared_is_gated=True)


def _olmoe_experts(config: Config, layer: int) -> Experts:
    return Experts(
        n=config.count("num_experts"),
        n_active=config.count("num_experts_per_tok"),
        size=config.count("intermediate_size"),
    )


def _deepseek_experts(config: Config, layer: int) -> Experts | None:
    if layer < (config.value("first_k_dense_replace") or 0):
        return None
    size = config.count("moe_intermediate_size")
    return Experts(
        n=config.count("n_routed_experts"),
        n_active=config.count("num_experts_per_tok", _DEEPSEEK_ACTIVE),
        size=size,
        shared_size=size * config.count("n_shared_experts"),
    )


def _gpt_oss_experts(config: Config, layer: int) -> Experts:
    return replace(_mixtral_experts(config, layer), has_bias=True)


def _olmoe_qk_norm(config: Config, shape: Shape) -> int:
    return shape.hidden + shape.kv_heads * (shape.hidden // shape.heads)


SPARSE: dict[str, Family] = {
    "mixtral": Family(
        defaults=defaults_of(
            _MISTRAL_SIZES, num_key_value_heads=8, num_experts_per_tok=2, num_local_experts=8, eos_token_id=2
        ),
        spellings={"num_local_experts": "num_experts"},
        experts=_mixtral_experts,
        window=every_layer,
    ),
    "qwen2_moe": Family(
        defaults=defaults_of(
            (151936, 2048, 5632, 24, 16, 32768),
            num_key_value_heads=16,
            decoder_sparse_step=1,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_experts_per_tok=4,
            num_experts=60,
            qkv_bias=True,
            **_QWEN_WINDOWS,
        ),
        qkv_bias="qkv_bias",
        experts=_qwen2_experts,
        window=windows(
            lambda config, layer: alternate(config, layer) and layer < config.value("max_window_layers"),
            switch="use_sliding_window",
        ),
    ),
    "qwen3_moe": Family(
        defaults=defaults_of(
            (151936, 2048, 6144, 24, 32, 32768),
            num_key_value_heads=4,
            decoder_sparse_step=1,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            num_experts=128,
            **_QWEN_WINDOWS,
        ),
        spellings={"num_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=norm_per_head,
        experts=_qwen_experts,
        window=windows(lambda config, layer: True, switch="use_sliding_window", obeys_types=False),
    ),
    "olmoe": Family(
        defaults=defaults_of(
            (50304, 2048, 2048, 16, 16, 4096), num_experts_per_tok=8, num_experts=64, eos_token_id=50279
        ),
        spellings={"num_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_olmoe_qk_norm,
        experts=_olmoe_experts,
    ),
    "deepseek_v2": Family(
        defaults=defaults_of(
            (102400, 4096, 11008, 32, 32, 2048),
            **_LATENT_SIZES,
            first_k_dense_replace=0,
            n_routed_experts=64,
            n_shared_experts=2,
            moe_intermediate_size=1407,
            eos_token_id=2,
        ),
        spellings={"n_routed_experts": "num_experts"},
        is_latent=True,
        mlp_bias="mlp_bias",
        experts=_deepseek_experts,
    ),
    "deepseek_v3": Family(
        defaults=defaults_of(
            (129280, 7168, 18432, 61, 128, 4096),
            **_LATENT_SIZES,
            first_k_dense_replace=3,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_shared_experts=1,
            moe_intermediate_size=2048,
            eos_token_id=1,
        ),
        spellings={"n_routed_experts": "num_local_experts"},
        is_latent=True,
        experts=_deepseek_experts,
    ),
    "gpt_oss": Family(
        defaults=defaults_of(
            (201088, 2880, 2880, 36, 64, 131072),
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=128,
            num_experts_per_tok=4,
            sliding_window=128,
            attention_bias=True,
        ),
        spellings={"num_local_experts": "num_experts"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        attention_params=lambda config, shape: shape.heads,  # sinks
        experts=_gpt_oss_experts,
        window=windows(alternate),
    ),
    "granitemoe": Family(
        defaults=defaults_of(
            (32000, 4096, 11008, 32, 32, 2048), num_local_experts=8, num_experts_per_tok=2, eos_token_id=2
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        experts=_mixtral_experts,
    ),
    "phimoe": Family(
        defaults=defaults_of(
            (32064, 4096, 6400, 32, 32, 131072),
            num_key_value_heads=8,
            num_local_experts=16,
            num_experts_per_tok=2,
            eos_token_id=2,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norm_width=LAYER_NORM,
        head_bias="lm_head_bias",
        experts=_mixtral_experts,
        window=every_layer,
    ),
    "glm4_moe": Family(
        defaults=defaults_of(
            (151552, 4096, 10944, 46, 96, 131072),
            num_key_value_heads=8,
            first_k_dense_replace=1,
            n_routed_experts=128,
            num_experts_per_tok=8,
            n_shared_experts=1,
            moe_intermediate_size=1408,
        ),
        spellings={"n_routed_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        qk_norm_params=lambda config, shape: (
            norm_per_head(config, shape) if config.flag("use_qk_norm") else 0
        ),
        experts=_deepseek_experts,
    ),
}
