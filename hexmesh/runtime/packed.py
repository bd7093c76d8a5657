"""Linear layers with weights in oneDNN's own blocked layout, for CPUs where our C kernels do not compute.

`F.linear` reorders plain weights on every call. Measured at 12 layers of 768 in float32 on one thread: a step
of one token takes 16 ms instead of 24, of eight tokens 26 instead of 53, a prefill of 256 tokens 225 instead
of 421. Its calls cost 10 us more, so small layers stay plain. It costs a private copy in place of the mapped
file's pages. The operations are those that torch's own compiler emits; where this build of torch lacks them
nothing is packed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WORTH_ELEMENTS = {torch.float32: 2**17, torch.bfloat16: 2**13, torch.float16: 2**13}
"""Weights from which on packing gains over all batch sizes, measured with weights in cache."""


class PackedLinear(nn.Module):
    """Takes the place of an nn.Linear; equal up to rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._bias = None if linear.bias is None else linear.bias.detach()  # plain, so found without a search
        # The hint is the number of tokens that the layout is best for; the layout serves any number.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # a step that samples nothing asks for the logits of no token
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed layers work here: tried out, because support depends on build and processor."""
    if device.type != "cpu":
        return False
    linear = nn.Linear(32, 16, dtype=dtype)
    nn.init.constant_(linear.weight, 0.25)
    nn.init.zeros_(linear.bias)
    x = torch.ones(2, 32, dtype=dtype)
    try:
        with torch.inference_mode():
            return torch.allclose(PackedLinear(linear)(x), F.linear(x, linear.weight, linear.bias))
    except (RuntimeError, AttributeError):
        return False


def pack_linears(module: nn.Module) -> nn.Module:
    """The module with every large nn.Linear inside packed, or its packed form if it is one itself."""
    if type(module) is nn.Linear:
        is_worth_it = module.weight.numel() >= WORTH_ELEMENTS[module.weight.dtype]
        return PackedLinear(module) if is_worth_it else module
    for name, child in module.named_children():
        packed = pack_linears(child)
        if packed is not child:
            setattr(module, name, packed)
    return module
