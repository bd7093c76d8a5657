"""What stages are told of a sequence: its past, its barred ends, its prompt's scores; and what may come back."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.serving.batcher import ScheduledRow
from hexmesh.serving.past import PastTokens
from hexmesh.serving.rows import answer_fault, prompt_scores, wire_row
from hexmesh.serving.sequence import Sequence, sequence_of
from hexmesh.wire.control import LEAST_BALLOT, Epoch
from hexmesh.wire.data import (
    Barred,
    Generate,
    Past,
    SampledToken,
    SamplingParams,
    ScoredToken,
    Scoring,
    StepResult,
)
from hexmesh.wire.token_lists import unpack_counts, unpack_tokens

EPOCH = Epoch(ballot=LEAST_BALLOT, n=1)
PENALTIES = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.25)


def sequence(**changes: Any) -> Sequence:
    fields: dict[str, Any] = {
        "prompt": list(range(10, 20)),
        "emitted": [],
        "max_tokens": 20,
        "stop_token_ids": [3, 1],
        "sampling": SamplingParams(),
    }
    generate = Generate(sequence="s", attempt=2, epoch=EPOCH, replica="r", **fields | changes)
    return sequence_of(generate)


def scheduled(held: Sequence, start: int, n_tokens: int, drafts: tuple[int, ...] = ()) -> ScheduledRow:
    """A row of that many known tokens, and drafts after them."""
    n_wanted = 1 + len(drafts) if start + n_tokens == len(held.tokens) else 0
    return ScheduledRow(held, start, n_tokens + len(drafts), n_wanted, drafts)


def scored(*tokens: int) -> list[ScoredToken]:
    return [ScoredToken(token_id=token, logprob=-1.0, rank=1) for token in tokens]


def result(sampled: list[list[int]], scores: list[list[int]]) -> StepResult:
    return StepResult(
        epoch=EPOCH,
        replica="r",
        step=1,
        sampled=[[SampledToken(token_id=token) for token in tokens] for tokens in sampled],
        scored=[scored(*tokens) for tokens in scores],
        stage_seconds=[],
    )


def test_a_row_that_draws_nothing_carries_nothing() -> None:
    held = sequence(sampling=PENALTIES, min_tokens=5)

    row = wire_row(scheduled(held, 0, 9))

    assert (row.sample, row.past, row.barred, row.scoring, row.drafts) == (None, None, None, None, [])


def unpacked(past: Past | None) -> tuple[list[int], dict[int, int]]:
    assert past is not None
    output = unpack_tokens(past.output, 2**20).tolist()
    counts = dict(zip(output, unpack_counts(past.counts).tolist(), strict=True))
    return unpack_tokens(past.prompt, 2**20).tolist(), counts


@given(
    prompt=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    output=st.lists(st.integers(0, 300), max_size=60),
    cuts=st.sets(st.integers(0, 60)),
)
def test_the_past_follows_the_sequence(prompt: list[int], output: list[int], cuts: set[int]) -> None:
    past = PastTokens(prompt, PENALTIES)
    for cut in (*sorted(cut for cut in cuts if cut < len(output)), len(output)):
        told = unpacked(past.upto([*prompt, *output[:cut]]))

        assert told == (
            sorted(set(prompt)),
            {token: output[:cut].count(token) for token in set(output[:cut])},
        )


def test_a_replayed_output_is_output_to_its_penalties() -> None:
    held = sequence(prompt=[5, 6], emitted=[7, 8, 7], sampling=PENALTIES)

    row = wire_row(scheduled(held, 0, 5))

    assert unpacked(row.past) == ([5, 6], {7: 2, 8: 1})


def test_without_a_repetition_penalty_the_prompt_stays_home() -> None:
    held = sequence(prompt=[5, 6], sampling=SamplingParams(presence_penalty=1.0))

    assert wire_row(scheduled(held, 0, 2)).past == Past()


def test_ends_are_barred_until_the_answer_is_long_enough() -> None:
    held = sequence(prompt=[5], min_tokens=3)
    told = []
    for token in (7, 8, 9, 10):
        told.append(wire_row(scheduled(held, 0, len(held.tokens))).barred)
        held.accept(SampledToken(token_id=token))

    barred = Barred(token_ids=[1, 3])
    assert told == [barred, barred, barred, None]


def test_drafts_beyond_the_least_length_may_be_ends() -> None:
    held = sequence(prompt=[5], min_tokens=2)

    row = wire_row(scheduled(held, 0, 1, (7, 8, 9)))

    assert (row.drafts, row.barred) == ([7, 8, 9], Barred(token_ids=[1, 3], n_draws=2))


def score_all(held: Sequence, chunks: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """Run chunks (start, n_tokens); what the gateway is told, as (first, token ids)."""
    told = []
    for start, n_tokens in chunks:
        row = scheduled(held, start, n_tokens)
        sent = wire_row(row)
        answers = [] if sent.scoring is None else [scored(*sent.scoring.followers)]
        for message in prompt_scores([(row, sent)], answers, lambda row: True):
            told.append((message.first, [one.token_id for one in message.scores]))
    return told


def test_a_prompt_is_scored_chunk_by_chunk() -> None:
    held = sequence(n_prompt_logprobs=2)
    assert held.needs_prompt_logits
    assert wire_row(scheduled(held, 0, 4)).scoring == Scoring(first=0, followers=[11, 12, 13, 14], n_top=2)

    told = score_all(held, [(0, 4), (4, 5), (9, 1)])

    assert told == [(0, [11, 12, 13, 14]), (4, [15, 16, 17, 18, 19])]
    assert not held.needs_prompt_logits


def test_after_preemption_or_replay_nothing_is_scored_twice() -> None:
    held = sequence(n_prompt_logprobs=0)
    replayed = sequence(n_prompt_logprobs=0, n_scored=6)

    assert score_all(held, [(0, 4), (0, 6), (6, 4)]) == [
        (0, [11, 12, 13, 14]),
        (4, [15, 16]),
        (6, [17, 18, 19]),
    ]
    assert wire_row(scheduled(replayed, 0, 5)).scoring is None
    assert wire_row(scheduled(replayed, 5, 5)).scoring == Scoring(first=1, followers=[17, 18, 19])
    assert score_all(replayed, [(0, 5), (5, 5)]) == [(6, [17, 18, 19])]


def test_scores_behind_a_lost_chunk_are_not_told() -> None:
    held = sequence(n_prompt_logprobs=0)

    assert score_all(held, [(4, 5)]) == []
    assert held.n_scored == 0


def test_scores_that_do_not_count_are_not_told() -> None:
    held = sequence(n_prompt_logprobs=0)
    other = sequence(n_prompt_logprobs=0)
    rows = [(row, wire_row(row)) for row in (scheduled(held, 0, 4), scheduled(other, 0, 2))]

    told = list(
        prompt_scores(rows, [scored(11, 12, 13, 14), scored(11, 12)], lambda row: row.sequence is other)
    )

    assert [(message.first, len(message.scores)) for message in told] == [(0, 2)]
    assert (held.n_scored, other.n_scored) == (0, 2)


def test_a_prompt_that_is_scored_reuses_no_known_blocks() -> None:
    assert not sequence(n_prompt_logprobs=0).reuses_prefix
    assert sequence(n_prompt_logprobs=0, n_scored=9).reuses_prefix
    assert sequence().reuses_prefix


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    held = sequence(prompt=[5], n_prompt_logprobs=0)

    assert not held.needs_prompt_logits
    assert wire_row(scheduled(held, 0, 1)).scoring is None


FAULTS: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "no token": ([], [[11]]),
    "two tokens": ([[1, 2]], [[11]]),
    "two rows": ([[1], [2]], [[11]]),
    "no scores": ([[1]], []),
    "scores of another token": ([[1]], [[12]]),
    "a token that does not exist": ([[50]], [[11]]),
    "a negative token": ([[-1]], [[11]]),
}


def test_an_answer_to_what_was_asked_is_taken() -> None:
    assert answer_fault(rows_of_two(), result([[1]], [[11]]), 50) is None


@pytest.mark.parametrize("name", FAULTS)
def test_another_answer_is_a_fault(name: str) -> None:
    assert answer_fault(rows_of_two(), result(*FAULTS[name]), 50) is not None


def rows_of_two() -> list[Any]:
    """A row that draws and one that scores."""
    return [
        wire_row(scheduled(sequence(), 0, 10)),
        wire_row(scheduled(sequence(n_prompt_logprobs=0), 0, 1)),
    ]
