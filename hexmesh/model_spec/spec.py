"""What a model is to the planner: exact parameter counts, KV bytes and FLOPs, from its config.json alone.

No framework is imported: `families` says how the architectures differ, and a test compares the counts, layer
by layer, with the modules that transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.model_spec.config import Config
from hexmesh.model_spec.families import FAMILIES
from hexmesh.model_spec.family import Experts, Family, Shape
from hexmesh.model_spec.latent import Latent


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One decoder layer. Of `n_experts` expert MLPs a token uses `n_active_experts`; dense ones have none."""

    params: int
    """All parameters, every expert included."""
    dense_matmul_params: int
    """Weights that every token is multiplied with (attention, dense MLP, router, shared expert)."""
    expert_params: int = 0
    """Weights of one expert."""
    n_experts: int = 0
    n_active_experts: int = 0
    mlp_activations: int
    """Numbers that a token's MLP holds at once at its peak."""
    window_tokens: int | None = None
    """A token attends to that many at most, itself included; None: to all before it."""

    def seen_tokens(self, context_tokens: float) -> float:
        """Tokens that the layer attends to at the end of a context."""
        return context_tokens if self.window_tokens is None else min(context_tokens, self.window_tokens)

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds count as two; attention over the context is apart (`ModelSpec.attention_flops`)."""
        return 2 * (self.dense_matmul_params + self.n_active_experts * self.expert_params)

    def params_read(self, batch: float) -> float:
        """Parameters that a step of `batch` tokens reads, if tokens pick experts evenly at random."""
        if not self.n_experts:
            return float(self.params)
        unused: float = (1.0 - self.n_active_experts / self.n_experts) ** batch
        return self.params - self.n_experts * self.expert_params * unused


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a decoder-only model. Bytes follow from the dtype: see `hexmesh.cost`."""

    hidden_size: int
    n_heads: int
    n_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_tokens: int
    ties_embeddings: bool
    """The output head is the token embedding: a stage that has both holds it once."""
    layers: tuple[LayerSpec, ...]
    embedding_params: int
    """The token embedding."""
    shared_params: int
    """Outside layers, token embedding and head: final norm, learned positions, projections around the layers.

    A stage keeps its model's frame, so every stage may hold these.
    """
    head_params: int
    """The output head's own parameters; 0 (or its bias) where it is tied."""
    head_matmul_params: int
    """Weights that a sampled token's hidden state is multiplied with, whoever owns them."""
    eos_token_ids: tuple[int, ...]
    latent_values: int = 0
    """Numbers that a token leaves in each layer's cache where all heads share one vector (MLA); else 0."""
    latent_rank: int = 0
    """Of those, the ones that values are made from."""

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def layer_params(self) -> tuple[int, ...]:
        return tuple(layer.params for layer in self.layers)

    @property
    def n_params(self) -> int:
        """Parameters of the whole model, shared ones counted once."""
        return sum(self.layer_params) + self.embedding_params + self.shared_params + self.head_params

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to the KV cache of one layer."""
        return self.latent_values or self.n_kv_heads * (self.k_head_dim + self.v_head_dim)

    def kv_values_per_rank(self, tp: int) -> int:
        """The same on each of `tp` devices: heads are dealt out, copied where there are too few; latents are copied."""
        heads = -(-self.n_kv_heads // tp)
        return self.latent_values or heads * (self.k_head_dim + self.v_head_dim)

    def splits_into(self, tp: int) -> bool:
        """Whether attention deals out evenly to `tp` devices."""
        kv_deals = self.n_kv_heads % tp == 0 or tp % self.n_kv_heads == 0 or self.latent_values > 0
        return self.n_heads % tp == 0 and kv_deals

    @property
    def attention_flops(self) -> int:
        """FLOPs of one layer for one query token and one token of its context, keys and values being at hand."""
        return 2 * self.n_heads * (self.k_head_dim + self.v_head_dim)

    @property
    def decode_attention_flops(self) -> int:
        """The same as decoding computes it: with latents, on the cached vectors themselves."""
        latent = 2 * self.n_heads * (self.latent_values + self.latent_rank)
        return latent or self.attention_flops

    def params_before(self) -> tuple[int, ...]:
        """Parameters of the first i layers, for i from 0 to n_layers."""
        return tuple(accumulate(self.layer_params, initial=0))


_TEXT_TYPES = {"gemma3": "gemma3_text"}
"""Types whose language part has a config of its own."""


def model_spec_from_config(
    config: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec of a config.json. Raises InvalidInput, naming the key at fault.

    Of a model that also sees pictures, its language part: what sees is not counted.
    End-of-text ids of a generation_config.json win over the config's, as in transformers.
    """
    config = _language_part(config)
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise InvalidInput(
            f"no formulas for model type {model_type!r}",
            code="unsupported_model_type",
            next_step=f"use a model of type {', '.join(supported_model_types())}",
        )
    _refuse_variants(config)
    return _spec(family, Config(config, family.defaults, family.spellings), generation_config or {})


def _language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text_type, text = _TEXT_TYPES.get(str(config.get("model_type"))), config.get("text_config")
    if text_type is None:
        return config
    if not isinstance(text, Mapping):
        raise InvalidInput(f"config.json: a {config['model_type']} model without text_config")
    shared = {key: config[key] for key in ("tie_word_embeddings", "eos_token_id") if key in config}
    return {**shared, **text, "model_type": text_type}


def supported_model_types() -> tuple[str, ...]:
    """The values of "model_type" that have formulas."""
    return tuple(sorted(FAMILIES))


