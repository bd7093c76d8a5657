"""Natural-log probabilities of tokens, and the likeliest tokens beside them, of the model's own distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hexmesh.runtime.likeliest import Peaks, chunked, slices, take_rows
from hexmesh.wire.data import MAX_LOGPROBS, ScoredToken

LEAST_LOGPROB = -9999.0
"""What an impossible token gets: JSON has no infinity."""


class TokenLogprob(NamedTuple):
    logprob: float
    rank: int
    """1 for the likeliest token; equals share the best rank."""
    top: list[tuple[int, float]]
    """The MAX_LOGPROBS likeliest tokens."""


def token_logprobs(logits: torch.Tensor, tokens: list[int]) -> list[TokenLogprob]:
    """Of one token for each row of logits (n_rows, vocab_size) float32."""
    peaks = Peaks(logits)
    weights = (peaks.logits - peaks.top).exp_()
    log_total = chunked(weights, torch.sum).double().sum(dim=-1, keepdim=True).log().float() + peaks.top
    chosen = peaks.logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (peaks.logits > chosen).sum(dim=-1) + 1
    values, ids = peaks.likeliest(min(MAX_LOGPROBS, logits.shape[1]))
    logprobs = (chosen - log_total).clamp(min=LEAST_LOGPROB)[:, 0].tolist()
    top = (values - log_total).clamp(min=LEAST_LOGPROB).tolist()
    return [
        TokenLogprob(logprob, rank, list(zip(named, likely, strict=True)))
        for logprob, rank, named, likely in zip(logprobs, ranks.tolist(), ids.tolist(), top, strict=True)
    ]


def score(logits: torch.Tensor, followers: list[int], n_top: int) -> list[ScoredToken]:
    """Each row's follower by that row's distribution."""
    scored: list[ScoredToken] = []
    for rows in slices(list(range(len(followers))), logits.shape[1], logits.device):
        tokens = [followers[row] for row in rows]
        for token, (logprob, rank, top) in zip(
            tokens, token_logprobs(take_rows(logits, rows), tokens), strict=True
        ):
            scored.append(ScoredToken(token_id=token, logprob=logprob, rank=rank, top=top[:n_top]))
    return scored
