"""A real stage's draws against transformers on the shipped model: penalties, prompt scores, verified drafts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from daemon.models.model_source import SHIPPED_MODEL
from hexmesh.runtime.residency import Residency
from hexmesh.runtime.stage import Stage, StageOutput
from hexmesh.serving.past import PastTokens
from hexmesh.wire.data import Barred, Row, SampledToken, SamplingParams, ScoredToken, Scoring
from hexmesh.wire.worker import LoadStage
from tools.soak.right_tokens import MIN_MARGIN, reference, token_ids

BLOCKS = list(range(12))
PROMPT = token_ids("What is a KV cache? What is prefill? What is decode?")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    residency = Residency(torch.device("cpu"))
    residency.load(
        LoadStage(
            stage="s",
            pool="s",
            model_dir=str(SHIPPED_MODEL),
            model_id="m",
            start=0,
            stop=8,
            dtype="float32",
            kv_blocks=len(BLOCKS),
            block_tokens=16,
            budget_bytes=2**30,
        )
    )
    found = residency.find("s")
    assert isinstance(found, Stage)
    yield found
    residency.drop("s")


def run(stage: Stage, tokens: list[int], row: Row) -> StageOutput:
    return stage.run([row], torch.tensor(tokens[row.start : row.start + row.n_tokens], dtype=torch.int64))


def generate(stage: Stage, params: SamplingParams, n_tokens: int) -> list[int]:
    """What the stage draws after PROMPT, one token a step."""
    past = PastTokens(PROMPT, params)
    tokens, start = list(PROMPT), 0
    for _ in range(n_tokens):
        row = Row(
            start=start, n_tokens=len(tokens) - start, blocks=BLOCKS, sample=params, past=past.upto(tokens)
        )
        start = len(tokens)
        ((token,),) = run(stage, tokens, row).sampled
        tokens.append(token.token_id)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_tokens_with_a_repetition_penalty_are_those_of_transformers(
    stage: Stage, penalty: float
) -> None:
    model, _ = reference()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    best_two = torch.stack(output.scores)[:, 0].topk(2).values
    assert float((best_two[:, 0] - best_two[:, 1]).min()) > MIN_MARGIN, "choose another prompt"

    assert (
        generate(stage, SamplingParams(repetition_penalty=penalty), 40)
        == output.sequences[0, len(PROMPT) :].tolist()
    )


@pytest.mark.parametrize("chunk_tokens", [5, 64])
def test_prompt_scores_are_those_of_transformers(stage: Stage, chunk_tokens: int) -> None:
    model, _ = reference()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    scores: list[ScoredToken] = []
    for start in range(0, len(PROMPT) - 1, chunk_tokens):
        followers = PROMPT[start + 1 : start + 1 + chunk_tokens]
        row = Row(
            start=start,
            n_tokens=len(followers),
            blocks=BLOCKS,
            scoring=Scoring(first=0, followers=followers, n_top=2),
        )
        output = run(stage, PROMPT, row)
        assert output.sampled == []
        scores += output.scored[0]

    assert [one.token_id for one in scores] == PROMPT[1:]
    assert [one.logprob for one in scores] == pytest.approx(
        [float(expected[at, token]) for at, token in enumerate(PROMPT[1:])], abs=1e-3
    )
    assert [one.top[0][0] for one in scores] == expected[:-1].argmax(-1).tolist()


ALL = SamplingParams(
    temperature=1.3, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, seed=11
)


@pytest.mark.parametrize("params", [SamplingParams(), ALL], ids=["greedy", "all"])
@pytest.mark.parametrize("n_right", [0, 2, 4])
def test_drafts_are_verified_in_one_step(stage: Stage, params: SamplingParams, n_right: int) -> None:
    """Up to the first wrong guess, the draws are those of one token a step."""
    expected = generate(stage, params, 5)
    drafts = expected[:4]
    drafts[n_right:] = [(token + 1) % 1024 for token in drafts[n_right:]]
    run(stage, PROMPT, Row(start=0, n_tokens=len(PROMPT) - 1, blocks=BLOCKS))

    row = Row(
        start=len(PROMPT) - 1,
        n_tokens=1 + len(drafts),
        blocks=BLOCKS,
        sample=params,
        drafts=drafts,
        past=PastTokens(PROMPT, params).upto(PROMPT),
    )
    (drawn,) = run(stage, [*PROMPT, *drafts], row).sampled

    assert len(drawn) == 5
    assert [token.token_id for token in drawn[: n_right + 1]] == expected[: n_right + 1]


def test_barred_tokens_are_not_drawn_and_the_rows_beside_are_as_alone(stage: Stage) -> None:
    """All that a row may ask for in one ragged step."""
    greedy = generate(stage, SamplingParams(), 1)[0]
    run(stage, PROMPT, Row(start=0, n_tokens=len(PROMPT) - 1, blocks=BLOCKS))
    last = {"start": len(PROMPT) - 1, "n_tokens": 1, "blocks": BLOCKS}
    past = PastTokens(PROMPT, ALL).upto(PROMPT)
    rows = [
        Row(**last, sample=SamplingParams(n_logprobs=2), barred=Barred(token_ids=[greedy])),
        Row(**last, sample=ALL, past=past, scoring=Scoring(first=0, followers=[greedy])),
        Row(**last, sample=SamplingParams(temperature=0.9, seed=3)),
        Row(**last, sample=SamplingParams()),
    ]
    payload = torch.tensor([PROMPT[-1]] * len(rows))

    together = stage.run(rows, payload)

    alone = [stage.run([row], payload[:1]) for row in rows]
    ids = [[token.token_id for token in answer] for answer in together.sampled]
    assert ids == [[token.token_id for token in one.sampled[0]] for one in alone]
    assert ids[0] != [greedy]
    assert ids[3] == [greedy]
    barred_best: SampledToken = together.sampled[0][0]
    assert barred_best.top[0][0] == greedy  # the model's own distribution is told
    assert [score.rank for score in together.scored[0]] == [1]
