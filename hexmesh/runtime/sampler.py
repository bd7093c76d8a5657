"""Tokens from logits: per-row temperature, top-k, top-p, min-p in transformers' order; log-probabilities.

Every row is drawn by its own uniform number, a function of seed, choice and position alone, and through
operations that treat rows independently: what a row draws does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hexmesh.runtime.philox import uniform
from hexmesh.wire.data import SampledToken, SamplingParams

MAX_LOGPROBS = 20
_N_CANDIDATES = 256
"""How many of the likeliest tokens are sorted at first; a top-p that they do not fill sorts all."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is drawn with; `position` is the drawn token's own."""

    params: SamplingParams
    position: int


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken]:
    """One token for each row of logits (n_rows, vocab_size). Rows of NaN give token 0, not an error."""
    logits = torch.nan_to_num(logits.float(), nan=0.0)
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [index for index, draw in enumerate(draws) if draw.params.temperature > 0]
    if drawn:
        picked = _draw(logits[drawn], [draws[index] for index in drawn])
        for index, token in zip(drawn, picked, strict=True):
            tokens[index] = token
    return _with_logprobs(logits, tokens, [draw.params for draw in draws])


def _draw(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """Tokens for rows with a temperature."""
    temperature = _column([draw.params.temperature for draw in draws], logits)
    # The likeliest token is moved to 0 first, so that a tiny temperature overflows nothing.
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / temperature
    u = _column([uniform(draw.params.seed, draw.params.choice, draw.position) for draw in draws], logits)
    sorted_rows = [index for index, draw in enumerate(draws) if _needs_order(draw.params)]
    plain_rows = [index for index in range(len(draws)) if not _needs_order(draws[index].params)]
    tokens = [0] * len(draws)
    for rows, choose in ((sorted_rows, _draw_sorted), (plain_rows, _draw_plain)):
        if rows:
            picked = choose(scaled[rows], [draws[index].params for index in rows], u[rows])
            for index, token in zip(rows, picked, strict=True):
                tokens[index] = token
    return tokens


def _needs_order(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _draw_plain(scaled: torch.Tensor, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """No top-k or top-p: the vocabulary in its own order."""
    return _pick(_apply_min_p(scaled.double().exp(), params), u)


def _draw_sorted(scaled: torch.Tensor, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """Top-k and top-p on candidates in falling order.

    Rows whose top-p reaches beyond them sort everything.
    """
    vocab_size = scaled.shape[-1]
    n_candidates = min(vocab_size, max(_N_CANDIDATES, *(entry.top_k for entry in params)))
    values, ids = scaled.topk(n_candidates, dim=-1)
    kept, is_enough = _apply_top_k_top_p(values, scaled, params)
    tokens = ids.gather(1, torch.tensor(_pick(_apply_min_p(kept, params), u), device=ids.device)[:, None])
    picked: list[int] = tokens[:, 0].tolist()
    for row in (~is_enough).nonzero()[:, 0].tolist():
        values, ids = scaled[row : row + 1].sort(dim=-1, descending=True)
        kept, _ = _apply_top_k_top_p(values, values, params[row : row + 1])
        index = _pick(_apply_min_p(kept, params[row : row + 1]), u[row : row + 1])[0]
        picked[row] = int(ids[0, index])
    return picked


def _apply_top_k_top_p(
    values: torch.Tensor, scaled: torch.Tensor, params: list[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised probabilities of candidates in falling order, 0 where filtered; and whether they suffice.

    `scaled` holds the whole vocabulary: without top-k, top-p is a share of all of it.
    """
    weights = values.double().exp()
    vocab_size = scaled.shape[-1]
    top_k = _column([entry.top_k or vocab_size for entry in params], weights)
    top_p = _column([entry.top_p for entry in params], weights)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    weights = weights * (rank < top_k)
    total = torch.where(
        top_k <= weights.shape[-1],
        weights.sum(dim=-1, keepdim=True),
        scaled.double().exp().sum(dim=-1, keepdim=True),
    )
    share_before = (weights.cumsum(dim=-1) - weights) / total
    is_kept = (share_before < top_p) | (rank == 0) | (top_p >= 1.0)
    is_enough = (top_k <= weights.shape[-1]) | (weights.sum(dim=-1, keepdim=True) / total >= top_p)
    return weights * is_kept, is_enough[:, 0]


def _apply_min_p(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what is less likely than min_p times the likeliest."""
    min_p = _column([entry.min_p for entry in params], weights)
    return weights * (weights >= min_p * weights.max(dim=-1, keepdim=True).values)


def _pick(weights: torch.Tensor, u: torch.Tensor) -> list[int]:
    """Inverse of the cumulative distribution at u; never an index of weight 0."""
    cumulative = weights.cumsum(dim=-1)
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    picked: list[int] = torch.minimum(index, last)[:, 0].tolist()
    return picked


def _column(values: list[float] | list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _with_logprobs(
    logits: torch.Tensor, tokens: list[int], params: list[SamplingParams]
) -> list[SampledToken]:
    """Attach log-probabilities of the unfiltered, temperature-1 distribution where they are wanted."""
    sampled = [SampledToken(token_id=token) for token in tokens]
    wanted = [index for index, entry in enumerate(params) if entry.n_logprobs >= 0]
    if not wanted:
        return sampled
    logprobs = logits[wanted].log_softmax(dim=-1)
    n_top = min(MAX_LOGPROBS, logits.shape[-1], max(params[index].n_logprobs for index in wanted))
    values, ids = logprobs.topk(n_top, dim=-1)
    for line, index in enumerate(wanted):
        n = min(params[index].n_logprobs, n_top)
        sampled[index] = SampledToken(
            token_id=tokens[index],
            logprob=float(logprobs[line, tokens[index]]),
            top=list(zip(ids[line, :n].tolist(), values[line, :n].tolist(), strict=True)),
        )
    return sampled
