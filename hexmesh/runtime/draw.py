"""What one row of logits is drawn with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hexmesh.wire.data import SamplingParams

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw; `position` is its own."""

    params: SamplingParams
    position: int
    seen: np.ndarray = field(default_factory=lambda: _NONE)
    """Distinct tokens of prompt and output, for the repetition penalty."""
    output: np.ndarray = field(default_factory=lambda: _NONE)
    """Distinct tokens of the output, for presence and frequency penalty; `counts` says how often each came."""
    counts: np.ndarray = field(default_factory=lambda: _NONE)
    barred: list[int] = field(default_factory=list)
    """Tokens that may not be drawn."""

    @property
    def has_edits(self) -> bool:
        """Whether it changes logits before the temperature does."""
        return self.params.needs_past or bool(self.params.logit_bias or self.barred)
