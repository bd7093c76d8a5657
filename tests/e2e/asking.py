"""How the end-to-end tests ask a mesh, and what transformers would have answered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from daemon.terminal.client import Client
from tools.soak.right_tokens import MIN_MARGIN, greedy, reference, token_ids

__all__ = [
    "Stream",
    "expected",
    "expected_logprobs",
    "penalised",
    "prompt_logprobs",
    "reference",
    "token_ids",
]


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


def expected(prompt: list[int], n_tokens: int) -> list[int]:
    """What transformers generates greedily, end-of-text ignored; asserts that no step was a near tie."""
    answer = greedy(prompt, n_tokens)
    assert answer.margin > MIN_MARGIN, f"near tie of {answer.margin} in the reference: choose another prompt"
    return list(answer.tokens)


def expected_logprobs(prompt: list[int], n_tokens: int) -> list[float]:
    """Natural-log probabilities that transformers gives the greedy tokens."""
    return prompt_logprobs(prompt + expected(prompt, n_tokens))[len(prompt) - 1 :]


def prompt_logprobs(prompt: list[int]) -> list[float]:
    """Natural-log probabilities that transformers gives the tokens of a prompt, the first left out."""
    import torch

    model, _ = reference()
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return [float(scores[at - 1, prompt[at]]) for at in range(1, len(prompt))]


def penalised(prompt: list[int], n_tokens: int, *, repetition_penalty: float) -> list[int]:
    """What transformers generates greedily with a penalty, never ending; asserts that no step was a near tie."""
    import torch

    model, tokenizer = reference()
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    best_two = torch.stack(output.scores)[:, 0].topk(2).values
    assert float((best_two[:, 0] - best_two[:, 1]).min()) > MIN_MARGIN, "near tie: choose another prompt"
    return [int(token) for token in output.sequences[0, len(prompt) :]]
