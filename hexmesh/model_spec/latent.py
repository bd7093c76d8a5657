"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made from one short vector a token.

The cache holds that vector and the rotated part of the key, once for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexmesh.model_spec.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Sizes of latent attention."""

    q_rank: int | None
    """Queries are made from a vector of that size; None: from the hidden state itself."""
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    @staticmethod
    def of(config: Config) -> Latent:
        """The sizes that a config names. Raises InvalidInput."""
        has_q_rank = config.value("q_lora_rank") is not None
        return Latent(
            q_rank=config.count("q_lora_rank") if has_q_rank else None,
            kv_rank=config.count("kv_lora_rank"),
            nope_dim=config.count("qk_nope_head_dim"),
            rope_dim=config.count("qk_rope_head_dim"),
            v_dim=config.count("v_head_dim"),
        )

    @property
    def k_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def cached_values(self) -> int:
        """Numbers that a token leaves in the cache of a layer."""
        return self.kv_rank + self.rope_dim

    def matmul_params(self, hidden: int, heads: int) -> int:
        """Weights of all projections of a layer."""
        q_in, q_down = (hidden, 0) if self.q_rank is None else (self.q_rank, hidden * self.q_rank)
        queries = q_down + q_in * heads * self.k_dim
        keys = hidden * self.cached_values + self.kv_rank * heads * (self.nope_dim + self.v_dim)
        return queries + keys + heads * self.v_dim * hidden

    def other_params(self, hidden: int, *, has_bias: bool) -> int:
        """Norms of the two vectors, and the biases of those projections that may have one."""
        biases = (self.q_rank or 0) + self.cached_values + hidden if has_bias else 0
        return (self.q_rank or 0) + self.kv_rank + biases
