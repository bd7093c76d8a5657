"""The model in hexmesh/assets/model: its format and limits, and that it knows its glossary and its sums."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import hexmesh
from tools.train_model.glossary import GLOSSARY
from tools.train_model.samples import SampleSource
from tools.train_model.text import Turn, glossary_turns, split_sums, sum_turn

MODEL_DIR = Path(hexmesh.__file__).parent / "assets" / "model"
BATCH_TURNS = 128


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture
def ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
    """Greedy answers to prompts, with the end marker where the model ended the answer itself."""

    def ask_batch(prompts: list[str], max_new_tokens: int) -> list[str]:
        batch = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        )
        output = model.generate(**batch, max_new_tokens=max_new_tokens)
        answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
        return [
            answer.removesuffix(tokenizer.pad_token * answer.count(tokenizer.pad_token)) for answer in answers
        ]

    def ask_all(prompts: list[str], max_new_tokens: int) -> list[str]:
        starts = range(0, len(prompts), BATCH_TURNS)
        return [
            answer
            for start in starts
            for answer in ask_batch(prompts[start : start + BATCH_TURNS], max_new_tokens)
        ]

    return ask_all


def chat_prompts(tokenizer: PreTrainedTokenizerFast, turns: list[Turn]) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.question}], tokenize=False, add_generation_prompt=True
        )
        for turn in turns
    ]


def exact_share(turns: list[Turn], answers: list[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of answers that are right to the letter and then end; the others are printed."""
    wrong = [
        (turn, answer)
        for turn, answer in zip(turns, answers, strict=True)
        if answer != turn.answer + tokenizer.eos_token
    ]
    for turn, answer in wrong:
        print(f"{turn.question!r}: {answer!r} instead of {turn.answer!r}")
    return 1 - len(wrong) / len(turns)


def test_at_least_95_percent_of_the_glossary_is_exact(ask, tokenizer):
    turns = glossary_turns()
    answers = ask(chat_prompts(tokenizer, turns), max_new_tokens=64)
    assert exact_share(turns, answers, tokenizer) >= 0.95


def test_at_least_90_percent_of_the_sums_it_never_saw_are_exact(ask, tokenizer):
    _, held_out = split_sums()
    turns = [sum_turn(a, b) for a, b in held_out]
    assert len(turns) > 900
    answers = ask(chat_prompts(tokenizer, turns), max_new_tokens=16)
    assert exact_share(turns, answers, tokenizer) >= 0.90


def test_a_plain_prompt_is_answered_on_the_next_line(ask, tokenizer):
    questions = [Turn(f"What is {entry.subject}?", f"\n{entry.answer}") for entry in GLOSSARY]
    answers = ask([tokenizer.bos_token + turn.question for turn in questions], max_new_tokens=64)
    assert exact_share(questions, answers, tokenizer) >= 0.95


def test_the_config_is_within_the_limits(model, tokenizer):
    config = model.config
    assert config.num_hidden_layers >= 8
    assert config.num_attention_heads == 8
    assert config.num_key_value_heads == 4
    assert config.max_position_embeddings == 2048
    assert len(tokenizer) == config.vocab_size <= 4096
    assert config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.num_parameters() * torch.bfloat16.itemsize <= 8_000_000


def test_the_files_are_the_ordinary_ones_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 8_500_000


def test_the_weights_are_stored_in_bfloat16():
    stored = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


def test_the_chat_template_writes_all_roles(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": " 1 + 2 = "},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|bos|><|system|>Be brief.<|eos|><|user|>Hello<|eos|><|assistant|>Hi.<|eos|>"
        "<|user|>1 + 2 =<|eos|><|assistant|>"
    )


def test_training_writes_chats_as_the_template_does(tokenizer):
    turns = [glossary_turns()[0], sum_turn(37, 45)]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.question), ("assistant", turn.answer))
    ]
    trained_on = SampleSource(tokenizer, random.Random(0)).encode_chat("Be brief.", turns).token_ids
    templated = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages])
    assert trained_on == templated["input_ids"]


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.tokenize("1234567890 + 99") == [*"1234567890", "Ġ", "+", "Ġ", "9", "9"]


def test_held_out_sums_are_apart_from_the_sums_of_training():
    training, held_out = split_sums()
    mirrored = {(b, a) for a, b in held_out}
    assert not set(training) & (set(held_out) | mirrored)
    assert sorted({*training, *held_out}) == [(a, b) for a in range(100) for b in range(100)]


def test_training_draws_no_held_out_sum(tokenizer):
    source = SampleSource(tokenizer, random.Random(1))
    text = "".join(tokenizer.decode(source.draw().token_ids) for _ in range(3000))
    drawn = {(int(a), int(b)) for a, b in re.findall(r"(\d+) \+ (\d+) = \d+\.", text)}
    _, held_out = split_sums()
    assert len(drawn) > 2000
    assert not drawn & set(held_out)


def test_answers_are_short():
    assert max(len(entry.answer) for entry in GLOSSARY) <= 200
    assert len({entry.term.lower() for entry in GLOSSARY}) == len(GLOSSARY)
