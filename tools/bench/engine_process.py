"""One process that runs a whole model as one stage of ours, driven with the rows that a batcher would send.

Run as `python -m tools.bench.engine_process MODEL_DIR THREADS DTYPE KERNELS` with KERNELS "native" or "torch"; reads
one JSON request a line and answers in one:
{"batch", "context_tokens", "steps"} with the mean time of a decode step, as {"cpu_s", "wall_s"};
{"prefill_tokens"} with the time of one prefill in one step;
{"profile": batch, "context_tokens", "steps"} with torch's profile of such steps, as text;
{"facts": true} with weight bytes read by a step, bytes/s of memory, and which kernels run.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.asked_process import AskedProcess

BLOCK_TOKENS = 16
KV_BLOCKS = 1024
KERNEL_MODULES = ("gemm", "attention")


class Engine(AskedProcess):
    """The process, as its caller sees it. Use it as a context manager."""

    def __init__(self, model_dir: Path, threads: int, dtype: str, kernels: str) -> None:
        super().__init__("tools.bench.engine_process", str(model_dir), str(threads), dtype, kernels)


def serve(model_dir: str, threads: int, dtype: str, kernels: str) -> None:
    """Answer requests until stdin ends."""
    if kernels == "torch":
        for name in KERNEL_MODULES:
            sys.modules[f"hexmesh.native.{name}"] = None  # type: ignore[assignment]

    import torch

    import hexmesh.native
    from hexmesh.runtime.device import measure_bandwidth, prepare_thread
    from hexmesh.runtime.residency import Residency
    from hexmesh.runtime.stage import Stage
    from hexmesh.wire.data import Row, SamplingParams
    from hexmesh.wire.worker import LoadStage

    device = torch.device("cpu")
    prepare_thread(device, threads)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    residency = Residency(device)
    order = LoadStage(
        pool="",
        stage="whole",
        model_dir=model_dir,
        model_id="bench",
        start=0,
        stop=config["num_hidden_layers"],
        dtype=dtype,  # type: ignore[arg-type]
        kv_blocks=KV_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        budget_bytes=2**36,
    )
    loaded = residency.load(order)
    stage = residency.find("whole")
    assert isinstance(stage, Stage)
    free = random.Random(1).sample(range(KV_BLOCKS), KV_BLOCKS)

    @dataclass(slots=True)
    class Sequence:
        blocks: list[int]
        token: int

        def row(self, start: int, n_tokens: int) -> Row:
            return Row(start=start, n_tokens=n_tokens, blocks=self.blocks, sample=SamplingParams())

    held: dict[int, list[Sequence]] = {}

    def prompt(n_tokens: int) -> torch.Tensor:
        return torch.randint(10, 32000, (n_tokens,), generator=torch.Generator().manual_seed(1))

    def prefilled(batch: int, context_tokens: int, steps: int) -> list[Sequence]:
        """Sequences of that context, each with blocks of its own in any order."""
        if batch not in held:
            n_blocks = -(-(context_tokens + steps) // BLOCK_TOKENS)
            sequences = []
            for _ in range(batch):
                blocks = [free.pop() for _ in range(n_blocks)]
                row = Row(start=0, n_tokens=context_tokens, blocks=blocks, sample=SamplingParams())
                token = stage.run([row], prompt(context_tokens)).sampled[0][0].token_id
                sequences.append(Sequence(blocks, token))
            held[batch] = sequences
        return held[batch]

    def decode(batch: int, context_tokens: int, steps: int) -> dict[str, float]:
        sequences = prefilled(batch, context_tokens, steps)
        tokens = [sequence.token for sequence in sequences]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for step in range(steps):
            rows = [sequence.row(context_tokens + step, 1) for sequence in sequences]
            tokens = [drawn[0].token_id for drawn in stage.run(rows, torch.tensor(tokens)).sampled]
        return {
            "cpu_s": (time.process_time() - cpu_s) / steps,
            "wall_s": (time.perf_counter() - wall_s) / steps,
        }

    def prefill(n_tokens: int) -> dict[str, float]:
        row = Row(
            start=0,
            n_tokens=n_tokens,
            blocks=free[: -(-n_tokens // BLOCK_TOKENS)],
            sample=SamplingParams(),
        )
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        stage.run([row], prompt(n_tokens))
        return {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s}

    def profile(batch: int, context_tokens: int, steps: int) -> str:
        decode(batch, context_tokens, steps)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            decode(batch, context_tokens, steps)
        return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))

    def answer(request: dict[str, Any]) -> Any:
        if "batch" in request:
            return decode(request["batch"], request["context_tokens"], request["steps"])
        if "prefill_tokens" in request:
            return prefill(request["prefill_tokens"])
        if "profile" in request:
            return profile(request["profile"], request["context_tokens"], request["steps"])
        embedding_bytes = config["vocab_size"] * config["hidden_size"] * (4 if dtype == "float32" else 2)
        is_tied = config.get("tie_word_embeddings", False)
        return {
            "weight_bytes": loaded.weight_bytes - (0 if is_tied else embedding_bytes),
            "bytes_per_s": measure_bandwidth(device).per_s,
            "kernels": hexmesh.native.describe(),
        }

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
