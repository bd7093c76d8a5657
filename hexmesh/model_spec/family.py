"""What tells one decoder architecture from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hexmesh.model_spec.config import Config
from hexmesh.model_spec.windows import no_window

LAYER_NORM = 2
"""Parameters of a LayerNorm per channel, scale and shift; an RMS norm has the scale alone."""


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
    head_bias: str | bool = False
    experts: Callable[[Config, int], Experts | None] = lambda config, layer: None
    window: Callable[[Config, int], int | None] = no_window
    """How far back a layer attends, in tokens; None: all the way."""
    attention_params: Callable[[Config, Shape], int] = lambda config, shape: 0
    """Parameters of its attention beside projections, their biases and norms."""
    n_kv_heads: Callable[[Config, int], int] | None = None
    """KV heads of a config with so many heads; None: "num_key_value_heads", or all of them."""
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


def defaults_of(sizes: tuple[int, int, int, int, int, int], **more: Any) -> dict[str, Any]:
    """What keys that a config leaves out mean, from (vocab, hidden, MLP size, layers, heads, positions).

    MLP size 0 leaves it to 4 x hidden.
    """
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


def norm_per_head(config: Config, shape: Shape) -> int:
    return 2 * shape.head_dim


def norm_over_heads(config: Config, shape: Shape) -> int:
    return (shape.heads + shape.kv_heads) * shape.head_dim
