"""How the end-to-end tests ask a mesh, and what transformers would have answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from daemon.models.model_source import SHIPPED_MODEL
from daemon.terminal.client import Client

MIN_MARGIN = 1e-3
"""Between the two likeliest tokens' logits: GEMM rows differ in the last bits between batch sizes."""


@dataclass
class Stream:
    """A greedy answer through /generate as it comes."""

    client: Client
    prompt: list[int]
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def run(self, on_token: Callable[[int], None] = lambda n: None) -> list[int]:
        """All token ids; `on_token` is called with how many there are."""
        for line in self._lines():
            event = json.loads(line)
            if event.get("token_id") is not None:
                self.token_ids.append(event["token_id"])
                self.times_s.append(time.monotonic())
                on_token(len(self.token_ids))
            else:
                self.last = event
        assert "error" not in self.last, self.last
        return self.token_ids

    def _lines(self) -> Iterator[bytes]:
        body = {"prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True, "stream": True}
        yield from (line for line in self.client.stream("/generate", body) if line.strip())


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


def expected(prompt: list[int], n_tokens: int) -> list[int]:
    """What transformers generates greedily, end-of-text ignored; asserts that no step was a near tie."""
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
    margin = float((best_two[:, 0] - best_two[:, 1]).min())
    assert margin > MIN_MARGIN, f"near tie of {margin} in the reference: choose another prompt"
    return [int(token) for token in output.sequences[0, len(prompt) :]]


def expected_logprobs(prompt: list[int], n_tokens: int) -> list[float]:
    """Natural-log probabilities that transformers gives the greedy tokens."""
    import torch

    model, _ = reference()
    tokens = prompt + expected(prompt, n_tokens)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return [float(scores[at - 1, tokens[at]]) for at in range(len(prompt), len(tokens))]
