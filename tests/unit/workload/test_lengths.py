"""Lengths: closed forms against samples, fits against what they were made of."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.workload import (
    CLASSES,
    ConstantLengths,
    LognormalLengths,
    TracedLengths,
    class_of,
    fit_lognormal,
)
from hexmesh.workload.lengths import mean_context

_PAIRS = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 2000)), min_size=1, max_size=40)


@pytest.mark.parametrize(("cv", "share"), [(0.0, 0.5), (0.5, 0.625), (1.0, 1.0), (1.5, 1.625)])
def test_long_outputs_weigh_more(cv: float, share: float) -> None:
    lengths = LognormalLengths(prompt=500, output=200, prompt_cv=0.3, output_cv=cv)
    assert lengths.mean_context == pytest.approx(500 + share * 200)


def test_the_mean_context_is_that_of_tokens_not_of_requests() -> None:
    """By hand: every output token sees its prompt and, on average, half of its output."""
    pairs = [(100, 10), (1000, 90)]
    seen = sum(prompt + step + 0.5 for prompt, output in pairs for step in range(output))
    assert mean_context(pairs) == pytest.approx(seen / 100)
    assert mean_context([(7, 10)]) == ConstantLengths(prompt=7, output=10).mean_context == 12


@pytest.mark.parametrize("correlation", [-0.6, 0.0, 0.6])
def test_the_closed_form_is_what_samples_show(correlation: float) -> None:
    lengths = LognormalLengths(prompt=800, output=300, prompt_cv=0.8, output_cv=0.7, correlation=correlation)
    rng = random.Random(7)
    pairs = [lengths.sample(rng) for _ in range(40_000)]
    assert mean_context(pairs) == pytest.approx(lengths.mean_context, rel=0.02)
    assert sum(prompt for prompt, _ in pairs) / len(pairs) == pytest.approx(800, rel=0.02)
    assert sum(output for _, output in pairs) / len(pairs) == pytest.approx(300, rel=0.02)


def test_a_fit_gives_back_what_was_sampled() -> None:
    lengths = LognormalLengths(prompt=800, output=300, prompt_cv=0.5, output_cv=0.7, correlation=0.4)
    rng = random.Random(3)
    fitted = fit_lognormal([lengths.sample(rng) for _ in range(40_000)])
    assert (fitted.prompt, fitted.output) == pytest.approx((800, 300), rel=0.02)
    assert (fitted.prompt_cv, fitted.output_cv) == pytest.approx((0.5, 0.7), rel=0.05)
    assert fitted.correlation == pytest.approx(0.4, abs=0.03)


@settings(deadline=None)
@given(_PAIRS)
def test_a_fit_keeps_means_and_unless_cut_the_mean_context(pairs: list[tuple[int, int]]) -> None:
    fitted, traced = fit_lognormal(pairs), TracedLengths(pairs=tuple(pairs))
    assert (fitted.prompt, fitted.output) == pytest.approx((traced.prompt, traced.output))
    if abs(fitted.correlation) < 1:
        assert fitted.mean_context == pytest.approx(traced.mean_context, rel=1e-6)


@settings(deadline=None)
@given(_PAIRS)
def test_the_mean_context_lies_between_the_shortest_and_the_longest(pairs: list[tuple[int, int]]) -> None:
    contexts = [prompt + output / 2 for prompt, output in pairs]
    assert min(contexts) <= mean_context(pairs) * (1 + 1e-9)
    assert mean_context(pairs) <= max(contexts) * (1 + 1e-9)


def test_samples_are_whole_tokens_and_the_same_for_the_same_seed() -> None:
    tiny = LognormalLengths(prompt=0.2, output=0.3, prompt_cv=3, output_cv=3)
    drawn = [[tiny.sample(random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert all(prompt >= 1 and output >= 1 for prompt, output in drawn[0])
    traced = TracedLengths(pairs=((1, 2), (3, 4)))
    assert {traced.sample(random.Random(seed)) for seed in range(20)} == {(1, 2), (3, 4)}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_of_its_name(name: str) -> None:
    assert class_of(CLASSES[name].prompt, CLASSES[name].output) == name


def test_classes_part_at_512_and_128() -> None:
    assert [class_of(*pair) for pair in ((512, 128), (513, 128), (512, 129), (513, 129))] == [
        "LPLD",
        "HPLD",
        "LPHD",
        "HPHD",
    ]


def test_nothing_to_fit_or_average_is_refused() -> None:
    with pytest.raises(InvalidInput, match="one token or more"):
        fit_lognormal([(5, 0)])
    with pytest.raises(InvalidInput, match="one token or more"):
        fit_lognormal([])
    with pytest.raises(InvalidInput, match="no request has an output token"):
        mean_context([(5, 0)])
