"""One process that runs transformers `generate` on request: what hexmesh is compared with, in the same run.

Run as `python -m tools.bench.reference MODEL_DIR THREADS DTYPE`; reads one JSON request a line and answers in one:
{"prompt", "max_tokens"} with the times of its tokens in seconds since the request;
{"batch", "context_tokens", "steps"} with the mean time of a step of a static batch, as {"cpu_s", "wall_s"};
{"prefill_tokens"} with the time of a prompt's first token, likewise.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.asked_process import AskedProcess


class Reference(AskedProcess):
    """The process, as its caller sees it. Use it as a context manager."""

    def __init__(self, model_dir: Path, threads: int, dtype: str = "float32") -> None:
        super().__init__("tools.bench.reference", str(model_dir), str(threads), dtype)

    def token_times_s(self, prompt: list[int], max_tokens: int) -> list[float]:
        """When each new token came, in seconds since the request."""
        times: list[float] = self.ask({"prompt": prompt, "max_tokens": max_tokens})
        return times


def serve(model_dir: str, threads: int, dtype: str) -> None:
    """Answer requests until stdin ends."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.generation import StoppingCriteria, StoppingCriteriaList

    class Stopwatch(StoppingCriteria):  # type: ignore[misc]
        """Notes when tokens come, by wall and by the process's CPU; never stops anything."""

        def __init__(self) -> None:
            self.started_s, self.started_cpu_s = time.perf_counter(), time.process_time()
            self.wall_s: list[float] = []
            self.cpu_s: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.wall_s.append(time.perf_counter())
            self.cpu_s.append(time.process_time())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    caches: dict[int, tuple[torch.Tensor, DynamicCache]] = {}

    def watched(tokens: torch.Tensor, n_new: int, cache: DynamicCache | None = None) -> Stopwatch:
        watch = Stopwatch()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n_new,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
            pad_token_id=0,
            past_key_values=cache,
        )
        return watch

    def random_tokens(batch: int, n_tokens: int) -> torch.Tensor:
        return torch.randint(10, 32000, (batch, n_tokens), generator=torch.Generator().manual_seed(1))

    def prefilled(batch: int, n_tokens: int) -> tuple[torch.Tensor, DynamicCache]:
        """Random prompts and a cache of all their tokens but the last."""
        if batch not in caches:
            tokens = random_tokens(batch, n_tokens)
            cache = DynamicCache(config=model.config)
            model(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            caches[batch] = tokens, cache
        return caches[batch]

    def answer(request: dict[str, Any]) -> Any:
        if "prompt" in request:
            watch = watched(torch.tensor([request["prompt"]]), request["max_tokens"])
            return [at_s - watch.started_s for at_s in watch.wall_s]
        if "prefill_tokens" in request:
            watch = watched(random_tokens(1, request["prefill_tokens"]), 1)
            return {
                "cpu_s": watch.cpu_s[0] - watch.started_cpu_s,
                "wall_s": watch.wall_s[0] - watch.started_s,
            }
        tokens, cache = prefilled(request["batch"], request["context_tokens"])
        steps = request["steps"]
        watch = watched(tokens, steps + 1, copy.deepcopy(cache))
        return {
            "cpu_s": (watch.cpu_s[-1] - watch.cpu_s[0]) / steps,
            "wall_s": (watch.wall_s[-1] - watch.wall_s[0]) / steps,
        }

    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
