"""Sampling against transformers' own processors, and that a draw depends on seed, choice and position alone."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hexmesh.runtime import sampler
from hexmesh.runtime.draw import Draw
from hexmesh.runtime.logprobs import score
from hexmesh.runtime.philox import philox4x32, uniforms
from hexmesh.runtime.sampler import sample
from hexmesh.wire.data import MAX_LOGPROBS, SamplingParams, ScoredToken

FILTERS = {
    "temperature alone": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.9),
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_p": SamplingParams(temperature=1.1, top_p=0.6),
    "min_p": SamplingParams(temperature=1.3, min_p=0.2),
    "all": SamplingParams(temperature=1.4, top_k=12, top_p=0.8, min_p=0.05),
    "top_p of nothing": SamplingParams(temperature=1.0, top_p=1e-6),
    "top_k over the vocabulary": SamplingParams(temperature=1.0, top_k=5000, top_p=0.9),
    "top_k over the first candidates": SamplingParams(temperature=2.0, top_k=300),
    "min_p and top_p": SamplingParams(temperature=1.3, min_p=0.02, top_p=0.95),
}
PROMPT, OUTPUT = [3, 7, 7, 11, 30], [5, 5, 9, 5, 3]
EDITS: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "repetition below 1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.4},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": [(4, 6.0), (5, -100.0), (9, 2.5)]},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": [(3, 3.0), (38, -1.5)],
    },
}


def reference_probabilities(logits: torch.Tensor, params: SamplingParams, barred: list[int]) -> torch.Tensor:
    """What transformers' sampling draws from after PROMPT and OUTPUT, for one row.

    The two penalties that transformers does not have are OpenAI's: over the output alone, by hand.
    """
    scores = logits[None].clone()
    seen = torch.tensor([PROMPT + OUTPUT])
    if params.logit_bias:
        bias = {(token,): amount for token, amount in params.logit_bias}
        scores = SequenceBiasLogitsProcessor(bias)(seen, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    for token in set(OUTPUT):
        scores[0, token] -= params.frequency_penalty * OUTPUT.count(token) + params.presence_penalty
    scores[0, barred] = -math.inf
    if params.temperature == 0:
        return torch.nn.functional.one_hot(scores[0].argmax(), scores.shape[1]).float()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(seen, scores)[0].softmax(-1)


def draw(params: SamplingParams, position: int, barred: list[int] | None = None) -> Draw:
    """A draw after PROMPT and OUTPUT."""
    output, counts = np.unique(OUTPUT, return_counts=True)
    return Draw(
        params,
        position,
        seen=np.unique(PROMPT + OUTPUT),
        output=output,
        counts=counts.astype(np.float32),
        barred=barred or [],
    )


@pytest.mark.parametrize("vocab_size", [40, 64, 700, 20_003])
@pytest.mark.parametrize(
    ("name", "edit"),
    [*((name, "none") for name in FILTERS), *((name, edit) for edit in EDITS for name in ("greedy", "all"))],
)
def test_probabilities_are_those_of_transformers(
    name: str, edit: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniform numbers on a grid, one for each row: every token's share of them is its probability."""
    n = 500
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(4)) * 2
    params = msgspec.structs.replace(FILTERS.get(name, SamplingParams()), **EDITS[edit])
    barred = [int(logits.argmax()), 8]
    monkeypatch.setattr(sampler, "uniforms", lambda seeds, choices, at: (np.array(at) + 0.5) / n)
    expected = reference_probabilities(logits, params, barred) * n

    sampled = sample(logits.expand(n, -1), [draw(params, position, barred) for position in range(n)])

    counts = torch.bincount(torch.tensor([token.token_id for token in sampled]), minlength=vocab_size)
    assert float((counts - expected).abs().max()) < 1.01


def draw_many(logits: torch.Tensor, params: SamplingParams, n: int) -> list[int]:
    rows = logits.expand(n, -1)
    return [token.token_id for token in sample(rows, [Draw(params, position) for position in range(n)])]


@pytest.mark.parametrize("vocab_size", [40, 700])
@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_are_those_of_transformers(name: str, vocab_size: int) -> None:
    n = 6000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(4)) * 2
    expected = reference_probabilities(logits, FILTERS[name], [])

    counts = torch.bincount(torch.tensor(draw_many(logits, FILTERS[name], n)), minlength=vocab_size)

    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5
    distance = ((counts - expected * n) ** 2 / (expected * n))[likely].sum()
    freedom = int(likely.sum())
    assert distance < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_a_nucleus_wider_than_the_candidates_is_exact() -> None:
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(5)) * 0.3
    params = SamplingParams(temperature=1.0, top_p=0.9)
    expected = reference_probabilities(logits, params, [])
    assert int((expected > 0).sum()) > 500

    drawn = draw_many(logits, params, 1500)

    assert float(expected[drawn].min()) > 0
    least_likely = expected[expected > 0].median()
    assert 0.3 < float((expected[drawn] < least_likely).float().mean()) < 0.5


def test_greedy_is_the_likeliest() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(6))

    sampled = sample(logits, [Draw(SamplingParams(), position) for position in range(5)])

    assert [token.token_id for token in sampled] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [500, 30_000])
