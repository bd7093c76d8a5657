"""How the supported architectures differ: one row of `FAMILIES` for each "model_type".

Defaults are those that transformers gives to keys which a config.json leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hexmesh.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Config:
    """Typed reads of a config with its family's defaults and other spellings of keys."""

    raw: Mapping[str, Any]
    family: Family

    def value(self, key: str) -> Any:
        for spelling in (self.family.spellings.get(key, key), key):
            if spelling in self.raw:
                return self.raw[spelling]
        return self.family.defaults.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInput(f"config.json: {key} is {value!r}, not a positive integer")
        return value

    def flag(self, key: str | bool) -> bool:
        value = key if isinstance(key, bool) else self.value(key)
        if not isinstance(value, bool | None):
            raise InvalidInput(f"config.json: {key} is {value!r}, neither true nor false")
        return bool(value)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    n: int
    n_active: int
    size: int
    shared_size: int = 0


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
    return experts and replace(experts, shared_size=config.count("shared_expert_intermediate_size"))


_GEMMA_IDS = {"eos_token_id": 1, "tie_word_embeddings": True}
_LAYER_NORM = 2
_LLAMA_SIZES = (32000, 4096, 11008, 32, 32, 2048)
_MISTRAL_SIZES = (32000, 4096, 14336, 32, 32, 131072)
_OLMO_SIZES = (50304, 4096, 11008, 32, 32, 2048)
_QWEN_SIZES = (151936, 4096, 22016, 32, 32, 32768)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults=_defaults(_LLAMA_SIZES, eos_token_id=2),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(defaults=_defaults(_MISTRAL_SIZES, num_key_value_heads=8, eos_token_id=2)),
    "mixtral": Family(
        defaults=_defaults(
            _MISTRAL_SIZES, num_key_value_heads=8, num_experts_per_tok=2, num_local_experts=8, eos_token_id=2
        ),
        spellings={"num_local_experts": "num_experts"},
        experts=_mixtral_experts,
    ),
    "qwen2": Family(defaults=_defaults(_QWEN_SIZES, num_key_value_heads=32), qkv_bias=True),
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
        ),
        qkv_bias="qkv_bias",
        experts=_qwen2_experts,
    ),
    "qwen3": Family(
        defaults=_defaults(_QWEN_SIZES, num_key_value_heads=32, head_dim=128),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_norm_per_head,
    ),
    "qwen3_moe": Family(
        defaults=_defaults(
            (151936, 2048, 6144, 24, 32, 32768),
            num_key_value_heads=4,
            decoder_sparse_step=1,
            moe_intermediate_size=768,
            num_experts_per_tok=8,
            num_experts=128,
        ),
        spellings={"num_experts": "num_local_experts"},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=_norm_per_head,
        experts=_qwen_experts,
    ),
    "phi3": Family(
        defaults=_defaults((32064, 3072, 8192, 32, 32, 4096), eos_token_id=32000),
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
            (256000, 2304, 9216, 26, 8, 8192), num_key_value_heads=4, head_dim=256, **_GEMMA_IDS
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 4,
    ),
    "gemma3_text": Family(
        defaults=_defaults(
            (262208, 2304, 9216, 26, 8, 131072), num_key_value_heads=4, head_dim=256, **_GEMMA_IDS
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 4,
        qk_norm_params=_norm_per_head,
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
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
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
        spellings={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
        },
        head_dim_is_free=False,
        all_heads_have_kv=True,
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
