"""Architectures with one gated MLP a layer: Llama and those that came after it."""

from __future__ import annotations

from hexmesh.model_spec.config import Config
from hexmesh.model_spec.family import LAYER_NORM, Family, Shape, defaults_of, norm_over_heads, norm_per_head
from hexmesh.model_spec.windows import alternate, every_layer, windows, without_rope

_GEMMA_IDS = {"eos_token_id": 1, "tie_word_embeddings": True}
_LLAMA_SIZES = (32000, 4096, 11008, 32, 32, 2048)
_MISTRAL_SIZES = (32000, 4096, 14336, 32, 32, 131072)
_OLMO_SIZES = (50304, 4096, 11008, 32, 32, 2048)
_COHERE_SIZES = (256000, 8192, 22528, 40, 64, 8192)
_GLM_SIZES = (151552, 4096, 13696, 40, 32, 131072)
_GLM_MORE = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
}
_QWEN_SIZES = (151936, 4096, 22016, 32, 32, 32768)
_QWEN_WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}
_QWEN_LATE_LAYERS = windows(
    lambda config, layer: layer >= config.value("max_window_layers"), switch="use_sliding_window"
)


def _stablelm_qk_norm(config: Config, shape: Shape) -> int:
    return norm_over_heads(config, shape) if config.flag("qk_layernorm") else 0


def _cohere_qk_norm(config: Config, shape: Shape) -> int:
    return norm_over_heads(config, shape) if config.flag("use_qk_norm") else 0


DENSE: dict[str, Family] = {
    "llama": Family(
        defaults=defaults_of(_LLAMA_SIZES, eos_token_id=2),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        defaults=defaults_of(_MISTRAL_SIZES, num_key_value_heads=8, sliding_window=4096, eos_token_id=2),
        window=every_layer,
    ),
    "qwen2": Family(
        defaults=defaults_of(_QWEN_SIZES, num_key_value_heads=32, **_QWEN_WINDOWS),
        qkv_bias=True,
        window=_QWEN_LATE_LAYERS,
    ),
    "qwen3": Family(
        defaults=defaults_of(_QWEN_SIZES, num_key_value_heads=32, head_dim=128, **_QWEN_WINDOWS),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=norm_per_head,
        window=_QWEN_LATE_LAYERS,
    ),
    "phi3": Family(
        defaults=defaults_of((32064, 3072, 8192, 32, 32, 4096), eos_token_id=32000),
        window=every_layer,
    ),
    "gemma": Family(
        defaults=defaults_of(
            (256000, 3072, 24576, 28, 16, 8192), num_key_value_heads=16, head_dim=256, **_GEMMA_IDS
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
    ),
    "gemma2": Family(
        defaults=defaults_of(
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
        defaults=defaults_of(
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
        qk_norm_params=norm_per_head,
        window=windows(lambda config, layer: (layer + 1) % config.count("sliding_window_pattern") != 0),
    ),
    "olmo": Family(
        defaults=defaults_of(_OLMO_SIZES, eos_token_id=50279),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        norm_width=0,
    ),
    "olmo2": Family(
        defaults=defaults_of(_OLMO_SIZES, eos_token_id=50279),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=norm_over_heads,
    ),
    "granite": Family(
        defaults=defaults_of(_LLAMA_SIZES, eos_token_id=2),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        defaults=defaults_of(
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
    "ministral3": Family(
        defaults=defaults_of(
            (131072, 4096, 14336, 34, 32, 262144), num_key_value_heads=8, head_dim=128, eos_token_id=2
        ),
        window=every_layer,
    ),
    "olmo3": Family(
        defaults=defaults_of(_OLMO_SIZES, eos_token_id=50279, sliding_window=4096),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm_params=norm_over_heads,
        window=windows(lambda config, layer: (layer + 1) % 4 != 0),
    ),
    "exaone4": Family(
        defaults=defaults_of(
            (102400, 4096, 16384, 32, 32, 2048),
            num_key_value_heads=32,
            sliding_window=4096,
            sliding_window_pattern=4,
            eos_token_id=2,
        ),
        qk_norm_params=norm_per_head,
        window=windows(lambda config, layer: (layer + 1) % config.count("sliding_window_pattern") != 0),
    ),
    "cohere": Family(
        defaults=defaults_of(_COHERE_SIZES, eos_token_id=255001, tie_word_embeddings=True),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 1,
        qk_norm_params=_cohere_qk_norm,
    ),
    "cohere2": Family(
        defaults=defaults_of(
            _COHERE_SIZES,
            eos_token_id=255001,
            tie_word_embeddings=True,
            sliding_window=4096,
            sliding_window_pattern=4,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        n_norms=lambda config: 1,
        window=windows(lambda config, layer: (layer + 1) % config.count("sliding_window_pattern") != 0),
    ),
    "glm": Family(
        defaults=defaults_of(_GLM_SIZES, **_GLM_MORE),
        qkv_bias="attention_bias",
    ),
    "glm4": Family(
        defaults=defaults_of(_GLM_SIZES, **_GLM_MORE),
        qkv_bias="attention_bias",
        n_norms=lambda config: 4,
    ),
    "ernie4_5": Family(
        defaults=defaults_of(
            (103424, 1024, 3072, 18, 16, 131072),
            num_key_value_heads=2,
            head_dim=128,
            eos_token_id=2,
            tie_word_embeddings=True,
        ),
        qkv_bias="use_bias",
        output_bias="use_bias",
        mlp_bias="use_bias",
    ),
    "seed_oss": Family(
        defaults=defaults_of(
            (155136, 4096, 27648, 64, 80, 524288),
            num_key_value_heads=8,
            head_dim=128,
            attention_bias=True,
            eos_token_id=2,
        ),
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "stablelm": Family(
        defaults=defaults_of((50304, 2560, 6912, 32, 32, 4096), num_key_value_heads=32, eos_token_id=0),
        head_dim_is_free=False,
        qkv_bias="use_qkv_bias",
        norm_width=LAYER_NORM,
        n_norms=lambda config: 1 if config.flag("use_parallel_residual") else 2,
        qk_norm_params=_stablelm_qk_norm,
    ),
}
