"""What a sequence's penalties need of the tokens before a draw, kept up as the sequence grows."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

from hexmesh.wire.data import Past, SamplingParams
from hexmesh.wire.token_lists import pack_counts, pack_gaps


class PastTokens:
    """The distinct tokens of a prompt, and those of its output with their counts. Owned by one sequence."""

    def __init__(self, prompt: list[int], sampling: SamplingParams) -> None:
        has_repetition = sampling.repetition_penalty != 1.0
        self._prompt = pack_gaps(_gaps_of(sorted(set(prompt)))) if has_repetition else b""
        self._n_taken = len(prompt)
        self._output: list[int] = []
        """Distinct, rising."""
        self._gaps: list[int] = []
        self._counts: list[int] = []

    def upto(self, tokens: list[int]) -> Past:
        """The past of a draw after `tokens`, which begin with those of the last call."""
        for token in tokens[self._n_taken :]:
            self._take(token)
        self._n_taken = len(tokens)
        return Past(prompt=self._prompt, output=pack_gaps(self._gaps), counts=pack_counts(self._counts))

    def _take(self, token: int) -> None:
        at = bisect_left(self._output, token)
        if at < len(self._output) and self._output[at] == token:
            self._counts[at] += 1
            return
        gap = token - self._output[at - 1] if at else token
        if at < len(self._output):
            self._gaps[at] -= gap
        self._output.insert(at, token)
        self._gaps.insert(at, gap)
        self._counts.insert(at, 1)


def _gaps_of(rising: list[int]) -> list[int]:
    return [*rising[:1], *(after - before for before, after in pairwise(rising))]