def test_a_row_draws_the_same_in_any_company(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(7)
    n = 3 * (len(FILTERS) + 2)
    logits = torch.randn(n, vocab_size, generator=generator).bfloat16()  # with many equal logits
    kinds = [*FILTERS.values(), SamplingParams(), SamplingParams(n_logprobs=3)]
    edits = list(EDITS.values())
    draws = [
        draw(msgspec.structs.replace(kinds[row % len(kinds)], seed=row, **edits[row % len(edits)]), 100 + row)
        for row in range(n)
    ]
    together = sample(logits, draws)

    alone = [sample(logits[row : row + 1], draws[row : row + 1])[0] for row in range(n)]
    order = torch.randperm(n, generator=generator).tolist()
    shuffled = sample(logits[order], [draws[row] for row in order])

    assert alone == together
    assert shuffled == [together[row] for row in order]


def uniform(seed: int, choice: int, position: int) -> float:
    return float(uniforms([seed], [choice], [position])[0])


def test_seed_choice_and_position_each_change_the_draw() -> None:
    draws = {uniform(*at) for at in ((1, 0, 5), (2, 0, 5), (1, 1, 5), (1, 0, 6), (1 + 2**32, 0, 5))}

    assert len(draws) == 5
    assert uniform(1, 0, 5) == uniform(1, 0, 5)


def test_many_draws_at_once_are_those_drawn_alone() -> None:
    at = [(seed, choice, position) for seed in (0, 2**63 - 1) for choice in (0, 3) for position in (0, 2**31)]

    together = uniforms(*zip(*at, strict=True))

    assert together.tolist() == [uniform(*one) for one in at]


def test_uniform_numbers_are_uniform() -> None:
    n, n_bins = 20000, 20
    drawn = uniforms([2**62 + 3] * n, [0] * n, list(range(n)))
    counts = np.bincount((drawn * n_bins).astype(int), minlength=n_bins)

    distance = float(((counts - n / n_bins) ** 2 / (n / n_bins)).sum())
    assert distance < 36.2  # 99 % quantile of chi-square with 19 degrees of freedom


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """The vectors that the authors publish with Random123."""
    words = philox4x32(
        *(tuple(np.array([word], dtype=np.uint64) for word in part) for part in (counter, key))
    )

    assert tuple(int(word[0]) for word in words) == expected


def test_logprobs_are_of_the_unfiltered_distribution() -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(8))
    expected = logits.log_softmax(-1)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.5, top_k=3, seed=1, n_logprobs=0),
        SamplingParams(temperature=2.0, seed=2, n_logprobs=4),
    ]

    plain, bare, full = sample(logits, [Draw(one, 9) for one in params])

    assert plain.logprob is None
    assert bare.logprob == pytest.approx(float(expected[1, bare.token_id]))
    assert bare.top == []
    assert full.logprob == pytest.approx(float(expected[2, full.token_id]))
    values, ids = expected[2].topk(4)
    assert [token for token, _ in full.top] == ids.tolist()
    assert [logprob for _, logprob in full.top] == pytest.approx(values.tolist())


def test_no_more_than_20_likeliest_tokens_are_named() -> None:
    [token] = sample(torch.zeros(1, 60), [Draw(SamplingParams(n_logprobs=50), 0)])

    assert len(token.top) == MAX_LOGPROBS


def test_logprobs_are_of_the_model_whatever_edits_say() -> None:
    logits = torch.randn(60, generator=torch.Generator().manual_seed(8))
    best = int(logits.argmax())
    params = SamplingParams(logit_bias=[(best, -100.0)], repetition_penalty=3.0, n_logprobs=1)

    [token] = sample(logits[None], [draw(params, 9)])

    assert token.token_id != best
    assert token.top == [(best, pytest.approx(float(logits.log_softmax(-1)[best])))]


@pytest.mark.parametrize("vocab_size", [60, 5000])
def test_prompt_tokens_are_scored_and_ranked(vocab_size: int) -> None:
    logits = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(8)) * 3
    logits[4, 11] = -math.inf
    followers = [int(logits[0].argmax()), 5, 17, 2, 11, 0, 59, 58, 33]
    expected = logits.log_softmax(-1)

    scored = score(logits, followers, 2)

    order = logits.argsort(dim=-1, descending=True)
    assert scored == [
        ScoredToken(
            token_id=token,
            logprob=-9999.0 if row == 4 else pytest.approx(float(expected[row, token]), abs=1e-5),
            rank=order[row].tolist().index(token) + 1,
            top=[
                (token, pytest.approx(float(expected[row, token]), abs=1e-5))
                for token in order[row, :2].tolist()
            ],
        )
        for row, token in enumerate(followers)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n_logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=0.8),
    ],
    ids=["greedy", "top_p", "plain"],
)
def test_rows_without_numbers_give_a_token_and_leave_others_alone(params: SamplingParams, bad: float) -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(9))
    expected = sample(logits, [Draw(params, 4)] * 3)
    logits[1] = bad

    sampled = sample(logits, [Draw(params, 4)] * 3)

    assert [sampled[0], sampled[2]] == [expected[0], expected[2]]
    assert 0 <= sampled[1].token_id < 60


def test_every_token_barred_is_no_error() -> None:
    barred = list(range(60))

    sampled = sample(
        torch.zeros(2, 60), [Draw(SamplingParams(temperature=t), 0, barred=barred) for t in (0, 1)]
    )

    assert all(0 <= token.token_id < 60 for token in sampled)


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(6, 60, generator=torch.Generator().manual_seed(9))
    before = logits.clone()
    kinds = [*FILTERS.values(), SamplingParams(n_logprobs=2)][:6]

    sample(logits, [draw(msgspec.structs.replace(one, **EDITS["all"]), 4, [2]) for one in kinds])

    assert torch.equal(logits, before)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(10)) * 50
    params = SamplingParams(temperature=1e-5, seed=3)

    sampled = sample(logits, [Draw(params, position) for position in range(4)])

    assert [token.token_id for token in sampled] == logits.argmax(-1).tolist()
