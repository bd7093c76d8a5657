"""What the mesh is asked to do: how long prompts and answers are and how many run at once."""

from __future__ import annotations

import msgspec


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Mean request shape and the concurrency to plan for."""

    prompt_tokens: int = 512
    output_tokens: int = 128
    max_concurrent_sequences: int = 32

    @property
    def mean_context_tokens(self) -> int:
        """Mean resident context of a sequence while it decodes, for outputs of constant length."""
        return self.prompt_tokens + self.output_tokens // 2
