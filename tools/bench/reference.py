"""One process that runs transformers `generate` on request: what a mesh is compared with, in the same run.

Run as `python -m tools.bench.reference MODEL_DIR THREADS`; reads one JSON request a line ({"prompt", "max_tokens"}) and
answers with the times of its tokens in seconds since the request, one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Reference:
    """The process, as its caller sees it. Use it as a context manager."""

    def __init__(self, model_dir: Path, threads: int) -> None:
        environ = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tools.bench.reference", str(model_dir), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True, cwd=ROOT
        )

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def token_times_s(self, prompt: list[int], max_tokens: int) -> list[float]:
        """When each new token came, in seconds since the request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        times: list[float] = json.loads(self._process.stdout.readline())
        return times


def serve(model_dir: str, threads: int) -> None:
    """Answer requests until stdin ends."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Stopwatch(BaseStreamer):  # type: ignore[misc]
        """Notes when tokens come; the first call brings the prompt."""

        def __init__(self) -> None:
            self.started_s = time.perf_counter()
            self.times_s: list[float] = []
            self._has_prompt = False

        def put(self, value: Any) -> None:
            if self._has_prompt:
                self.times_s.append(time.perf_counter() - self.started_s)
            self._has_prompt = True

        def end(self) -> None:
            pass

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for line in sys.stdin:
        request = json.loads(line)
        prompt = torch.tensor([request["prompt"]])
        watch = Stopwatch()
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request["max_tokens"],
                min_new_tokens=request["max_tokens"],
                do_sample=False,
                streamer=watch,
                pad_token_id=0,
            )
        print(json.dumps(watch.times_s), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
