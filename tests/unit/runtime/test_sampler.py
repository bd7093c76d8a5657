"""Sampling against transformers' own filters, and that a draw depends on seed, choice and position alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hexmesh.runtime.philox import philox4x32, uniform
from hexmesh.runtime.sampler import MAX_LOGPROBS, Draw, sample
from hexmesh.wire.data import SamplingParams

FILTERS = {
    "temperature alone": SamplingParams(temperature=0.7),
    "hot": SamplingParams(temperature=1.9),
    "top_k": SamplingParams(temperature=1.0, top_k=7),
    "top_p": SamplingParams(temperature=1.1, top_p=0.6),
    "min_p": SamplingParams(temperature=1.3, min_p=0.2),
    "all": SamplingParams(temperature=1.4, top_k=12, top_p=0.8, min_p=0.05),
    "top_p of nothing": SamplingParams(temperature=1.0, top_p=1e-6),
    "top_k over the vocabulary": SamplingParams(temperature=1.0, top_k=5000, top_p=0.9),
}


def reference_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What transformers' sampling draws from, for one row."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


def draw_many(logits: torch.Tensor, params: SamplingParams, n: int) -> list[int]:
    rows = logits.expand(n, -1)
    return [token.token_id for token in sample(rows, [Draw(params, position) for position in range(n)])]


@pytest.mark.parametrize("vocab_size", [40, 700])
@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_are_those_of_transformers(name: str, vocab_size: int) -> None:
    n = 6000
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(4)) * 2
    expected = reference_probabilities(logits, FILTERS[name])

    counts = torch.bincount(torch.tensor(draw_many(logits, FILTERS[name], n)), minlength=vocab_size)

    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5
    distance = ((counts - expected * n) ** 2 / (expected * n))[likely].sum()
    freedom = int(likely.sum())
    assert distance < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_a_nucleus_wider_than_the_candidates_is_exact() -> None:
    logits = torch.randn(1500, generator=torch.Generator().manual_seed(5)) * 0.3
    params = SamplingParams(temperature=1.0, top_p=0.9)
    expected = reference_probabilities(logits, params)
    assert int((expected > 0).sum()) > 500

    drawn = draw_many(logits, params, 1500)

    assert float(expected[drawn].min()) > 0
    least_likely = expected[expected > 0].median()
    assert 0.3 < float((expected[drawn] < least_likely).float().mean()) < 0.5


def test_greedy_is_the_likeliest() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(6))

    sampled = sample(logits, [Draw(SamplingParams(), position) for position in range(5)])

    assert [token.token_id for token in sampled] == logits.argmax(-1).tolist()


def test_a_row_draws_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(12, 500, generator=generator)
    kinds = [*FILTERS.values(), SamplingParams(), SamplingParams(n_logprobs=3)]
    draws = [Draw(seeded(kinds[row % len(kinds)], row), 100 + row) for row in range(12)]
    together = sample(logits, draws)

    alone = [sample(logits[row : row + 1], draws[row : row + 1])[0] for row in range(12)]
    order = torch.randperm(12, generator=generator).tolist()
    shuffled = sample(logits[order], [draws[row] for row in order])

    assert [token.token_id for token in alone] == [token.token_id for token in together]
    assert [token.token_id for token in shuffled] == [together[row].token_id for row in order]


def seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=seed,
        n_logprobs=params.n_logprobs,
    )


def test_seed_choice_and_position_each_change_the_draw() -> None:
    draws = {uniform(*at) for at in ((1, 0, 5), (2, 0, 5), (1, 1, 5), (1, 0, 6), (1 + 2**32, 0, 5))}

    assert len(draws) == 5
    assert uniform(1, 0, 5) == uniform(1, 0, 5)


def test_uniform_numbers_are_uniform() -> None:
    n, n_bins = 20000, 20
    counts = [0] * n_bins
    for position in range(n):
        counts[int(uniform(2**62 + 3, 0, position) * n_bins)] += 1

    distance = sum((count - n / n_bins) ** 2 / (n / n_bins) for count in counts)
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
    assert philox4x32(counter, key) == expected


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


def test_logprobs_are_bounded() -> None:
    [token] = sample(torch.zeros(1, 60), [Draw(SamplingParams(n_logprobs=50), 0)])

    assert len(token.top) == MAX_LOGPROBS


def test_rows_of_nan_give_a_token_and_leave_others_alone() -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(9))
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    expected = sample(logits, [Draw(params, 4)] * 3)
    logits[1] = float("nan")

    sampled = sample(logits, [Draw(params, 4)] * 3)

    assert [sampled[0], sampled[2]] == [expected[0], expected[2]]
    assert 0 <= sampled[1].token_id < 60


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(10)) * 50
    params = SamplingParams(temperature=1e-5, seed=3)

    sampled = sample(logits, [Draw(params, position) for position in range(4)])

    assert [token.token_id for token in sampled] == logits.argmax(-1).tolist()
