"""How a step's room for prompts is shared: half for the first in rank, the rest for who has least left.

The first half lets nobody wait for ever, and equal prompts end one after the other rather than all at last. The other
half lets a short prompt through while a long one is being computed.
"""

from __future__ import annotations

from collections.abc import Collection

from hexmesh.serving.sequence import Sequence


def prompt_shares(prompts: Collection[Sequence], n_tokens: int) -> list[tuple[Sequence, int]]:
    """Which of `prompts`, all with tokens left to schedule, get how many of n_tokens; none gets 0."""
    if not prompts or n_tokens < 1:
        return []
    first = min(prompts, key=_rank)
    shares = {first: min(first.n_to_schedule, n_tokens - n_tokens // 2)}
    n_left = n_tokens - shares[first]
    for sequence in sorted(prompts, key=_shortness):
        if n_left == 0:
            break
        more = min(n_left, sequence.n_to_schedule - shares.get(sequence, 0))
        shares[sequence] = shares.get(sequence, 0) + more
        n_left -= more
    return [(sequence, share) for sequence, share in shares.items() if share]


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _shortness(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.priority, sequence.n_to_schedule, sequence.rank[1]
