"""One sequence on its way through a replica."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hexmesh.serving.past import PastTokens
from hexmesh.serving.prefix import PrefixChain
from hexmesh.wire.data import FinishReason, Generate, SampledToken, SamplingParams, ScoredToken


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
    min_tokens: int = 0
    """Until its output has as many, no stop token is drawn."""
    n_prompt_logprobs: int = -1
    """0 or more: the prompt is scored, with as many of the likeliest tokens at each position."""
    n_scored: int = 0
    """Prompt tokens after the first that have a score."""
    past: PastTokens | None = None
    """Kept where penalties need it."""
    priority: int = 0
    """The lower, the sooner."""
    deadline_s: float = math.inf
    """Nobody wants it after this time."""
    cache_salt: str = ""
    """Only sequences of one salt share blocks."""
    reuses_prefix: bool = True
    """Whether known blocks will do for its prompt; not where every position is to be computed, as for its scores."""
    names_blocks: bool = True
    """Whether its blocks get names, by which others find them."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that may come next, for its next decode row to verify; set by whoever guesses, cleared once judged."""
    n_cached: int = 0
    """Prompt tokens that were found in the prefix cache when it was first taken up."""
    awaits_kv: bool = False
    """Another replica computed all but its last token: its KV is sent once there are blocks for it (`to_fetch`)."""
    kept_s: float = 0.0
    """How long its blocks stay leased, as `lease_id`, when it has ended here: until their KV is handed over."""

    # What follows is its batcher's.
    rank: tuple[int, int] = (0, 0)
    """Priority, then order of arrival; the least goes first."""
    n_computed: int = 0
    """Positions whose KV is known to lie in this sequence's blocks."""
    n_scheduled: int = 0
    """Positions that are computed, or will be by the steps in flight."""
    n_in_flight: int = 0
    """Rows of this sequence in steps in flight, those included whose results do not count any more."""
    last_step: int = 0
    """The newest step that it was in, or that had been formed when it was taken up."""
    blocks: list[int] = field(default_factory=list)
    n_sealed: int = 0
    """How many of them carry a name."""
    prefix: PrefixChain = field(init=False)
    """Set when it is submitted."""
    is_taken_up: bool = False
    """Whether it ever ran."""
    is_over: bool = False
    """Ended, cancelled or dropped: what steps in flight bring for it is ignored."""

    @property
    def lease_id(self) -> str:
        return f"{self.id}/{self.attempt}"

    @property
    def n_output(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_to_schedule(self) -> int:
        return len(self.tokens) - self.n_scheduled

    def start_from(self, n_sealed: int, n_computed: int, last_step: int) -> None:
        """Begin to run with what its first blocks are known to hold."""
        self.n_sealed, self.n_computed, self.n_scheduled, self.last_step = (
            n_sealed,
            n_computed,
            n_computed,
            last_step,
        )
        if not self.is_taken_up:
            self.is_taken_up = True
            self.n_cached = min(n_computed, self.n_prompt)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether prompt tokens wait for a score."""
        return self.n_prompt_logprobs >= 0 and self.n_scored < self.n_prompt - 1

    def take_scores(self, first: int, scores: list[ScoredToken]) -> list[ScoredToken]:
        """Scores of the prompt tokens after position `first` on; those that are news.

        None are where there is a gap before them: their step relied on one that was lost.
        """
        if first > self.n_scored:
            return []
        new = scores[self.n_scored - first :]
        self.n_scored += len(new)
        return new

    def accept(self, sampled: SampledToken) -> FinishReason | None:
        """Append a drawn token; the reason when it was the last one."""
        self.tokens.append(sampled.token_id)
        if sampled.token_id in self.stop_token_ids:
            return "stop"
        if len(self.tokens) - self.n_prompt >= self.max_tokens:
            return "length"
        return None


def sequence_of(message: Generate) -> Sequence:
    """The sequence that a gateway asks for: what was emitted by earlier attempts is replayed like a prompt."""
    sequence = Sequence(
        id=message.sequence,
        attempt=message.attempt,
        tokens=[*message.prompt, *message.emitted],
        n_prompt=len(message.prompt),
        max_tokens=message.max_tokens,
        stop_token_ids=frozenset(message.stop_token_ids),
        sampling=message.sampling,
        min_tokens=message.min_tokens,
        n_prompt_logprobs=message.n_prompt_logprobs,
        n_scored=message.n_scored,
        past=PastTokens(message.prompt, message.sampling) if message.sampling.needs_past else None,
        priority=message.priority,
    )
    sequence.reuses_prefix = not sequence.needs_prompt_logits
    return sequence