def _spec(family: Family, config: Config, generation: Mapping[str, Any]) -> ModelSpec:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv_heads = _kv_heads(family, config, heads)
    latent = Latent.of(config) if family.is_latent else None
    derived = hidden // heads
    head_dim = config.count("head_dim", derived) if family.head_dim_is_free else derived
    if heads % kv_heads or head_dim < 1:
        raise InvalidInput(
            f"config.json: {heads} attention heads over {kv_heads} KV heads of size {head_dim}"
        )
    shape = Shape(hidden, heads, kv_heads, head_dim)
    vocab, positions = config.count("vocab_size"), config.count("max_position_embeddings")
    width = config.count(family.embedding_dim_key, hidden) if family.embedding_dim_key else hidden
    norm_width = family.norm_width if config.flag(family.norm_has_params) else 0
    shared = norm_width * hidden if family.has_final_norm(config) else 0
    if family.n_positions_extra is not None:
        shared += (positions + family.n_positions_extra) * hidden
    if width != hidden:
        shared += 2 * width * hidden
    ties = config.flag("tie_word_embeddings")
    eos = generation.get("eos_token_id")
    return ModelSpec(
        hidden_size=hidden,
        n_heads=heads,
        n_kv_heads=kv_heads,
        k_head_dim=latent.k_dim if latent else head_dim,
        v_head_dim=latent.v_dim if latent else head_dim,
        vocab_size=vocab,
        max_position_tokens=positions,
        ties_embeddings=ties,
        layers=tuple(
            _layer(family, config, shape, latent, norm_width, index)
            for index in range(config.count("num_hidden_layers"))
        ),
        embedding_params=vocab * width,
        shared_params=shared,
        head_params=(0 if ties else vocab * width) + (vocab if config.flag(family.head_bias) else 0),
        head_matmul_params=vocab * width,
        eos_token_ids=_token_ids(config.value("eos_token_id") if eos is None else eos),
        latent_values=latent.cached_values if latent else 0,
        latent_rank=latent.kv_rank if latent else 0,
    )


def _kv_heads(family: Family, config: Config, heads: int) -> int:
    if family.n_kv_heads is not None:
        return family.n_kv_heads(config, heads)
    return heads if family.all_heads_have_kv else config.count("num_key_value_heads", heads)


def _layer(
    family: Family, config: Config, shape: Shape, latent: Latent | None, norm_width: int, index: int
) -> LayerSpec:
    matmul, other = _attention(family, config, shape, latent)
    other += norm_width * shape.hidden * family.n_norms(config)
    n_matrices = 3 if family.mlp_is_gated else 2
    window = family.window(config, index)
    experts = family.experts(config, index)

    def mlp_bias(size: int) -> int:
        return (n_matrices - 1) * size + shape.hidden if config.flag(family.mlp_bias) else 0

    if experts is None:
        size = config.count("intermediate_size", 4 * shape.hidden)
        matmul += n_matrices * shape.hidden * size
        other += mlp_bias(size)
        return LayerSpec(
            params=matmul + other,
            dense_matmul_params=matmul,
            mlp_activations=n_matrices * size,
            window_tokens=window,
        )
    matmul += experts.n * shape.hidden + n_matrices * shape.hidden * experts.shared_size  # the first: router
    matmul += shape.hidden if experts.shared_is_gated else 0
    other += mlp_bias(experts.shared_size) if experts.shared_size else 0
    other += experts.n if experts.has_bias else 0
    expert = _expert(experts, shape, n_matrices)
    return LayerSpec(
        params=matmul + other + experts.n * expert,
        dense_matmul_params=matmul,
        expert_params=expert,
        n_experts=experts.n,
        n_active_experts=min(experts.n_active, experts.n),
        mlp_activations=n_matrices * (experts.n_active * experts.size + experts.shared_size),
        window_tokens=window,
    )


def _attention(family: Family, config: Config, shape: Shape, latent: Latent | None) -> tuple[int, int]:
    """Parameters of a layer's attention: those that hidden states are multiplied with, and the others."""
    if latent is not None:
        has_bias = config.flag("attention_bias")
        return (
            latent.matmul_params(shape.hidden, shape.heads),
            latent.other_params(shape.hidden, has_bias=has_bias),
        )
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    other = family.qk_norm_params(config, shape) + family.attention_params(config, shape)
    other += q_size + 2 * kv_size if config.flag(family.qkv_bias) else 0
    other += shape.hidden if config.flag(family.output_bias) else 0
    return shape.hidden * (q_size + 2 * kv_size) + q_size * shape.hidden, other


def _expert(experts: Experts, shape: Shape, n_matrices: int) -> int:
    biases = (n_matrices - 1) * experts.size + shape.hidden if experts.has_bias else 0
    return n_matrices * shape.hidden * experts.size + biases


def _refuse_variants(config: Mapping[str, Any]) -> None:
    for key, what in (
        ("quantization_config", "a quantised checkpoint"),
        ("per_layer_config", "a model whose layers have configs of their own"),
    ):
        if config.get(key):
            raise InvalidInput(
                f"config.json has {key}: {what} is not supported",
                code="unsupported_model",
                next_step="use the unquantised safetensors checkpoint of the model",
            )
    if config.get("add_cross_attention"):
        raise InvalidInput("config.json has add_cross_attention: only decoder-only models are supported")


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, int) for one in ids):
        raise InvalidInput(f"config.json: {value!r} is not a token id or a list of them")
    return tuple(ids)
