"""What rows want of the last stage: every draft's draw with the past before it, scores, and nonsense refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hexmesh.errors import InvalidInput
from hexmesh.runtime.wanted import MAX_LOGITS, wanted_of
from hexmesh.serving.past import PastTokens
from hexmesh.wire.data import Barred, Past, Row, SamplingParams, Scoring
from hexmesh.wire.token_lists import pack_gaps

V = 50
PENALTIES = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)


def row(n_tokens: int, start: int = 0, **changes: Any) -> Row:
    return Row(start=start, n_tokens=n_tokens, blocks=[0], **changes)


def past_of(prompt: list[int], output: list[int]) -> Past:
    return PastTokens(prompt, PENALTIES).upto([*prompt, *output])


def test_logits_are_wanted_where_something_is_drawn_or_scored() -> None:
    rows = [
        row(3),
        row(4, sample=SamplingParams()),
        row(5, start=8, sample=SamplingParams(), drafts=[7, 8]),
        row(6, scoring=Scoring(first=1, followers=[4, 5, 6])),
    ]

    wanted = wanted_of(rows, V)

    assert wanted.tokens == [6, 9, 10, 11, 13, 14, 15]
    assert wanted.n_drawn == [1, 3]
    assert [draw.position for draw in wanted.draws] == [4, 11, 12, 13]


def test_each_draft_has_the_past_before_it() -> None:
    drafts = [9, 3, 9]
    sent = row(4, start=7, sample=PENALTIES, drafts=drafts, past=past_of([1, 2, 3], [3, 4, 3]))

    draws = wanted_of([sent], V).draws

    for n, draw in enumerate(draws):
        output = [3, 4, 3, *drafts[:n]]
        ids, counts = np.unique(output, return_counts=True)
        assert draw.output.tolist() == ids.tolist()
        assert draw.counts.tolist() == counts.tolist()
        assert sorted(draw.seen.tolist()) == sorted({1, 2, 3, *output})


def test_an_answers_ends_are_barred_for_as_many_draws_as_it_lacks() -> None:
    sent = row(4, sample=SamplingParams(), drafts=[5, 6, 7], barred=Barred(token_ids=[0, 1], n_draws=2))

    assert [draw.barred for draw in wanted_of([sent], V).draws] == [[0, 1], [0, 1], [], []]


def test_an_end_that_the_vocabulary_lacks_needs_no_barring() -> None:
    sent = row(1, sample=SamplingParams(), barred=Barred(token_ids=[1, V]))

    assert wanted_of([sent], V).draws[0].barred == [1]


def test_answers_come_by_row() -> None:
    rows = [
        row(2, sample=SamplingParams(), drafts=[7]),
        row(3, scoring=Scoring(first=0, followers=[4, 5])),
        row(1, sample=SamplingParams()),
        row(1, scoring=Scoring(first=0, followers=[6])),
    ]
    wanted = wanted_of(rows, V)
    logits = torch.nn.functional.one_hot(torch.tensor(wanted.tokens), V).float() * 9

    sampled, scored = wanted.answer(logits)

    assert [[token.token_id for token in tokens] for tokens in sampled] == [[0, 1], [5]]
    assert [[one.token_id for one in scores] for scores in scored] == [[4, 5], [6]]
    assert [[one.rank for one in scores] for scores in scored] == [[2, 2], [1]]


WRONG: dict[str, dict[str, Any]] = {
    "a draft outside the vocabulary": {"sample": SamplingParams(), "drafts": [V]},
    "nothing but drafts": {"sample": SamplingParams(), "drafts": [1, 2]},
    "a bias outside the vocabulary": {"sample": SamplingParams(logit_bias=[(V, 1.0)])},
    "a score outside the row": {"scoring": Scoring(first=1, followers=[1, 2])},
    "a score outside the vocabulary": {"scoring": Scoring(first=0, followers=[V])},
    "a past outside the vocabulary": {"sample": PENALTIES, "past": Past(prompt=pack_gaps([V]))},
    "a past that adds up beyond it": {"sample": PENALTIES, "past": Past(prompt=pack_gaps([30, 30]))},
    "a token twice": {"sample": PENALTIES, "past": Past(prompt=pack_gaps([3, 0]))},
    "a past that is not packed": {"sample": PENALTIES, "past": Past(prompt=b"\xc1\x00\x00")},
    "counts of other tokens": {"sample": PENALTIES, "past": Past(output=pack_gaps([3]))},
}


@pytest.mark.parametrize("name", WRONG)
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        wanted_of([row(2, **WRONG[name])], V)


def test_more_logits_than_memory_should_hold_are_refused() -> None:
    scoring = Scoring(first=0, followers=[0] * 4096)

    with pytest.raises(InvalidInput, match="4096 times"):
        wanted_of([row(4096, scoring=scoring)], MAX_LOGITS // 4096 + 1)
