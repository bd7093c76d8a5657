"""Which modules of a model the C kernels may stand for: those whose answer on random input they give too.

Nothing here knows an architecture. A module that looks like something we have is tried beside its replacement when it
is loaded, with its own weights; where the answers differ, or the module cannot be called that way, it stays. Whole
decoder layers are tried during one step of the stage, with what the model's own code passes to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import nn

from hexmesh.runtime.attention import running
from hexmesh.runtime.native_modules import (
    GATES,
    NORM_ENDS,
    Gated,
    LayerParts,
    NativeGatedMlp,
    NativeLayer,
    NativeLinear,
    NativeRmsNorm,
    Norm,
)
from hexmesh.runtime.splice import EMBEDDING
from hexmesh.runtime.stage import Stage
from hexmesh.runtime.transformers_api import recording_attention
from hexmesh.wire.data import Row

_N_TOKENS = 5
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the largest element: what orders of summation, and in bfloat16 a rounding that falls the other way, may make."""
_UNFIT = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError)
"""What a module raises that cannot be called as we try to."""


def replace_modules(stage: Stage, shared: Collection[str]) -> None:
    """Put replacements into a loaded stage, whose pool has a block to write to; not into `shared` parts."""
    cut = stage.splice
    kept = {id(cut.part(name)) for name in cut.paths if name in shared or name == EMBEDDING}
    names = [name for name in cut.layer_parts() if name not in shared]
    calls = _calls(stage, {name: cut.part(name) for name in names})
    replace_inner_modules(cut.model, kept)
    for name in names:
        candidate = layer_like(cut.part(name), calls[name].attend_options)
        if candidate is not None and agrees(calls[name].answer, _answer_in(stage, candidate, calls[name])):
            cut.replace_part(name, candidate)


@dataclass(slots=True)
class _Call:
    """How the model called a layer as it was loaded, and what it got. Owned by `_calls`."""

    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)
    answer: object = None
    attend_options: dict[str, object] = field(default_factory=dict)


def _calls(stage: Stage, layers: dict[str, nn.Module]) -> dict[str, _Call]:
    """One step of random input through the stage."""
    calls = {name: _Call() for name in layers}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
            calls[name].args, calls[name].kwargs = args, kwargs
            calls[name].answer = out.clone() if isinstance(out, torch.Tensor) else out

        return hook

    hooks = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with recording_attention() as options:
            stage.run([_row(stage)], stage.random_payload(_row(stage).n_tokens))
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        index = getattr(getattr(layer, "self_attn", None), "layer_idx", -1)
        calls[name].attend_options = options.get(index, {})
    return calls


def _row(stage: Stage) -> Row:
    return Row(start=0, n_tokens=min(_N_TOKENS, stage.pool.block_tokens), blocks=[0])


def _answer_in(stage: Stage, candidate: nn.Module, call: _Call) -> object:
    """What the candidate gives for the call of the original; None where it cannot be called like it."""
    try:
        with torch.inference_mode(), running(stage.context([_row(stage)])):
            return candidate(*call.args, **call.kwargs)
    except _UNFIT:
        return None


def replace_inner_modules(module: nn.Module, kept: Collection[int] = ()) -> nn.Module:
    """The module with all that the kernels can stand for replaced, or its replacement if it is such itself.

    Modules whose `id` is in `kept` stay, with all that is in them.
    """
    if id(module) in kept:
        return module
    if type(module) is nn.Linear:
        return NativeLinear(module) if module.weight.is_contiguous() else module
    trial = _Trial.of(module)
    for name, child in list(module.named_children()):
        replaced = replace_inner_modules(child, kept)
        if replaced is not child:
            setattr(module, name, replaced)
    return module if trial is None else trial.winner(module)


