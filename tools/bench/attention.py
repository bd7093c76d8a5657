"""Attention over paged KV on the CPU: our kernels, the same by torch, and what reading the KV once would take.

A step is 12 layers, each with its own keys and values in permuted blocks; caches are flushed between steps.
Rounds alternate between the two, and the least of each counts. With one thread it is processor time, so that
a busy machine disturbs little.
Run: `python tools/bench/attention.py [--threads N] [--quick] [--json]`.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hexmesh import native
from hexmesh.runtime import native_attention, torch_attention
from hexmesh.runtime.device import DTYPES
from hexmesh.runtime.kv_pool import KvPool, KvShape
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.runtime.shaping import Shaping
from hexmesh.wire.data import Row
from tools.bench.report import Report, bench_arguments, print_report, progress

N_LAYERS = 12
HEAD_DIM = 64
BLOCK_TOKENS = 16
MOST_KV_BYTES = 2**30
"""Layers share memory from there on: it is far more than any cache holds."""
FLUSH_BYTES = 128 * 2**20

Attend = Callable[[RaggedBatch, int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`batch` rows of n_tokens new tokens each, which end at `context`."""

    dtype: str
    n_heads: int
    n_kv_heads: int
    batch: int
    context: int
    n_tokens: int = 1

    @property
    def name(self) -> str:
        what = "decode" if self.n_tokens == 1 else f"chunk of {self.n_tokens}"
        return f"{self.dtype} {self.n_heads}/{self.n_kv_heads} {what} to {self.context}, batch {self.batch}"

    @property
    def kv_bytes(self) -> int:
        """Of one layer."""
        return self.batch * self.context * self.n_kv_heads * 2 * HEAD_DIM * DTYPES[self.dtype].itemsize


def cases(is_quick: bool) -> list[Case]:
    """The shapes of decode that matter, then prefill."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for n_kv_heads in (12, 4):
            for context in (128, 2048):
                for batch in (1, 8, 32):
                    if not (is_quick and context * batch > 2**14):
                        found.append(
                            Case(dtype=dtype, n_heads=12, n_kv_heads=n_kv_heads, batch=batch, context=context)
                        )
            for n_tokens, context in ((1024, 1024), (128, 128), (256, 2048)):
                found.append(
                    Case(
                        dtype=dtype,
                        n_heads=12,
                        n_kv_heads=n_kv_heads,
                        batch=1,
                        context=context,
                        n_tokens=n_tokens,
                    )
                )
    return found


class Scene:
    """Pools, block tables and one layer's queries, keys and values of a case."""

    def __init__(self, case: Case) -> None:
        self._dtype = DTYPES[case.dtype]
        self._n_pools = min(N_LAYERS, max(1, MOST_KV_BYTES // case.kv_bytes))
        per_row = -(-case.context // BLOCK_TOKENS)
        self._pool = KvPool(
            start=0,
            shapes=[KvShape(case.n_kv_heads, HEAD_DIM, HEAD_DIM)] * self._n_pools,
            n_blocks=case.batch * per_row,
            block_tokens=BLOCK_TOKENS,
            dtype=self._dtype,
            device=torch.device("cpu"),
        )
        for index in range(self._n_pools):
            self._pool.layer(index).k.normal_()
            self._pool.layer(index).v.normal_()
        blocks = random.Random(1).sample(range(case.batch * per_row), case.batch * per_row)
        self.rows = [
            Row(
                start=case.context - case.n_tokens,
                n_tokens=case.n_tokens,
                blocks=blocks[i * per_row : (i + 1) * per_row],
            )
            for i in range(case.batch)
        ]
        n_tokens = case.batch * case.n_tokens
        heads = (case.n_heads, case.n_kv_heads, case.n_kv_heads)
        self._tensors = [torch.randn(n_tokens, n, HEAD_DIM).to(self._dtype).transpose(0, 1) for n in heads]
        self._shaping = Shaping(HEAD_DIM**-0.5, None, None)
        self._scratch = torch_attention.Scratch()

    def native(self, batch: RaggedBatch, layer: int) -> torch.Tensor:
        q, k, v = self._tensors
        return native_attention.attend(
            self._pool.layer(layer % self._n_pools), batch, q, k, v, self._shaping, None
        )

    def by_torch(self, batch: RaggedBatch, layer: int) -> torch.Tensor:
        q, k, v = self._tensors
        layer_kv = self._pool.layer(layer % self._n_pools)
        return torch_attention.attend(layer_kv, batch, q, k, v, self._shaping, None, self._scratch)


def clock_for_threads() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def memory_bytes_per_s() -> float:
    """Of reading in order what no cache holds, by the clock that steps are timed with; the best of ten."""
    data = torch.ones(2 * FLUSH_BYTES // 4)
    clock = clock_for_threads()
    least_s = float("inf")
    for _ in range(10):
        started_s = clock()
        data.sum()
        least_s = min(least_s, clock() - started_s)
    return data.nbytes / least_s


def step_s(attend: Attend, rows: list[Row], clock: Callable[[], float]) -> float:
    """Seconds of one step, the batch's layout included."""
    started_s = clock()
    batch = RaggedBatch(rows, BLOCK_TOKENS, torch.device("cpu"))
    for layer in range(N_LAYERS):
        attend(batch, layer)
    return clock() - started_s


@torch.inference_mode()
def bench_case(report: Report, case: Case, n_rounds: int, bytes_per_s: float) -> None:
    """Milliseconds of a step in each way, and ratios."""
    scene = Scene(case)
    flush = torch.ones(FLUSH_BYTES // 4)
    clock = clock_for_threads()
    ways: dict[str, Attend] = {"torch": scene.by_torch}
    if native_attention.KERNELS is not None:
        ways["native"] = scene.native
    least_s = dict.fromkeys(ways, float("inf"))
    for _ in range(n_rounds):
        for name, attend in ways.items():
            flush.sum()
            least_s[name] = min(least_s[name], step_s(attend, scene.rows, clock))
    for name, seconds in least_s.items():
        report.add(f"{case.name}: {name}", seconds * 1e3, "ms")
    if "native" in least_s:
        at_least = 1.0 if case.n_tokens >= 1024 else None
        report.add(
            f"{case.name}: torch / native", least_s["torch"] / least_s["native"], "", at_least=at_least
        )
    if case.n_tokens == 1:
        ideal_s = N_LAYERS * case.kv_bytes / bytes_per_s
        report.add(f"{case.name}: ideal", ideal_s * 1e3, "ms")
        if "native" in least_s:
            report.add(f"{case.name}: ideal / native", ideal_s / least_s["native"], "")


def main() -> int:
    parser = bench_arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n_rounds = 4 if arguments.quick else 6
    bytes_per_s = memory_bytes_per_s()
    report = Report(
        name="attention",
        method=(
            f"ms of a step of {N_LAYERS} layers, heads of {HEAD_DIM}, blocks of {BLOCK_TOKENS}; least of "
            f"{n_rounds} alternating rounds, {arguments.threads} threads; kernels: {native.describe()}"
        ),
    )
    report.add("memory", bytes_per_s / 1e9, "GB/s")
    for case in cases(arguments.quick):
        if arguments.only in case.name:
            progress(case.name)
            bench_case(report, case, n_rounds, bytes_per_s)
    if arguments.quick:
        report.not_run.append("decode at batch 32 with context 2,048")
    print_report(report, "json" if arguments.json else "text")
    return 0 if all(figure.holds is not False for figure in report.figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
