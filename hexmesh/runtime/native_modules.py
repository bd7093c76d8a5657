"""Modules that compute by the C kernels of hexmesh/native/gemm.c, from weights that stay where they were loaded.

Plain row-major weights serve any number of tokens, so the mapped file's own pages do and no copy is made. What a
token gets does not depend on its neighbours in the batch, nor on the number of threads, as long as the kernels
compute; for many tokens in bfloat16 torch does. Which module may stand for which is proven in replacing.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hexmesh import native
from hexmesh.runtime.attention import attend

KERNELS = native.load("gemm")
MOST_TOKENS = {torch.float32: 2**31, torch.bfloat16: 96}
"""Beyond so many tokens torch computes. Measured for 768 x 12 layers: in bfloat16 64 tokens take 36 ms here and 42 in
torch, 256 take 141 and 125; in float32 torch takes twice as long for any number."""
NORM_ENDS = (0, 1, 2)
"""How a norm ends: round then scale, scale then round, scale by one plus the weight."""
GATES = (0, 1)
"""SiLU, GELU by tanh."""


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels compute here. Without wide vectors they lose to oneDNN."""
    return (
        KERNELS is not None
        and device.type == "cpu"
        and dtype in MOST_TOKENS
        and KERNELS.instruction_sets()[0] != "generic"
    )


class NativeLinear(nn.Module):
    """Takes the place of an nn.Linear; equal up to rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight  # looked up at each call: a tied head's is set anew
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        n_tokens = x.numel() // self.in_features
        if not _fits(x, weight, self.in_features) or n_tokens > MOST_TOKENS[x.dtype]:
            return F.linear(x, weight, self.bias)
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        if n_tokens:
            x = x.contiguous()
            KERNELS.linear(  # type: ignore[union-attr]
                *_step(x, n_tokens),
                self.in_features,
                x.data_ptr(),
                weight.data_ptr(),
                0 if self.bias is None else self.bias.data_ptr(),
                0,
                y.data_ptr(),
                self.out_features,
            )
        return y


@dataclass(frozen=True, slots=True)
class Norm:
    """A root-mean-square norm's weight and how it goes about it."""

    weight: torch.Tensor
    eps: float
    end: int

    @property
    def arguments(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.end


@dataclass(frozen=True, slots=True)
class Gated:
    """The three products of down(act(gate(x)) * up(x))."""

    gate: NativeLinear
    up: NativeLinear
    down: NativeLinear
    kind: int

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*_addresses(self.gate), *_addresses(self.up), *_addresses(self.down))


class NativeRmsNorm(nn.Module):
    """Takes the place of a module that divides by the root of the mean square and scales."""

    def __init__(self, original: nn.Module, norm: Norm) -> None:
        super().__init__()
        self.original = original
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.norm.weight.numel()
        if not _fits(x, self.norm.weight, width):
            return self.original(x)  # type: ignore[no-any-return]
        x = x.contiguous()
        y = torch.empty_like(x)
        KERNELS.rms_norm(  # type: ignore[union-attr]
            x.dtype == torch.bfloat16,
            x.numel() // width,
            width,
            x.data_ptr(),
            y.data_ptr(),
            *self.norm.arguments,
            self.norm.eps,
        )
        return y