def layer_like(layer: nn.Module, attend_options: dict[str, object]) -> NativeLayer | None:
    """What may stand for a decoder layer whose inner modules are replaced; yet to be compared."""
    attention = getattr(layer, "self_attn", None)
    first, second = getattr(layer, "input_layernorm", None), getattr(layer, "post_attention_layernorm", None)
    mlp, head_dim = getattr(layer, "mlp", None), getattr(attention, "head_dim", None)
    if not (
        isinstance(attention, nn.Module)
        and isinstance(first, NativeRmsNorm)
        and isinstance(second, NativeRmsNorm)
        and isinstance(mlp, NativeGatedMlp)
        and isinstance(head_dim, int)
    ):
        return None
    linears = {
        name: child
        for name, child in attention.named_children()
        if isinstance(child, NativeLinear) or any(True for _ in child.parameters())
    }
    q, k, v, o = (linears.pop(name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    if linears or not (
        isinstance(q, NativeLinear)
        and isinstance(k, NativeLinear)
        and isinstance(v, NativeLinear)
        and isinstance(o, NativeLinear)
    ):
        return None
    parts = LayerParts(
        attention=attention,
        attend_options=attend_options,
        head_dim=head_dim,
        first_norm=first.norm,
        q=q,
        k=k,
        v=v,
        o=o,
        second_norm=second.norm,
        gated=mlp.gated,
    )
    return NativeLayer(layer, parts) if parts.is_consistent else None


def agrees(expected: object, got: object) -> bool:
    """Whether two answers are the same but for rounding."""
    if not isinstance(expected, torch.Tensor) or not isinstance(got, torch.Tensor):
        return False
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    wanted, given = expected.double(), got.double()
    largest = float((wanted - given).abs().max())
    return largest <= _TOLERANCE[expected.dtype] * float(wanted.abs().max())


@dataclass(frozen=True, slots=True)
class _Trial:
    """A small module's answer on random input, taken before anything in it was replaced."""

    x: torch.Tensor
    answer: torch.Tensor

    @classmethod
    def of(cls, module: nn.Module) -> _Trial | None:
        """None for what looks like nothing that we have, or cannot be called with one tensor."""
        width = _width(module)
        if width is None or module._forward_hooks or module._forward_pre_hooks:
            return None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _N_TOKENS, width, generator=generator) * 2 + 0.5
        x = x.to(next(module.parameters()).dtype)
        try:
            with torch.inference_mode():
                return cls(x, module(x))
        except _UNFIT:
            return None

    def winner(self, module: nn.Module) -> nn.Module:
        """The candidate that comes closest to the module, if it agrees; else the module."""
        best, least = module, math.inf
        for candidate in (*_norms(module), *_gated_mlps(module)):
            with torch.inference_mode():
                got = candidate(self.x)
            if agrees(self.answer, got):
                distance = float((got.double() - self.answer.double()).abs().sum())
                if distance < least:
                    best, least = candidate, distance
        return best


def _width(module: nn.Module) -> int | None:
    """Of the input, where the module may be a norm or a gated product by its looks."""
    if _is_norm(module):
        return int(module.weight.numel())  # type: ignore[operator]
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    return min(child.in_features for child in linears) if len(linears) == 3 else None


def _is_norm(module: nn.Module) -> bool:
    is_alone = len(list(module.parameters())) == 1 and not list(module.children())
    weight = getattr(module, "weight", None)
    return is_alone and isinstance(weight, nn.Parameter) and weight.dim() == 1 and _eps(module) is not None


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _norms(module: nn.Module) -> Iterator[NativeRmsNorm]:
    eps = _eps(module)
    if _is_norm(module) and eps is not None:
        for end in NORM_ENDS:
            yield NativeRmsNorm(module, Norm(module.weight.contiguous(), eps, end))  # type: ignore[operator]


def _gated_mlps(module: nn.Module) -> Iterator[NativeGatedMlp]:
    """With the module's three products in any order, and either activation."""
    linears = [child for child in module.children() if isinstance(child, NativeLinear)]
    others = [child for child in module.children() if not isinstance(child, NativeLinear)]
    if len(linears) != 3 or module._parameters or any(True for child in others for _ in child.parameters()):
        return
    for gate, up, down in permutations(linears):
        inner = (gate.in_features, gate.out_features)
        if (up.in_features, up.out_features) == inner == (down.out_features, down.in_features):
            for kind in GATES:
                yield NativeGatedMlp(module, Gated(gate, up, down, kind))
