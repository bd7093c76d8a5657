"""Tokens from logits: bias, penalties, barred tokens, temperature, top-k, top-p, min-p, in transformers' order.

Every row is drawn by its own uniform number, a function of seed, choice and position alone, and through
operations that treat rows independently: what a row draws does not depend on its neighbours. Rows of one kind are
worked on together, a few at a time.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from hexmesh.runtime.draw import Draw
from hexmesh.runtime.likeliest import Peaks, chunk_of, chunked, slices, take_rows
from hexmesh.runtime.logit_edits import edited
from hexmesh.runtime.logprobs import token_logprobs
from hexmesh.runtime.nucleus import nucleus
from hexmesh.runtime.philox import uniforms
from hexmesh.wire.data import MAX_LOGPROBS, SampledToken, SamplingParams

_CANDIDATES = (64, 512)
"""How many of the likeliest tokens are looked at for a top-p, one after the other, before all are."""

Kind = tuple[Literal["greedy", "plain", "top_k", "top_p"], int]
"""How rows are drawn, and for top-k on how many candidates."""


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken]:
    """One token for each row of logits (n_rows, vocab_size). Rows of NaN give a token, not an error."""
    tokens = [0] * len(draws)
    by_kind: dict[Kind, list[int]] = {}
    for index, draw in enumerate(draws):
        by_kind.setdefault(_kind_of(draw.params, logits.shape[1]), []).append(index)
    for kind, rows in by_kind.items():
        for portion in slices(rows, logits.shape[1], logits.device):
            picked = _choose(kind, take_rows(logits, portion), [draws[index] for index in portion])
            _put(tokens, portion, picked)
    return _with_logprobs(logits, tokens, [draw.params for draw in draws])


def _kind_of(params: SamplingParams, vocab_size: int) -> Kind:
    """Rows of one kind are drawn in the same way."""
    if params.temperature == 0:
        return "greedy", 0
    if params.top_k > 0:
        return "top_k", _n_candidates(params, vocab_size)
    return ("top_p" if params.top_p < 1.0 else "plain"), 0


def _choose(kind: Kind, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """A token for each row; `logits` are left as they are."""
    peaks = Peaks(edited(logits, draws))
    if kind[0] == "greedy":
        found: list[int] = peaks.first().tolist()
        return found
    params = [draw.params for draw in draws]
    seeds, choices = [one.seed for one in params], [one.choice for one in params]
    u = _column(uniforms(seeds, choices, [draw.position for draw in draws]), logits)
    match kind[0]:
        case "plain":
            return _choose_plain(_apply_min_p(_weights(peaks, params), params), u)
        case "top_k":
            return _choose_top_k(peaks, params, u)
        case "top_p":
            return _choose_top_p(peaks, params, u)


def _choose_plain(weights: torch.Tensor, u: torch.Tensor) -> list[int]:
    """By unnormalised probabilities in the vocabulary's own order, first to the chunk and then to the token."""
    upto_chunk = chunked(weights, torch.sum).double().cumsum(dim=-1)
    target = u * upto_chunk[:, -1:]
    chunk = _place(upto_chunk, target)
    before = torch.where(chunk > 0, upto_chunk.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inner, ids = chunk_of(weights, chunk)
    place = _place(inner.double().cumsum(dim=-1), target - before)
    found: list[int] = ids.gather(1, place)[:, 0].tolist()
    return found


def _choose_top_k(peaks: Peaks, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """Top-k, and top-p of what it leaves: on as many candidates as the kind of these rows says."""
    weights, ids = _candidates(peaks, params, _n_candidates(params[0], peaks.logits.shape[1]))
    weights = _apply_top_k(weights, params)
    kept, _ = _apply_top_p(weights, weights.sum(dim=-1, keepdim=True), params)
    return _choose_candidate(kept, ids, params, u)


def _choose_top_p(peaks: Peaks, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """Top-p alone: on the likeliest tokens, and for rows whose nucleus is wider, on more of them and then on all."""
    weights = _weights(peaks, params)
    total = chunked(weights, torch.sum).double().sum(dim=-1, keepdim=True)
    tokens = [0] * len(params)
    left = list(range(len(params)))
    for n in _CANDIDATES:
        if left:
            chosen = [params[row] for row in left]
            candidates, ids = _candidates(peaks.of(left), chosen, min(n, weights.shape[1]))
            kept, is_enough = _apply_top_p(candidates, total[left], chosen)
            _put(tokens, left, _choose_candidate(kept, ids, chosen, u[left]))
            left = [row for row, enough in zip(left, is_enough, strict=True) if not enough]
    if left:
        chosen = [params[row] for row in left]
        kept = _apply_min_p(nucleus(weights[left], total[left], [one.top_p for one in chosen]), chosen)
        _put(tokens, left, _choose_plain(kept, u[left]))
    return tokens


def _n_candidates(params: SamplingParams, vocab_size: int) -> int:
    """More than top-k, in few sizes: a row's draw must not depend on its neighbours' top-k."""
    return min(vocab_size, max(_CANDIDATES[0], 1 << params.top_k.bit_length()))


def _candidates(
    peaks: Peaks, params: list[SamplingParams], n_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unnormalised probabilities of each row's likeliest tokens in falling order, and the tokens."""
    logits, ids = peaks.likeliest(n_candidates)
    return ((logits - peaks.top) / _temperatures(params, logits)).double().exp_(), ids


def _choose_candidate(
    weights: torch.Tensor, ids: torch.Tensor, params: list[SamplingParams], u: torch.Tensor
) -> list[int]:
    upto = _apply_min_p(weights, params).cumsum(dim=-1)
    found: list[int] = ids.gather(1, _place(upto, u * upto[:, -1:]))[:, 0].tolist()
    return found


def _apply_top_k(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what is less likely than the k-th token; tokens as likely as that stay, as in transformers."""
    last = torch.tensor([min(one.top_k, weights.shape[1]) - 1 for one in params], device=weights.device)
    return weights.masked_fill(weights < weights.gather(1, last[:, None]), 0.0)


def _apply_top_p(
    weights: torch.Tensor, total: torch.Tensor, params: list[SamplingParams]
) -> tuple[torch.Tensor, list[bool]]:
    """Candidates in falling order up to a share of `total`, the others 0; and whether they hold that share."""
    top_p = _column([one.top_p for one in params], weights)
    share = weights.cumsum(dim=-1) / total
    is_first = torch.arange(weights.shape[1], device=weights.device) == 0
    is_kept = (share - weights / total < top_p) | is_first | (top_p >= 1.0)
    return weights * is_kept, (share[:, -1] >= top_p[:, 0]).tolist()


def _apply_min_p(weights: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """Zero what is less likely than min_p times the likeliest, whose weight is 1."""
    if all(one.min_p == 0 for one in params):
        return weights
    min_p = _column([one.min_p for one in params], weights).to(weights.dtype)
    return weights.masked_fill_(weights < min_p, 0.0)


def _weights(peaks: Peaks, params: list[SamplingParams]) -> torch.Tensor:
    """Probabilities of the whole vocabulary by the likeliest one's: a tiny temperature overflows nothing."""
    shifted = peaks.logits - peaks.top
    if any(one.temperature != 1.0 for one in params):
        shifted /= _temperatures(params, shifted)
    return shifted.exp_()


def _temperatures(params: list[SamplingParams], like: torch.Tensor) -> torch.Tensor:
    return _column([one.temperature for one in params], like).float()


def _put(tokens: list[int], rows: list[int], picked: list[int]) -> None:
    for row, token in zip(rows, picked, strict=True):
        tokens[row] = token


def _place(upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where the rising sums first exceed `target` (n_rows, 1); never a place that adds nothing."""
    place = torch.searchsorted(upto, target, right=True)
    last = torch.searchsorted(upto, upto[:, -1:].contiguous())  # the first place that reaches the sum
    return torch.minimum(place, last)


def _column(values: list[float] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).to(like.device)[:, None]


def _with_logprobs(
    logits: torch.Tensor, tokens: list[int], params: list[SamplingParams]
) -> list[SampledToken]:
    """Attach log-probabilities of the unfiltered, temperature-1 distribution where they are wanted."""
    sampled = [SampledToken(token_id=token) for token in tokens]
    wanted = [index for index, one in enumerate(params) if one.n_logprobs >= 0]
    for portion in slices(wanted, logits.shape[1], logits.device):
        found = token_logprobs(take_rows(logits, portion), [tokens[index] for index in portion])
        for index, one in zip(portion, found, strict=True):
            n_top = min(params[index].n_logprobs, MAX_LOGPROBS)
            sampled[index] = SampledToken(token_id=tokens[index], logprob=one.logprob, top=one.top[:n_top])
    return sampled
