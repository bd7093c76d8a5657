"""One process that times decode steps of one stage by their number of rows, outside of any pipeline.

Run as `python -m tools.bench.stage_process MODEL_DIR THREADS DTYPE START STOP`; reads one JSON request a line,
{"batch", "context_tokens", "steps"}, and answers with the median step, as {"wall_s", "cpu_s"}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tools.bench.asked_process import AskedProcess

BLOCK_TOKENS = 16
KV_BLOCKS = 2048


class StageProcess(AskedProcess):
    """The process, as its caller sees it. Use it as a context manager."""

    def __init__(
        self, model_dir: Path, layers: tuple[int, int], *, threads: int = 1, dtype: str = "float32"
    ) -> None:
        start, stop = layers
        super().__init__(
            "tools.bench.stage_process", str(model_dir), str(threads), dtype, str(start), str(stop)
        )

    def step_s(self, n_rows: int, context_tokens: int, n_steps: int) -> float:
        """The median wall time of a decode step."""
        answer = self.ask({"batch": n_rows, "context_tokens": context_tokens, "steps": n_steps})
        return float(answer["wall_s"])


def serve(model_dir: str, threads: int, dtype: str, start: int, stop: int) -> None:
    """Answer requests until stdin ends."""
    import torch

    from hexmesh.runtime.device import prepare_thread
    from hexmesh.runtime.residency import Residency
    from hexmesh.runtime.stage import Stage
    from hexmesh.wire.data import Row, SamplingParams
    from hexmesh.wire.worker import LoadStage

    device = torch.device("cpu")
    prepare_thread(device, threads)
    residency = Residency(device)
    residency.load(
        LoadStage(
            pool="",
            stage="timed",
            model_dir=model_dir,
            model_id="bench",
            start=start,
            stop=stop,
            dtype=dtype,  # type: ignore[arg-type]
            kv_blocks=KV_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            budget_bytes=2**36,
        )
    )
    stage = residency.find("timed")
    assert isinstance(stage, Stage)
    config = json.loads((Path(model_dir) / "config.json").read_text())
    is_last = stop == config["num_hidden_layers"]

    def payload(n_rows: int) -> torch.Tensor:
        """Token ids (n_rows,) for the first stage, else hidden states (n_rows, hidden_size)."""
        generator = torch.Generator().manual_seed(1)
        if start == 0:
            return torch.randint(10, config["vocab_size"], (n_rows,), generator=generator)
        return torch.randn(n_rows, config["hidden_size"], generator=generator).to(getattr(torch, dtype))

    def rows(n_rows: int, context_tokens: int) -> list[Row]:
        """Sequences of that context, whose keys and values are zeros: that takes as long as any others."""
        n_blocks = context_tokens // BLOCK_TOKENS + 1
        sample = SamplingParams() if is_last else None
        return [
            Row(start=context_tokens, n_tokens=1, blocks=list(range(at, at + n_blocks)), sample=sample)
            for at in range(0, n_rows * n_blocks, n_blocks)
        ]

    def answer(request: dict[str, Any]) -> dict[str, float]:
        batch, hidden = rows(request["batch"], request["context_tokens"]), payload(request["batch"])
        walls_s, started_cpu_s = [], time.process_time()
        for _ in range(request["steps"]):
            started_s = time.perf_counter()
            stage.run(batch, hidden)
            walls_s.append(time.perf_counter() - started_s)
        cpu_s = (time.process_time() - started_cpu_s) / request["steps"]
        return {"wall_s": statistics.median(walls_s), "cpu_s": cpu_s}

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
