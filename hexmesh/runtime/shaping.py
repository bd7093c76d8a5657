"""How attention's scores become weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shaping:
    """Scaling, then soft cap, then softmax with an optional sink per head."""

    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None  # (n_heads,)

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None
