"""What one-process transformers generates: the tokens that a mesh must give whatever happens to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from daemon.models.model_source import SHIPPED_MODEL

MIN_MARGIN = 1e-3
"""Below that the likeliest token is a matter of rounding: GEMM rows differ in the last bits between batch sizes."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy answer, end-of-text ignored."""

    tokens: tuple[int, ...]
    margin: float
    """The least distance between the two likeliest tokens' logits."""


@lru_cache
def reference() -> tuple[Any, Any]:
    """The shipped model and tokenizer in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        SHIPPED_MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(SHIPPED_MODEL)


def token_ids(text: str) -> list[int]:
    return list(reference()[1](text)["input_ids"])


def greedy(prompt: list[int], n_tokens: int) -> Greedy:
    """What follows `prompt`."""
    import torch

    model, _ = reference()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best_two = torch.stack(output.logits)[:, 0].topk(2).values
    tokens = tuple(int(token) for token in output.sequences[0, len(prompt) :])
    return Greedy(tokens, float((best_two[:, 0] - best_two[:, 1]).min()))
