"""Lengths of prompts and outputs: their means, and the context that decoding sequences have on average.

A sequence is resident for as many steps as it has output tokens, so long outputs are over-represented among those that
decode together: with s prompt and o output tokens a request, the mean context is

    E[s o] / E[o] + E[o^2] / (2 E[o])

which is s + o/2 only if all outputs are alike. A lognormal output of cv 1 adds o instead of o/2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Annotated

import msgspec

from hexmesh.errors import InvalidInput

MAX_TOKENS = 10**7
_Tokens = Annotated[float, msgspec.Meta(gt=0, le=MAX_TOKENS)]
_Cv = Annotated[float, msgspec.Meta(ge=0, le=10)]


class ConstantLengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="constant"):
    """Every request alike."""

    prompt: _Tokens
    output: _Tokens

    @property
    def mean_context(self) -> float:
        return self.prompt + self.output / 2

    def sample(self, rng: random.Random) -> tuple[int, int]:
        """(prompt, output) tokens of a request."""
        return _whole(self.prompt), _whole(self.output)


class LognormalLengths(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lognormal"
):
    """Prompt and output lognormal, by mean and coefficient of variation (standard deviation over mean)."""

    prompt: _Tokens
    output: _Tokens
    prompt_cv: _Cv = 1.0
    output_cv: _Cv = 1.0
    correlation: Annotated[float, msgspec.Meta(ge=-1, le=1)] = 0.0
    """Between the logarithms of the two."""

    @property
    def mean_context(self) -> float:
        product = math.exp(self.correlation * _sigma(self.prompt_cv) * _sigma(self.output_cv))
        return self.prompt * product + self.output * (1 + self.output_cv**2) / 2

    def sample(self, rng: random.Random) -> tuple[int, int]:
        """(prompt, output) tokens of a request."""
        first, second = rng.gauss(0.0, 1.0), rng.gauss(0.0, 1.0)
        other = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        return _lognormal(self.prompt, self.prompt_cv, first), _lognormal(self.output, self.output_cv, other)


class TracedLengths(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="traced"):
    """Lengths of real requests, drawn evenly."""

    pairs: Annotated[tuple[tuple[int, int], ...], msgspec.Meta(min_length=1)]
    """(prompt, output) tokens of each."""

    @property
    def prompt(self) -> float:
        return sum(prompt for prompt, _ in self.pairs) / len(self.pairs)

    @property
    def output(self) -> float:
        return sum(output for _, output in self.pairs) / len(self.pairs)

    @property
    def mean_context(self) -> float:
        return mean_context(self.pairs)

    def sample(self, rng: random.Random) -> tuple[int, int]:
        """(prompt, output) tokens of a request."""
        return rng.choice(self.pairs)


Lengths = ConstantLengths | LognormalLengths | TracedLengths


def mean_context(pairs: Sequence[tuple[int, int]]) -> float:
    """The length-biased mean context of such requests. Raises InvalidInput if none has any output."""
    n_output = sum(output for _, output in pairs)
    if n_output == 0:
        raise InvalidInput("no request has an output token", next_step="give a trace with outputs")
    return sum(output * (prompt + output / 2) for prompt, output in pairs) / n_output


def fit_lognormal(pairs: Sequence[tuple[int, int]]) -> LognormalLengths:
    """The lognormal with the means, deviations and mean product of these requests, so with their mean context.

    (The correlation is cut to what lognormals can have, which only extreme traces exceed.)
    """
    if not pairs or min(min(pair) for pair in pairs) < 1:
        raise InvalidInput("lengths to fit must be one token or more", next_step="leave out empty requests")
    prompts, outputs = [float(prompt) for prompt, _ in pairs], [float(output) for _, output in pairs]
    prompt, output = _mean(prompts), _mean(outputs)
    prompt_cv, output_cv = _deviation(prompts) / prompt, _deviation(outputs) / output
    product = _mean([a * b for a, b in zip(prompts, outputs, strict=True)]) / (prompt * output)
    spread = _sigma(prompt_cv) * _sigma(output_cv)
    correlation = math.log(product) / spread if spread > 1e-9 else 0.0
    return LognormalLengths(
        prompt=prompt,
        output=output,
        prompt_cv=prompt_cv,
        output_cv=output_cv,
        correlation=max(-1.0, min(1.0, correlation)),
    )


def _sigma(cv: float) -> float:
    """Standard deviation of the logarithm."""
    return math.sqrt(math.log1p(cv * cv))


def _lognormal(mean: float, cv: float, standard: float) -> int:
    sigma = _sigma(cv)
    return _whole(min(mean * math.exp(sigma * standard - sigma * sigma / 2), MAX_TOKENS))


def _whole(tokens: float) -> int:
    return max(1, round(tokens))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(_mean([(value - mean) ** 2 for value in values]))
