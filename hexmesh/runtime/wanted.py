"""What a step's rows want of the last stage: tokens to draw, each with its own past, and prompt tokens to score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from hexmesh.errors import InvalidInput
from hexmesh.runtime.draw import Draw
from hexmesh.runtime.logprobs import score
from hexmesh.runtime.sampler import sample
from hexmesh.wire.data import Barred, Past, Row, SampledToken, SamplingParams, ScoredToken, Scoring
from hexmesh.wire.token_lists import unpack_counts, unpack_tokens

MAX_LOGITS = 2**28
"""Of one step: it bounds what a hostile step can allocate."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """All draws and scores of one step, checked."""

    draws: list[Draw] = field(default_factory=list)
    n_drawn: list[int] = field(default_factory=list)
    """Draws of each row that wants some."""
    scorings: list[Scoring] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Which of the step's tokens logits are needed of: one for each draw, then one for each score."""

    def answer(self, logits: torch.Tensor) -> tuple[list[list[SampledToken]], list[list[ScoredToken]]]:
        """A list for each row that wants draws, and one for each that wants scores, from logits of `tokens`."""
        n_draws = len(self.draws)
        drawn = iter(sample(logits[:n_draws], self.draws) if n_draws else [])
        sampled = [list(islice(drawn, n)) for n in self.n_drawn]
        scored, at = [], n_draws
        for scoring in self.scorings:
            stop = at + len(scoring.followers)
            scored.append(score(logits[at:stop], scoring.followers, scoring.n_top))
            at = stop
        return sampled, scored


def wanted_of(rows: list[Row], vocab_size: int) -> Wanted:
    """What the rows want. Raises InvalidInput for tokens outside the vocabulary or positions outside a row."""
    wanted = Wanted()
    to_score: list[int] = []
    start = 0
    for row in rows:
        stop = start + row.n_tokens
        if row.sample is not None:
            _check_drafts(row, vocab_size)
            draws = list(_draws(row, row.sample, vocab_size))
            wanted.draws.extend(draws)
            wanted.n_drawn.append(len(draws))
            wanted.tokens.extend(range(stop - len(draws), stop))
        if row.scoring is not None:
            _check_scoring(row, row.scoring, vocab_size)
            wanted.scorings.append(row.scoring)
            first = start + row.scoring.first
            to_score.extend(range(first, first + len(row.scoring.followers)))
        start = stop
    wanted.tokens.extend(to_score)
    if len(wanted.tokens) * vocab_size > MAX_LOGITS:
        raise InvalidInput(f"a step that wants {len(wanted.tokens)} times {vocab_size} logits")
    return wanted


def _draws(row: Row, params: SamplingParams, vocab_size: int) -> Iterator[Draw]:
    """One draw where each draft stands, and one after the row's last token."""
    first = row.start + row.n_tokens - len(row.drafts)
    barred = row.barred or Barred(token_ids=[])
    # An end that the vocabulary lacks, as some models' configs name one, is not drawn anyway.
    ends = [token for token in barred.token_ids if token < vocab_size]
    _check_tokens([token for token, _ in params.logit_bias], vocab_size)
    past = _SeenTokens(row.past or Past(), params, vocab_size) if params.needs_past else None
    for n_drafts in range(len(row.drafts) + 1):
        yield Draw(
            params,
            first + n_drafts,
            barred=ends if n_drafts < barred.n_draws else [],
            **({} if past is None else past.after(row.drafts[:n_drafts])),
        )


class _SeenTokens:
    """The tokens before a row's draws, as arrays."""

    def __init__(self, past: Past, params: SamplingParams, vocab_size: int) -> None:
        self._output = unpack_tokens(past.output, vocab_size)
        self._counts = unpack_counts(past.counts)
        if len(self._counts) != len(self._output):
            raise InvalidInput(f"{len(self._counts)} counts for {len(self._output)} tokens of a past")
        prompt = unpack_tokens(past.prompt, vocab_size)
        self._has_repetition = params.repetition_penalty != 1.0
        self._seen = _joined(prompt, self._output) if self._has_repetition else prompt[:0]

    def after(self, drafts: list[int]) -> dict[str, np.ndarray]:
        """The fields of a draw that follows these drafts."""
        if not drafts:
            return {"seen": self._seen, "output": self._output, "counts": self._counts}
        guessed = np.array(drafts, dtype=np.int64)
        output, place = np.unique(np.concatenate([self._output, guessed]), return_inverse=True)
        times = np.concatenate([self._counts, np.ones(len(drafts), dtype=np.float32)])
        return {
            "seen": _joined(self._seen, np.unique(guessed)) if self._has_repetition else self._seen,
            "output": output,
            "counts": np.bincount(place, weights=times).astype(np.float32),
        }


def _joined(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Two lists of distinct tokens as one, the first of them rising; not in order."""
    if not len(tokens):
        return others
    places = np.searchsorted(tokens, others).clip(max=len(tokens) - 1)
    return np.concatenate([tokens, others[tokens[places] != others]])


def _check_drafts(row: Row, vocab_size: int) -> None:
    _check_tokens(row.drafts, vocab_size)
    if len(row.drafts) >= row.n_tokens:
        raise InvalidInput(f"{len(row.drafts)} drafts in a row of {row.n_tokens} tokens")


def _check_scoring(row: Row, scoring: Scoring, vocab_size: int) -> None:
    _check_tokens(scoring.followers, vocab_size)
    stop = scoring.first + len(scoring.followers)
    if stop > row.n_tokens:
        raise InvalidInput(f"scores of positions up to {stop} in a row of {row.n_tokens} tokens")


def _check_tokens(tokens: list[int], vocab_size: int) -> None:
    if tokens and max(tokens) >= vocab_size:
        raise InvalidInput(f"token id {max(tokens)} with a vocabulary of {vocab_size}")
