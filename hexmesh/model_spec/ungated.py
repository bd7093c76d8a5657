"""Architectures with an MLP of two matrices: GPT-2, its contemporaries, and a few newer ones."""

from __future__ import annotations

from hexmesh.model_spec.config import Config
from hexmesh.model_spec.family import LAYER_NORM, Family, Shape, defaults_of
from hexmesh.model_spec.windows import every_layer

_GPT2_SPELLINGS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}


def _phi_qk_norm(config: Config, shape: Shape) -> int:
    return 4 * (shape.hidden // shape.heads) if config.flag("qk_layernorm") else 0


def _falcon_kv_heads(config: Config, heads: int) -> int:
    if config.flag("new_decoder_architecture"):
        return config.count("num_key_value_heads", heads)
    return 1 if config.flag("multi_query") else heads


def _falcon_norms(config: Config) -> int:
    if config.flag("new_decoder_architecture"):
        return config.count("num_ln_in_parallel_attn", 2)
    return 1 if config.flag("parallel_attn") else 2


def _bigcode_kv_heads(config: Config, heads: int) -> int:
    return 1 if config.flag("multi_query") else heads


UNGATED: dict[str, Family] = {
    "starcoder2": Family(
        defaults=defaults_of(
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
        norm_width=LAYER_NORM,
    ),
    "phi": Family(
        defaults=defaults_of((51200, 2048, 8192, 24, 32, 2048), eos_token_id=2),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
        n_norms=lambda config: 1,
        qk_norm_params=_phi_qk_norm,
        head_bias=True,
    ),
    "gpt2": Family(
        defaults=defaults_of((50257, 768, 0, 12, 12, 1024), eos_token_id=50256, tie_word_embeddings=True),
        spellings=_GPT2_SPELLINGS,
        head_dim_is_free=False,
        all_heads_have_kv=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
        n_positions_extra=0,
    ),
    "gpt_bigcode": Family(
        defaults=defaults_of(
            (50257, 768, 0, 12, 12, 1024), eos_token_id=50256, tie_word_embeddings=True, multi_query=True
        ),
        spellings=_GPT2_SPELLINGS,
        head_dim_is_free=False,
        n_kv_heads=_bigcode_kv_heads,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
        n_positions_extra=0,
    ),
    "gpt_neox": Family(
        defaults=defaults_of((50432, 6144, 24576, 44, 64, 2048), eos_token_id=2, attention_bias=True),
        head_dim_is_free=False,
        all_heads_have_kv=True,
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
    ),
    "opt": Family(
        defaults=defaults_of(
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
        norm_width=LAYER_NORM,
        norm_has_params="layer_norm_elementwise_affine",
        has_final_norm=lambda config: (
            config.flag("do_layer_norm_before") and not config.flag("_remove_final_layer_norm")
        ),
        n_positions_extra=2,
        embedding_dim_key="word_embed_proj_dim",
    ),
    "arcee": Family(
        defaults=defaults_of((32000, 2560, 18432, 32, 32, 4096), eos_token_id=128001),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        mlp_is_gated=False,
    ),
    "gptj": Family(
        defaults=defaults_of((50400, 4096, 0, 28, 16, 2048), eos_token_id=50256),
        spellings=_GPT2_SPELLINGS,
        head_dim_is_free=False,
        all_heads_have_kv=True,
        mlp_bias=True,
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
        n_norms=lambda config: 1,
        head_bias=True,
    ),
    "falcon": Family(
        defaults=defaults_of(
            (65024, 4544, 0, 32, 71, 2048),
            eos_token_id=11,
            multi_query=True,
            parallel_attn=True,
            tie_word_embeddings=True,
        ),
        spellings={"intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads"},
        head_dim_is_free=False,
        n_kv_heads=_falcon_kv_heads,
        qkv_bias="bias",
        output_bias="bias",
        mlp_bias="bias",
        mlp_is_gated=False,
        norm_width=LAYER_NORM,
        n_norms=_falcon_norms,
    ),
}
