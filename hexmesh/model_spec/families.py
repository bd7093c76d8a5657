"""How the supported architectures differ: one row of `FAMILIES` for each "model_type".

Defaults are those that transformers gives to keys which a config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hexmesh.model_spec.config import Config
from hexmesh.model_spec.windows import alternate, every_layer, no_window, windows, without_rope


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that all parts of a layer share."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How an architecture differs from a pre-norm decoder with gated MLP and no biases.

    A flag is a constant or the name of the config key that holds it.
    """

    defaults: Mapping[str, Any]
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Common key -> the family's own."""
    head_dim_is_free: bool = True
    """A "head_dim" in the config is obeyed; else it is always hidden_size / heads."""
    all_heads_have_kv: bool = False
    qkv_bias: str | bool = False
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    mlp_is_gated: bool = True
    norm_width: int = 1
    """Parameters of a norm per channel: 0, 1 (scale) or 2 (scale and shift)."""
    n_norms: Callable[[Config], int] = lambda config: 2
    qk_norm_params: Callable[[Config, Shape], int] = lambda config, shape: 0
    norm_has_params: str | bool = True
    has_final_norm: Callable[[Config], bool] = lambda config: True
    n_positions_extra: int | None = None
    """Rows of the learned position table beyond max_position_embeddings; None: no such table."""
    embedding_dim_key: str = ""
    """Config key of an embedding narrower than the hidden size, with a projection on either side."""
    head_bias: bool = False
    experts: Callable[[Config, int], Experts | None] = lambda config, layer: None
    window: Callable[[Config, int], int | None] = no_window
    """How far back a layer attends, in tokens; None: all the way."""
    attention_params: Callable[[Config, Shape], int] = lambda config, shape: 0
    """Parameters of its attention beside projections, their biases and norms."""
    multi_query_key: str = ""
    """Config key that lets all heads share one key and value head."""
    is_latent: bool = False
    """Keys and values are made from one vector a token (`latent`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    n: int
    n_active: int
    size: int
    shared_size: int = 0
    shared_is_gated: bool = False
    """A weight per channel decides how much of the shared expert a token gets."""
    has_bias: bool = False
    """Experts and router have biases."""


def _defaults(sizes: tuple[int, int, int, int, int, int], **more: Any) -> dict[str, Any]:
    """Defaults of (vocab, hidden, MLP size, layers, heads, positions); MLP size 0 leaves it to 4 x hidden."""
    vocab, hidden, mlp, layers, heads, positions = sizes
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp or None,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        **more,
    }


def _norm_per_head(config: Config, shape: Shape) -> int:
    return 2 * shape.head_dim


def _norm_over_heads(config: Config, shape: Shape) -> int:
    return (shape.heads + shape.kv_heads) * shape.head_dim


def _olmoe_qk_norm(config: Config, shape: Shape) -> int:
    return shape.hidden + shape.kv_heads * (shape.hidden // shape.heads)


def _stablelm_qk_norm(config: Config, shape: Shape) -> int:
    return _norm_over_heads(config, shape) if config.flag("qk_layernorm") else 0


def _phi_qk_norm(config: Config, shape: Shape) -> int:
    return 4 * (shape.hidden // shape.heads) if config.flag("qk_layernorm") else 0


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


_GEMMA_IDS = {"eos_token_id": 1, "tie_word_embeddings": True}
_LAYER_NORM = 2
_LLAMA_SIZES = (32000, 4096, 11008, 32, 32, 2048)
_MISTRAL_SIZES = (32000, 4096, 14336, 32, 32, 131072)
_OLMO_SIZES = (50304, 4096, 11008, 32, 32, 2048)
_QWEN_SIZES = (151936, 4096, 22016, 32, 32, 32768)
_DEEPSEEK_ACTIVE = 6
"""transformers has no default; DeepSeek-V2's own."""
_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN_LATE_LAYERS = windows(
    lambda config, layer: layer >= config.value("max_window_layers"), switch="use_sliding_window"
)
_GPT2_SPELLINGS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults=_defaults(_LLAMA_SIZES, eos_token_id=2),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        defaults=_defaults(_MISTRAL_SIZES, num_key_value_heads=8, sliding_window=4096, eos_token_id=2),
        window=every_layer,
    ),
    "mixtral": Family(
        defaults=_defaults(
            _MISTRAL_SIZES, num_key_value_heads=8, num_experts_per_tok=2, num_local_experts=8, eos_token_id=2
        ),
        spellings={"num_local_experts": "num_experts"},
        experts=_mixtral_experts,
        window=every_layer,
    ),
    "qwen2": Family(
        defaults=_defaults(_QWEN_SIZES, num_key_value_heads=32, **_QWEN_WINDOWS),
        qkv_bias=True,
        window=_QWEN_LATE_LAYERS,
    ),
    "qwen2_moe": Family(
        defaults=_defaults(
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
    "qwen3": Family(
        defaults=_defaults(_QWEN_SIZES, num_key_value_heads=32, head_dim=128, **_QWEN_WINDOWS),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_norm_per_head,
        window=_QWEN_LATE_LAYERS,
    ),
    "qwen3_moe": Family(
        defaults=_defaults(
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
        qk_norm_params=_norm_per_head,
        experts=_qwen_experts,
        window=windows(lambda config, layer: True, switch="use_sliding_window", obeys_types=False),
    ),
    "phi3": Family(
        defaults=_defaults((32064, 3072, 8192, 32, 32, 4096), eos_token_id=32000),
        window=every_layer,
    ),
    "gemma": Family(
        defaults=_defaults(
            (256000, 3072, 24576, 28, 16, 8192), num_key_value_heads=16, head_dim=256, **_GEMMA_IDS
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma2": Family(
        defaults=_defaults(
            (256000, 2304, 9216, 26, 8, 8192),
            num_key_value_heads=4,
            head_dim=256,
            sliding_window=4096,
            **_GEMMA_IDS,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 4,
        window=windows(alternate),
    ),
    "gemma3_text": Family(
        defaults=_defaults(
            (262208, 2304, 9216, 26, 8, 131072),
            num_key_value_heads=4,
            head_dim=256,
            sliding_window=4096,
            sliding_window_pattern=6,
            **_GEMMA_IDS,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 4,
        qk_norm_params=_norm_per_head,
        window=windows(lambda config, layer: (layer + 1) % config.count("sliding_window_pattern") != 0),
    ),
    "olmo": Family(
        defaults=_defaults(_OLMO_SIZES, eos_token_id=50279),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norm_width=0,
    ),
    "olmo2": Family(
        defaults=_defaults(_OLMO_SIZES, eos_token_id=50279),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_norm_over_heads,
    ),
    "olmoe": Family(
        defaults=_defaults(
            (50304, 2048, 2048, 16, 16, 4096), num_experts_per_tok=8, num_experts=64, eos_token_id=50279
        ),
        spellings={"num_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_olmoe_qk_norm,
        experts=_olmoe_experts,
    ),
    "deepseek_v2": Family(
        defaults=_defaults(
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
        defaults=_defaults(
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
        defaults=_defaults(
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
    "granite": Family(
        defaults=_defaults(_LLAMA_SIZES, eos_token_id=2),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        defaults=_defaults(
            (128256, 2048, 11008, 36, 16, 32768),
            num_key_value_heads=4,
            eos_token_id=128001,
            tie_word_embeddings=True,
            no_rope_layer_interval=4,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        window=windows(without_rope, switch="use_sliding_window"),
    ),
    "stablelm": Family(
        defaults=_defaults((50304, 2560, 6912, 32, 32, 4096), num_key_value_heads=32, eos_token_id=0),
        head_dim_is_free=False,
        qkv_bias="use_qkv_bias",
        norm_width=_LAYER_NORM,
        n_norms=lambda config: 1 if config.flag("use_parallel_residual") else 2,
        qk_norm_params=_stablelm_qk_norm,
    ),
    "starcoder2": Family(
        defaults=_defaults(
            (49152, 3072, 12288, 30, 24, 4096),
            num_key_value_heads=2,
            eos_token_id=50256,
            use_bias=True,
            tie_word_embeddings=True,
        ),
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
        window=every_layer,
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
    ),
    "phi": Family(
        defaults=_defaults((51200, 2048, 8192, 24, 32, 2048), eos_token_id=2),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
        n_norms=lambda config: 1,
        qk_norm_params=_phi_qk_norm,
        head_bias=True,
    ),
    "gpt2": Family(
        defaults=_defaults((50257, 768, 0, 12, 12, 1024), eos_token_id=50256, tie_word_embeddings=True),
        spellings=_GPT2_SPELLINGS,
        head_dim_is_free=False,
        all_heads_have_kv=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
        n_positions_extra=0,
    ),
    "gpt_bigcode": Family(
        defaults=_defaults(
            (50257, 768, 0, 12, 12, 1024), eos_token_id=50256, tie_word_embeddings=True, multi_query=True
        ),
        spellings=_GPT2_SPELLINGS,
        head_dim_is_free=False,
        all_heads_have_kv=True,
        multi_query_key="multi_query",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
        n_positions_extra=0,
    ),
    "gpt_neox": Family(
        defaults=_defaults((50432, 6144, 24576, 44, 64, 2048), eos_token_id=2, attention_bias=True),
        head_dim_is_free=False,
        all_heads_have_kv=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
    ),
    "opt": Family(
        defaults=_defaults(
            (50272, 768, 3072, 12, 12, 2048),
            eos_token_id=2,
            enable_bias=True,
            layer_norm_elementwise_affine=True,
            do_layer_norm_before=True,
            tie_word_embeddings=True,
        ),
        spellings={"intermediate_size": "ffn_dim"},
        head_dim_is_free=False,
        all_heads_have_kv=True,
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
        mlp_is_gated=False,
        norm_width=_LAYER_NORM,
        norm_has_params="layer_norm_elementwise_affine",
        has_final_norm=lambda config: (
            config.flag("do_layer_norm_before") and not config.flag("_remove_final_layer_norm")
        ),
        n_positions_extra=2,
        embedding_dim_key="word_embed_proj_dim",
    ),
}