class NativeGatedMlp(nn.Module):
    """Takes the place of a module that computes down(act(gate(x)) * up(x)), and asks it for many tokens."""

    def __init__(self, original: nn.Module, gated: Gated) -> None:
        super().__init__()
        self.original = original
        self.gated = gated
        self._arguments = gated.arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.gated.gate.in_features
        n_tokens = x.numel() // width
        if not _fits(x, self.gated.gate.weight, width) or not 0 < n_tokens <= MOST_TOKENS[x.dtype]:
            return self.original(x)  # type: ignore[no-any-return]
        x = x.contiguous()
        y = torch.empty_like(x)
        KERNELS.gated(  # type: ignore[union-attr]
            *_step(x, n_tokens),
            width,
            x.data_ptr(),
            self.gated.gate.out_features,
            self.gated.kind,
            *self._arguments,
            y.data_ptr(),
        )
        return y


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a decoder layer is made of: x += o(attention(q, k, v of norm(x))), then x += gated(norm(x))."""

    attention: nn.Module
    """Passed to `attend`, for its layer index."""
    attend_options: dict[str, object]
    head_dim: int
    first_norm: Norm
    q: NativeLinear
    k: NativeLinear
    v: NativeLinear
    o: NativeLinear
    second_norm: Norm
    gated: Gated

    @property
    def is_consistent(self) -> bool:
        """Whether all sizes fit: the kernels read as far as they are told."""
        width, n_outputs = self.q.in_features, self.q.out_features
        widths = (self.k.in_features, self.v.in_features, self.o.out_features, self.gated.gate.in_features)
        norms = (self.first_norm.weight.numel(), self.second_norm.weight.numel())
        return (
            {*widths, *norms} == {width}
            and self.o.in_features == n_outputs
            and self.k.out_features == self.v.out_features
            and self.head_dim % 2 == n_outputs % self.head_dim == self.k.out_features % self.head_dim == 0
        )


class NativeLayer(nn.Module):
    """Takes the place of a decoder layer: two calls around attention. Asks the original for what it does not know."""

    def __init__(self, original: nn.Module, parts: LayerParts) -> None:
        super().__init__()
        for name, value in vars(original).items():  # model code may read plain attributes of its layers
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.original = original
        self._parts = parts
        self._n_heads = parts.q.out_features // parts.head_dim
        self._n_kv_heads = parts.k.out_features // parts.head_dim
        self._before = (
            parts.q.in_features,
            self._n_heads,
            self._n_kv_heads,
            parts.head_dim,
            *parts.first_norm.arguments,
            *_addresses(parts.q),
            *_addresses(parts.k),
            *_addresses(parts.v),
            parts.first_norm.eps,
        )
        self._after = (
            parts.q.in_features,
            parts.o.in_features,
            parts.gated.gate.out_features,
            parts.gated.kind,
            *_addresses(parts.o),
            *parts.second_norm.arguments,
            *parts.gated.arguments,
            parts.second_norm.eps,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: object,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        n_tokens = hidden_states.shape[1]
        if (
            args
            or attention_mask is not None
            or not self._knows(hidden_states, position_embeddings)
            or not 0 < n_tokens <= MOST_TOKENS[hidden_states.dtype]
        ):
            answer: torch.Tensor = self.original(
                hidden_states,
                *args,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            return answer
        assert position_embeddings is not None
        return self._forward(hidden_states.contiguous(), n_tokens, *position_embeddings)

    def _knows(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        if position_embeddings is None or x.shape[0] != 1:
            return False
        if not _fits(x, self._parts.q.weight, self._parts.q.in_features):
            return False
        shape = (1, x.shape[1], self._parts.head_dim)
        return all(part.shape == shape and part.dtype == x.dtype for part in position_embeddings)

    def _forward(self, x: torch.Tensor, n_tokens: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dtype, dim = x.dtype, self._parts.head_dim
        cos, sin = cos.contiguous(), sin.contiguous()
        step = _step(x, n_tokens)
        q = torch.empty(1, n_tokens, self._n_heads, dim, dtype=dtype)
        k = torch.empty(1, n_tokens, self._n_kv_heads, dim, dtype=dtype)
        v = torch.empty_like(k)
        KERNELS.before_attention(  # type: ignore[union-attr]
            *step,
            x.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            *self._before,
        )
        attended, _ = attend(
            self._parts.attention,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None,
            **self._parts.attend_options,  # type: ignore[arg-type]
        )
        attended = attended.contiguous()
        y = torch.empty_like(x)
        KERNELS.after_attention(  # type: ignore[union-attr]
            *step, x.data_ptr(), attended.data_ptr(), y.data_ptr(), *self._after
        )
        return y


def _fits(x: torch.Tensor, weight: torch.Tensor, width: int) -> bool:
    """Whether the kernels may read x as rows for these weights."""
    return x.dtype == weight.dtype and x.shape[-1] == width


def _step(x: torch.Tensor, n_tokens: int) -> tuple[bool, int, int]:
    return x.dtype == torch.bfloat16, torch.get_num_threads(), n_tokens


def _addresses(linear: NativeLinear) -> tuple[int, int]:
    return linear.weight.data_ptr(), 0 if linear.bias is None else linear.bias.data_ptr()
