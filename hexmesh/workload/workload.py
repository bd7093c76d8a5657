"""The workload that plans are made for."""

from __future__ import annotations

from typing import Annotated

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.workload.arrivals import Arrivals
from hexmesh.workload.lengths import ConstantLengths, Lengths
from hexmesh.workload.slo import Slo


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Mean request shape and the concurrency to plan for; where known, also distributions, arrivals and limits."""

    prompt_tokens: int = 512
    output_tokens: int = 128
    max_concurrent_sequences: int = 32
    lengths: Lengths | None = None
    """None: every request has the mean lengths."""
    arrivals: Arrivals | None = None
    """None: as many requests as can be served."""
    slo: Slo = Slo()

    def __post_init__(self) -> None:
        lengths = self.lengths
        if lengths is not None and (self.prompt_tokens, self.output_tokens) != _means(lengths):
            raise InvalidInput(
                f"prompts of {self.prompt_tokens} and outputs of {self.output_tokens} tokens are not "
                f"the means of their distribution, {lengths.prompt:.0f} and {lengths.output:.0f}",
                next_step="make it with Workload.of",
            )

    @staticmethod
    def of(
        lengths: Lengths,
        arrivals: Arrivals | None = None,
        slo: Slo | None = None,
        *,
        max_concurrent_sequences: Annotated[int, msgspec.Meta(ge=1)] = 32,
    ) -> Workload:
        """The workload of such requests, with their means."""
        prompt, output = _means(lengths)
        return Workload(
            prompt_tokens=prompt,
            output_tokens=output,
            max_concurrent_sequences=max_concurrent_sequences,
            lengths=lengths,
            arrivals=arrivals,
            slo=slo or Slo(),
        )

    @property
    def drawn_lengths(self) -> Lengths:
        """What requests' lengths are drawn from."""
        return self.lengths or ConstantLengths(prompt=self.prompt_tokens, output=self.output_tokens)

    @property
    def mean_context(self) -> float:
        """Mean context of a sequence while it decodes, long outputs weighing more (see `lengths`)."""
        return self.drawn_lengths.mean_context

    @property
    def mean_context_tokens(self) -> int:
        """The same in whole tokens; without a distribution, for outputs of constant length."""
        return (
            self.prompt_tokens + self.output_tokens // 2 if self.lengths is None else round(self.mean_context)
        )

    @property
    def requests_per_s(self) -> float | None:
        """The mean rate that is asked for; None: as much as can be served."""
        return None if self.arrivals is None else self.arrivals.requests_per_s


def _means(lengths: Lengths) -> tuple[int, int]:
    return max(1, round(lengths.prompt)), max(1, round(lengths.output))
