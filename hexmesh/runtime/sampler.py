"""Tokens from logits: bias, penalties, barred tokens, temperature, top-k, top-p, min-p, in transformers' order.

Every row is drawn by its own uniform number, a function of seed, choice and position alone, and through
operations that treat rows independently: what a row draws does not depend on its neighbours. Rows of one kind are
worked on together, a few at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from hexmesh.runtime.likeliest import Peaks, chunk_of, chunked, slices, take_rows
from hexmesh.runtime.logprobs import token_logprobs
from hexmesh.runtime.philox import uniforms
from hexmesh.wire.data import MAX_LOGPROBS, SampledToken, SamplingParams

_CANDIDATES = (256, 4096)
"""How many of the likeliest tokens are looked at; a top-p or top-k that they do not fill looks further."""
_NONE = np.zeros(0, dtype=np.int64)

Kind = Literal["greedy", "plain", "ordered"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is drawn with; `position` is the drawn token's own."""

    params: SamplingParams
    position: int
    seen: np.ndarray = field(default_factory=lambda: _NONE)
    """Distinct tokens of prompt and output, for the repetition penalty."""
    output: np.ndarray = field(default_factory=lambda: _NONE)
    """Distinct tokens of the output, for presence and frequency penalty; `counts` says how often each came."""
    counts: np.ndarray = field(default_factory=lambda: _NONE)
    barred: list[int] = field(default_factory=list)
    """Tokens that may not be drawn."""

    @property
    def has_edits(self) -> bool:
        """Whether it changes logits before the temperature does."""
        return self.params.needs_past or bool(self.params.logit_bias or self.barred)

    @property
    def kind(self) -> Kind:
        if self.params.temperature == 0:
            return "greedy"
        return "ordered" if self.params.top_k > 0 or self.params.top_p < 1.0 else "plain"


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken]:
    """One token for each row of logits (n_rows, vocab_size). Rows of NaN give a token, not an error."""
    tokens = [0] * len(draws)
    by_kind: dict[Kind, list[int]] = {}
    for index, draw in enumerate(draws):
        by_kind.setdefault(draw.kind, []).append(index)
    for kind, rows in by_kind.items():
        for portion in slices(rows, logits.shape[1], logits.device):
            picked = _choose(kind, take_rows(logits, portion), [draws[index] for index in portion])
            for index, token in zip(portion, picked, strict=True):
                tokens[index] = token
    return _with_logprobs(logits, tokens, [draw.params for draw in draws])


