"""The model's shape, its training and its marks.

Recipe: AdamW, cross-entropy on answer tokens alone, a warm-up and then a linear fall of the learning rate to
zero. Samples are sorted by length within a pool so that a batch holds little padding.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .samples import Sample, SampleSource
from .text import Turn, glossary_turns, split_sums, sum_turn
from .tokenizer import MAX_POSITIONS

IGNORED = -100
POOL_SAMPLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast to train; `batch_tokens` counts padding."""

    n_steps: int = 2400
    batch_tokens: int = 2560
    peak_learning_rate: float = 2e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.02
    seed: int = 7


@dataclass(frozen=True, slots=True)
class Marks:
    """The share of turns answered exactly, and the smallest lead of a right token's logit over all others."""

    exact_share: float
    least_margin: float


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model in float32: 8 layers, 8 heads, 4 KV heads, 1.7 M weights."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def train(
    model: LlamaForCausalLM, source: SampleSource, recipe: Recipe, report: Callable[[str], None]
) -> None:
    """Trains `model` in place; `report` gets a line of progress every 50 steps."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    started_s, recent_loss = time.monotonic(), 0.0
    batches = draw_batches(source, recipe.batch_tokens, rng)
    model.train()
    for step in range(recipe.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        loss = batch_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent_loss += (loss.item() - recent_loss) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - started_s
            left_s = elapsed_s / (step + 1) * (recipe.n_steps - step - 1)
            report(f"step={step + 1}/{recipe.n_steps} loss={recent_loss:.4f} {elapsed_s=:.0f} {left_s=:.0f}")


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of a step, counted from zero: up to the peak, then down to zero in a straight line."""
    progress = (step + 1) / recipe.n_steps
    rising = progress / recipe.warmup_share
    falling = (1 - progress) / (1 - recipe.warmup_share)
    return recipe.peak_learning_rate * min(rising, falling)


def draw_batches(source: SampleSource, batch_tokens: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Batches without end, each of samples of like length and at most `batch_tokens` with padding."""
    while True:
        pool = sorted((source.draw() for _ in range(POOL_SAMPLES)), key=lambda sample: len(sample.token_ids))
        batches: list[list[Sample]] = [[]]
        for sample in pool:
            if (len(batches[-1]) + 1) * len(sample.token_ids) > batch_tokens:
                batches.append([])
            batches[-1].append(sample)
        rng.shuffle(batches)
        yield from batches


def batch_loss(model: LlamaForCausalLM, batch: list[Sample]) -> torch.Tensor:
    """Mean cross-entropy over the target tokens of the batch."""
    token_ids, labels = pad_right(batch)
    logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits  # (n_samples, n_tokens - 1, vocab)
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def pad_right(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, (n_samples, n_tokens). Attention is causal, so padding behind needs no mask."""
    n_tokens = max(len(sample.token_ids) for sample in batch)
    token_ids = torch.zeros(len(batch), n_tokens, dtype=torch.long)
    labels = torch.full((len(batch), n_tokens), IGNORED)
    for row, sample in enumerate(batch):
        ids = torch.tensor(sample.token_ids)
        token_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = torch.where(torch.tensor(sample.is_target), ids, IGNORED)
    return token_ids, labels


@torch.inference_mode()
def mark(model: LlamaForCausalLM, source: SampleSource, turns: list[Turn]) -> Marks:
    """Marks for `turns` asked one by one in the chat format.

    One pass over the right answers is enough: greedy decoding gives exactly the right answer if and only if
    each right token is the likeliest one after those before it.
    """
    model.eval()
    n_exact, least_margin = 0, float("inf")
    samples = [source.encode_chat(None, [turn]) for turn in turns]
    for start in range(0, len(samples), 64):
        token_ids, labels = pad_right(samples[start : start + 64])
        logits = model(input_ids=token_ids[:, :-1], use_cache=False).logits.float()
        targets, is_target = labels[:, 1:].clamp(min=0), labels[:, 1:] != IGNORED
        right = logits.gather(-1, targets[..., None]).squeeze(-1)  # (n_samples, n_tokens - 1)
        others = logits.scatter(-1, targets[..., None], -torch.inf).amax(-1)
        margins = (right - others).masked_fill(~is_target, torch.inf).amin(-1)  # (n_samples,)
        n_exact += int((margins > 0).sum())
        least_margin = min(least_margin, float(margins.min()))
    return Marks(n_exact / len(turns), least_margin)


def mark_all(model: LlamaForCausalLM, source: SampleSource) -> dict[str, Marks]:
    """Marks for the whole glossary and for all sums that training never saw."""
    _, held_out = split_sums()
    return {
        "glossary": mark(model, source, glossary_turns()),
        "held-out sums": mark(model, source, [sum_turn(a, b) for a, b in held_out]),
    }
