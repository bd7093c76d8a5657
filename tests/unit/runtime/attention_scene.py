"""Sequences with random queries, keys and values, a pool that holds their past, and attention written down plainly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from hexmesh.runtime import native_attention
from hexmesh.runtime.attention import RunContext, attend, running
from hexmesh.runtime.kv_pool import KvPool, KvShape
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.wire.data import Row

CPU = torch.device("cpu")
LAYER = 3
SETS: list[str] = [] if native_attention.KERNELS is None else native_attention.KERNELS.instruction_sets()
"""Every instruction set that kernels can run in here."""

SeqRow = tuple[int, int, int]
"""Sequence, first position, stop."""


class Module(torch.nn.Module):
    layer_idx = LAYER


@contextmanager
def using(path: str) -> Iterator[None]:
    """Attention by "torch", or by kernels of one instruction set."""
    kernels = native_attention.KERNELS
    with pytest.MonkeyPatch.context() as patch:
        if path == "torch":
            patch.setattr(native_attention, "KERNELS", None)
            yield
            return
        assert kernels is not None
        kernels.use(path)
        try:
            yield
        finally:
            kernels.use(SETS[0])


@contextmanager
def threads(n: int) -> Iterator[None]:
    """That many threads of this process's torch, and so of our kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(kw_only=True)
class Scene:
    """`lengths` tokens of each sequence, the last of which, as many as in `chunks`, are new."""

    n_heads: int
    n_kv_heads: int
    k_dim: int = 8
    v_dim: int = 12
    block_tokens: int = 4
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...]
    chunks: tuple[int, ...]
    pool: KvPool = field(init=False)
    tables: list[list[int]] = field(init=False)
    q: list[torch.Tensor] = field(init=False)
    k: list[torch.Tensor] = field(init=False)
    v: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        counts = [length // self.block_tokens + 1 for length in self.lengths]
        n_blocks = sum(counts) + 5
        self.pool = KvPool(
            start=LAYER,
            shapes=[KvShape(self.n_kv_heads, self.k_dim, self.v_dim)],
            n_blocks=n_blocks,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
            device=CPU,
        )
        free = random.Random(3).sample(range(n_blocks), n_blocks)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        generator = torch.Generator().manual_seed(self.n_heads)

        def rand(n_heads: int, length: int, dim: int) -> torch.Tensor:
            return torch.randn(n_heads, length, dim, generator=generator).to(self.dtype)

        self.q = [rand(self.n_heads, length, self.k_dim) for length in self.lengths]
        self.k = [rand(self.n_kv_heads, length, self.k_dim) for length in self.lengths]
        self.v = [rand(self.n_kv_heads, length, self.v_dim) for length in self.lengths]

    def run(self, rows: list[SeqRow], **options: object) -> list[torch.Tensor]:
        """Attend for the rows as one batch; per row (n_tokens, n_heads, v_dim)."""
        batch = RaggedBatch(
            [Row(start=a, n_tokens=b - a, blocks=self.tables[s]) for s, a, b in rows],
            self.block_tokens,
            CPU,
        )
        query, key, value = (
            torch.cat([tensors[s][:, a:b] for s, a, b in rows], dim=1)[None]
            for tensors in (self.q, self.k, self.v)
        )
        with running(RunContext(self.pool, batch)):
            out, _ = attend(Module(), query, key, value, None, **options)  # type: ignore[arg-type]
        return list(out[0].split([b - a for _, a, b in rows]))

    def store_past(self) -> None:
        """Write all but the new tokens' keys and values."""
        past = [(s, 0, self.lengths[s] - n) for s, n in enumerate(self.chunks) if self.lengths[s] > n]
        if past:
            self.run(past)

    def new_rows(self) -> list[SeqRow]:
        return [(s, self.lengths[s] - n, self.lengths[s]) for s, n in enumerate(self.chunks)]

    def dense(
        self,
        sequence: int,
        start: int,
        stop: int,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same in float64, head by head: (n_tokens, n_heads, v_dim)."""
        group = self.n_heads // self.n_kv_heads
        at, seen = torch.arange(start, stop)[:, None], torch.arange(stop)
        visible = seen <= at
        if sliding_window is not None:
            visible &= seen > at - sliding_window
        out = torch.empty(stop - start, self.n_heads, self.v_dim, dtype=torch.float64)
        for head in range(self.n_heads):
            keys = self.k[sequence][head // group, :stop].double()
            scores = self.q[sequence][head, start:stop].double() @ keys.T * (scaling or self.k_dim**-0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp() * visible
            total = weights.sum(1, keepdim=True) + (0 if s_aux is None else s_aux[head].double().exp())
            out[:, head] = weights @ self.v[sequence][head // group, :stop].double() / total
        return out

    def check(self, answers: list[torch.Tensor], rows: list[SeqRow], **options: object) -> None:
        """Assert that answers are the dense ones but for rounding; halves are rounded once, on the way out."""
        loose = {"rtol": 1e-5, "atol": 1e-5} if self.dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
        for answer, row in zip(answers, rows, strict=True):
            expected = self.dense(*row, **options)  # type: ignore[arg-type]
            torch.testing.assert_close(answer.double(), expected, **loose)
