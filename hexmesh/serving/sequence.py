"""One sequence on its way through a replica."""

from __future__ import annotations

from dataclasses import dataclass, field

from hexmesh.wire.data import FinishReason, Generate, SampledToken, SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request's tokens and how far their KV has been computed; owned by one batcher. Equal only to itself."""

    id: str
    attempt: int
    tokens: list[int]
    """Prompt and output so far."""
    n_prompt: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams
    n_computed: int = 0
    """Positions whose KV lies in this sequence's blocks."""
    blocks: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_to_compute(self) -> int:
        return len(self.tokens) - self.n_computed

    def accept(self, sampled: SampledToken) -> FinishReason | None:
        """Append a drawn token; the reason when it was the last one."""
        self.tokens.append(sampled.token_id)
        if sampled.token_id in self.stop_token_ids:
            return "stop"
        if self.n_output >= self.max_tokens:
            return "length"
        return None


def sequence_of(message: Generate) -> Sequence:
    """The sequence that a gateway asks for: what was emitted by earlier attempts is replayed like a prompt."""
    return Sequence(
        id=message.sequence,
        attempt=message.attempt,
        tokens=[*message.prompt, *message.emitted],
        n_prompt=len(message.prompt),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
    )
