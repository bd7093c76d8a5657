"""HexGen's cost model (arXiv 2311.11514; constants and details from its released optimiser).

Symbols: H hidden size, l layers of a stage, D its TP degree, b batch, s tokens, alpha and beta delay and rate of a
link, c FLOP/s and m bytes/s of a device; W and F weight bytes and FLOPs of a token and layer.

    compute      l (W / m + b s F / c) / D                   prefill; a decode step has s = 1
    TP           2 (D - 1) (alpha + b s H / (D beta)) 2 l    two ring all-reduces a layer
    hop          alpha + b s H / beta                        into the next machine
    memory       (W / D + KV) l + 4 b (s_in + s_out) H       on each device of the stage

The paper's figures come out with what it simplifies: `gpt_spec` for the model (12 H^2 weights, KV of every head) and
`PUBLISHED` for the rest. Differs from our score: memory and compute add up, KV is never read, one request alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hexmesh.model_spec import LayerSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplifications:
    """What the released optimiser takes for granted; each can be switched off."""

    one_rate: bool = True
    """One number stands for FLOP/s and bytes/s."""
    output_counts_prompt: bool = True
    """The output's length includes the prompt's, so that many fewer steps are decoded."""
    kv_on_every_rank: bool = True
    """TP does not divide the KV."""


PUBLISHED = Simplifications()


def gpt_spec(hidden_size: int, n_layers: int) -> ModelSpec:
    """A model of nothing but layers with 12 H^2 weights and KV for every head, as the paper counts them."""
    weights = 12 * hidden_size**2
    layer = LayerSpec(params=weights, dense_matmul_params=weights, mlp_activations=4 * hidden_size)
    return ModelSpec(
        hidden_size=hidden_size,
        n_heads=1,
        n_kv_heads=1,
        k_head_dim=hidden_size,
        v_head_dim=hidden_size,
        vocab_size=1,
        max_position_tokens=1,
        ties_embeddings=True,
        layers=(layer,) * n_layers,
        embedding_params=0,
        shared_params=0,
        head_params=0,
        head_matmul_params=0,
        eos_token_ids=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HexGenCost:
    """Seconds and bytes of stages of like layers. Defaults are the constants of the released optimiser."""

    spec: ModelSpec
    simplifications: Simplifications = PUBLISHED
    flops_per_s: float = 1e12
    bytes_per_s: float = 1e12
    """Not used with `one_rate`."""
    alpha_s: float = 1e-6
    beta_bytes_per_s: float = 1e11
    value_bytes: int = 2
    batch: int = 1
    prompt_tokens: int = 32
    output_tokens: int = 128

    @property
    def decode_steps(self) -> int:
        """Steps after the prompt."""
        counts_prompt = self.simplifications.output_counts_prompt
        return self.output_tokens - (self.prompt_tokens if counts_prompt else 0)

    @property
    def layer_bytes(self) -> int:
        """W."""
        return self.spec.layers[0].params * self.value_bytes

    def compute_s(self, n_tokens: int, n_layers: int = 1, tp: int = 1) -> float:
        """A pass of `n_tokens` of each sequence through a stage: 1 token is a decode step."""
        bytes_per_s = self.flops_per_s if self.simplifications.one_rate else self.bytes_per_s
        flops = self.batch * n_tokens * self.spec.layers[0].flops_per_token
        return n_layers * (self.layer_bytes / bytes_per_s + flops / self.flops_per_s) / tp

    def tp_s(self, n_tokens: int, n_layers: int, tp: int) -> float:
        """The all-reduces of such a pass."""
        step_s = self.alpha_s + self._state_bytes(n_tokens) / (tp * self.beta_bytes_per_s)
        return 2 * (tp - 1) * step_s * 2 * n_layers

    def hop_s(self, n_tokens: int) -> float:
        """Hidden states of such a pass, from leader to leader."""
        return self.alpha_s + self._state_bytes(n_tokens) / self.beta_bytes_per_s

    def request_compute_s(self, n_layers: int, tp: int) -> float:
        """A whole request in a stage, communication apart."""
        return self._request(lambda n_tokens: self.compute_s(n_tokens, n_layers, tp))

    def request_tp_s(self, n_layers: int, tp: int) -> float:
        """All-reduces of a whole request in a stage."""
        return self._request(lambda n_tokens: self.tp_s(n_tokens, n_layers, tp))

    def request_hop_s(self) -> float:
        """A whole request's way into the next machine."""
        return self._request(self.hop_s)

    def memory_bytes(self, n_layers: int, tp: int) -> float:
        """What a stage needs on each of its devices."""
        n_tokens = self.prompt_tokens + self.output_tokens
        ranks = 1 if self.simplifications.kv_on_every_rank else tp
        kv = self.batch * n_tokens * self.spec.kv_values_per_token * self.value_bytes / ranks
        return (self.layer_bytes / tp + kv) * n_layers + 4 * self._state_bytes(n_tokens)

    def _state_bytes(self, n_tokens: int) -> int:
        return self.batch * n_tokens * self.spec.hidden_size * self.value_bytes

    def _request(self, pass_s: Callable[[int], float]) -> float:
        return pass_s(self.prompt_tokens) + self.decode_steps * pass_s(1)
