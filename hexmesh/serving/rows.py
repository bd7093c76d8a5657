"""What stages are told of a sequence's part in a step, and what may come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from hexmesh.serving.batcher import ScheduledRow
from hexmesh.serving.sequence import Sequence
from hexmesh.wire.data import Barred, Past, PromptScored, Row, SampledToken, ScoredToken, Scoring, StepResult


def wire_row(row: ScheduledRow) -> Row:
    """The row as stages see it."""
    sequence = row.sequence
    is_drawn = row.reaches_end
    return Row(
        start=row.start,
        n_tokens=row.n_tokens,
        blocks=list(sequence.blocks),
        sample=sequence.sampling if is_drawn else None,
        drafts=list(row.drafts),
        past=_past(sequence) if is_drawn else None,
        barred=_barred(row) if is_drawn else None,
        scoring=_scoring(row) if sequence.needs_prompt_logits else None,
    )


def answer_fault(rows: list[Row], result: StepResult, vocab_size: int) -> str | None:
    """Why this cannot be the last stage's answer to these rows, in words; None if it can."""
    n_wanted = [1 + len(row.drafts) for row in rows if row.sample is not None]
    n_drawn = [len(tokens) for tokens in result.sampled]
    if n_drawn != n_wanted:
        return f"{sum(n_drawn)} tokens for {len(n_drawn)} rows, asked for {sum(n_wanted)} for {len(n_wanted)}"
    followers = [row.scoring.followers for row in rows if row.scoring is not None]
    if [[one.token_id for one in scores] for scores in result.scored] != followers:
        return "scores of other tokens than it was asked for"
    answered = (one for answers in (result.sampled, result.scored) for answer in answers for one in answer)
    if not all(_is_known(one, vocab_size) for one in answered):
        return f"a token outside the vocabulary of {vocab_size}"
    return None


def prompt_scores(
    scheduled: Iterable[tuple[ScheduledRow, Row]],
    scored: list[list[ScoredToken]],
    counts: Callable[[ScheduledRow], bool],
) -> Iterator[PromptScored]:
    """What gateways have not been told yet of a step's scores; to be asked for once, before it is completed.

    `counts` says of a row whether what the step brings for it counts.
    """
    answers = iter(scored)
    for row, sent in scheduled:
        if sent.scoring is None:
            continue
        sequence, answer = row.sequence, next(answers)
        if not counts(row):
            continue
        new = sequence.take_scores(row.start + sent.scoring.first, answer)
        if new:
            first = sequence.n_scored - len(new)
            yield PromptScored(sequence=sequence.id, attempt=sequence.attempt, first=first, scores=new)


def _is_known(one: SampledToken | ScoredToken, vocab_size: int) -> bool:
    return 0 <= one.token_id < vocab_size and all(0 <= token < vocab_size for token, _ in one.top)


def _past(sequence: Sequence) -> Past | None:
    return None if sequence.past is None else sequence.past.upto(sequence.tokens)


def _barred(row: ScheduledRow) -> Barred | None:
    """An answer's ends, while it is too short to end."""
    sequence = row.sequence
    n_missing = sequence.min_tokens - sequence.n_output
    if n_missing <= 0 or not sequence.stop_token_ids:
        return None
    return Barred(token_ids=sorted(sequence.stop_token_ids), n_draws=min(n_missing, row.n_wanted))


def _scoring(row: ScheduledRow) -> Scoring | None:
    """The prompt tokens that follow this row's and have no score yet."""
    sequence = row.sequence
    first = max(row.start, sequence.n_scored)
    stop = min(row.start + row.n_tokens, sequence.n_prompt - 1)
    if first >= stop:
        return None
    return Scoring(
        first=first - row.start,
        followers=sequence.tokens[first + 1 : stop + 1],
        n_top=sequence.n_prompt_logprobs,
    )