def _choose(kind: Kind, logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """A token for each row; `logits` are left as they are."""
    peaks = Peaks(_edited(logits, draws))
    if kind == "greedy":
        found: list[int] = peaks.first().tolist()
        return found
    params = [draw.params for draw in draws]
    seeds, choices = [one.seed for one in params], [one.choice for one in params]
    u = _column(uniforms(seeds, choices, [draw.position for draw in draws]), logits)
    return _choose_plain(peaks, params, u) if kind == "plain" else _choose_ordered(peaks, params, u)


def _choose_plain(peaks: Peaks, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """No top-k or top-p: over the vocabulary in its own order, first to the chunk and then to the token."""
    weights = _apply_min_p(_weights(peaks, params), params)
    upto_chunk = chunked(weights, torch.sum).double().cumsum(dim=-1)
    target = u * upto_chunk[:, -1:]
    chunk = _place(upto_chunk, target)
    before = torch.where(chunk > 0, upto_chunk.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inner, ids = chunk_of(weights, chunk)
    place = _place(inner.double().cumsum(dim=-1), target - before)
    found: list[int] = ids.gather(1, place)[:, 0].tolist()
    return found


def _choose_ordered(peaks: Peaks, params: list[SamplingParams], u: torch.Tensor) -> list[int]:
    """Top-k and top-p on candidates in falling order, more of them for the rows whose filters reach beyond."""
    tokens = [0] * len(params)
    vocab_size = peaks.logits.shape[1]
    total = _total(peaks, params)
    left = list(range(len(params)))
    for n_candidates in (*(n for n in _CANDIDATES if n < vocab_size), vocab_size):
        tried = [row for row in left if n_candidates == vocab_size or params[row].top_k <= n_candidates]
        if not tried:
            continue
        chosen = [params[row] for row in tried]
        picked, is_enough = _choose_candidate(peaks.of(tried), chosen, total[tried], u[tried], n_candidates)
        for row, token in zip(tried, picked, strict=True):
            tokens[row] = token
        done = {row for row, is_done in zip(tried, is_enough, strict=True) if is_done}
        left = [row for row in left if row not in done]
    return tokens


def _choose_candidate(
    peaks: Peaks, params: list[SamplingParams], total: torch.Tensor, u: torch.Tensor, n_candidates: int
) -> tuple[list[int], list[bool]]:
    """A token for each row, and whether so many candidates suffice to say so."""
    logits, ids = peaks.likeliest(n_candidates)
    weights = ((logits - peaks.top) / _temperatures(params, logits)).double().exp_()
    kept, is_enough = _apply_top_k_top_p(weights, total, params)
    upto = _apply_min_p(kept, params).cumsum(dim=-1)
    place = _place(upto, u * upto[:, -1:])
    return ids.gather(1, place)[:, 0].tolist(), is_enough.tolist()


def _apply_top_k_top_p(
    weights: torch.Tensor, total: torch.Tensor, params: list[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of candidates in falling order, 0 where filtered; and whether the candidates suffice.

    `total` is the weight of the whole vocabulary: without top-k, top-p is a share of all of it. Tokens as likely as
    the last one of top-k stay, as in transformers.
    """
    n_candidates = weights.shape[1]
    last = torch.tensor(
        [min(one.top_k or n_candidates, n_candidates) - 1 for one in params], device=weights.device
    )
    least = weights.gather(1, last[:, None])
    has_top_k = torch.tensor([one.top_k > 0 for one in params], device=weights.device)[:, None]
    weights = torch.where(has_top_k & (weights < least), 0.0, weights)
    total = torch.where(has_top_k, weights.sum(dim=-1, keepdim=True), total)
    top_p = _column([one.top_p for one in params], weights)
    share = weights.cumsum(dim=-1) / total
    share_before = share - weights / total
    is_first = torch.arange(n_candidates, device=weights.device) == 0
    is_kept = (share_before < top_p) | is_first | (top_p >= 1.0)
    is_enough = has_top_k | (share[:, -1:] >= top_p)
    return weights * is_kept, is_enough[:, 0]


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


def _total(peaks: Peaks, params: list[SamplingParams]) -> torch.Tensor:
    """The weight of each row's whole vocabulary (n_rows, 1); not computed where top-k makes it unnecessary."""
    if all(one.top_k > 0 for one in params):
        return peaks.top.new_ones(len(params), 1, dtype=torch.float64)
    return chunked(_weights(peaks, params), torch.sum).double().sum(dim=-1, keepdim=True)


def _place(upto: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Where the rising sums first exceed `target` (n_rows, 1); never a place that adds nothing."""
    place = torch.searchsorted(upto, target, right=True)
    last = torch.searchsorted(upto, upto[:, -1:].contiguous())  # the first place that reaches the sum
    return torch.minimum(place, last)


def _column(values: list[float] | np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64).to(like.device)[:, None]


def _edited(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Bias, repetition, presence and frequency penalty, and barred tokens, on a copy where there are any."""
    if not any(draw.has_edits for draw in draws):
        return logits
    logits = logits.clone()
    _add(logits, [[bias for _, bias in draw.params.logit_bias] for draw in draws], _bias_tokens(draws))
    _divide_seen(logits, draws)
    presence = [draw.params.presence_penalty + draw.params.frequency_penalty * draw.counts for draw in draws]
    _add(logits, [-taken for taken in presence], [draw.output for draw in draws])
    rows, tokens = _places([draw.barred for draw in draws], logits.device)
    logits[rows, tokens] = -torch.inf
    return logits


def _bias_tokens(draws: list[Draw]) -> list[list[int]]:
    return [[token for token, _ in draw.params.logit_bias] for draw in draws]


def _divide_seen(logits: torch.Tensor, draws: list[Draw]) -> None:
    rows, tokens = _places([draw.seen for draw in draws], logits.device)
    penalty = torch.tensor([draw.params.repetition_penalty for draw in draws], device=logits.device)[rows]
    before = logits[rows, tokens]
    logits[rows, tokens] = torch.where(before < 0, before * penalty, before / penalty)


def _add(
    logits: torch.Tensor,
    amounts: list[list[float]] | list[np.ndarray],
    tokens: list[list[int]] | list[np.ndarray],
) -> None:
    places = _places(tokens, logits.device)
    added = np.concatenate([np.asarray(one, dtype=np.float32) for one in amounts])
    logits.index_put_(places, torch.from_numpy(added).to(logits.device), accumulate=True)


def _places(
    tokens: list[list[int]] | list[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tokens of an index into logits, for the tokens of each row."""
    rows = np.repeat(np.arange(len(tokens)), [len(one) for one in tokens])
    flat = np.concatenate([np.asarray(one, dtype=np.int64) for one in tokens])
    return torch.from_numpy(rows).to(device), torch.from_numpy(flat).to(device)


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
