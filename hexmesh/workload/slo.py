"""How soon requests must be answered."""

from __future__ import annotations

from typing import Annotated

import msgspec


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits that a share of the requests must keep; None: no limit."""

    ttft_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Time to the first token."""
    tpot_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Mean time per output token after the first."""
    attainment: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9

    def is_met(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether one request kept both limits."""
        ttft_kept = self.ttft_s is None or ttft_s <= self.ttft_s
        return ttft_kept and (self.tpot_s is None or tpot_s <= self.tpot_s)
