"""Paged ragged attention against dense attention written down plainly."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from hexmesh.errors import Internal
from hexmesh.runtime.attention import RunContext, attend, running
from hexmesh.runtime.kv_pool import KvPool, KvShape, pool_bytes
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.wire.data import Row

CPU = torch.device("cpu")
LAYER = 3
BLOCK_TOKENS = 4
N_BLOCKS = 40
K_DIM, V_DIM = 8, 12
LENGTHS = (1, 4, 5, 13, 22, 9)
CHUNKS = (1, 4, 2, 1, 1, 6)
"""How many of each sequence's tokens are new: decode rows, whole prompts and a later chunk."""


class Module(torch.nn.Module):
    layer_idx = LAYER


@dataclass
class Scene:
    """Sequences with random queries, keys and values at every position, and a pool that holds their past."""

    n_heads: int
    n_kv_heads: int
    pool: KvPool = field(init=False)
    tables: list[list[int]] = field(init=False)
    q: list[torch.Tensor] = field(init=False)
    k: list[torch.Tensor] = field(init=False)
    v: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.n_heads)
        shape = KvShape(self.n_kv_heads, K_DIM, V_DIM)
        self.pool = KvPool(
            start=LAYER,
            shapes=[shape],
            n_blocks=N_BLOCKS,
            block_tokens=BLOCK_TOKENS,
            dtype=torch.float32,
            device=CPU,
        )
        free = random.Random(3).sample(range(N_BLOCKS), N_BLOCKS)
        self.tables = [[free.pop() for _ in range(length // BLOCK_TOKENS + 1)] for length in LENGTHS]

        def rand(n_heads: int, length: int, dim: int) -> torch.Tensor:
            return torch.randn(n_heads, length, dim, generator=generator)

        self.q = [rand(self.n_heads, length, K_DIM) for length in LENGTHS]
        self.k = [rand(self.n_kv_heads, length, K_DIM) for length in LENGTHS]
        self.v = [rand(self.n_kv_heads, length, V_DIM) for length in LENGTHS]

    def run(self, rows: list[tuple[int, int, int]], **options: object) -> list[torch.Tensor]:
        """Attend for (sequence, start, stop) as one batch; per row (n_tokens, n_heads, v_dim)."""
        batch = RaggedBatch(
            [Row(start=a, n_tokens=b - a, blocks=self.tables[s]) for s, a, b in rows], BLOCK_TOKENS, CPU
        )
        query, key, value = (
            torch.cat([tensors[s][:, a:b] for s, a, b in rows], dim=1)[None]
            for tensors in (self.q, self.k, self.v)
        )
        with running(RunContext(self.pool, batch)):
            out, _ = attend(Module(), query, key, value, None, **options)  # type: ignore[arg-type]
        return list(out[0].split([b - a for _, a, b in rows]))

    def store_past(self) -> None:
        past = [(s, 0, LENGTHS[s] - n) for s, n in enumerate(CHUNKS) if LENGTHS[s] > n]
        self.run(past)

    def new_rows(self) -> list[tuple[int, int, int]]:
        return [(s, LENGTHS[s] - n, LENGTHS[s]) for s, n in enumerate(CHUNKS)]

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
        """The same, position by position and head by head."""
        group = self.n_heads // self.n_kv_heads
        out = torch.empty(stop - start, self.n_heads, V_DIM)
        for position in range(start, stop):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(self.n_heads):
                keys = self.k[sequence][head // group, first : position + 1]
                scores = keys @ self.q[sequence][head, position] * (scaling or K_DIM**-0.5)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if s_aux is None else s_aux[head].exp())
                out[position - start, head] = (
                    weights @ self.v[sequence][head // group, first : position + 1] / total
                )
        return out


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        {"sliding_window": 5},
        {"sliding_window": 1},
        {"softcap": 1.5},
        {"sliding_window": 6, "softcap": 2.0, "scaling": 1.0},
        {"sinks": True},
        {"sinks": True, "sliding_window": 3},
    ],
    ids=str,
)
def test_equals_dense_attention(heads: tuple[int, int], options: dict[str, object]) -> None:
    scene = Scene(*heads)
    scene.store_past()
    options = dict(options)
    if options.pop("sinks", False):
        options["s_aux"] = torch.linspace(-1, 1, scene.n_heads)

    answers = scene.run(scene.new_rows(), **options)

    for answer, row in zip(answers, scene.new_rows(), strict=True):
        expected = scene.dense(*row, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


def test_only_own_blocks_are_written() -> None:
    scene = Scene(4, 2)
    scene.store_past()
    scene.run(scene.new_rows())
    layer = scene.pool.layer(LAYER)

    used = {block for table in scene.tables for block in table}
    for block in set(range(N_BLOCKS)) - used:
        assert not layer.k[block].any()
        assert not layer.v[block].any()
    for sequence, table in enumerate(scene.tables):
        held = torch.cat([layer.v[block] for block in table], dim=1)
        torch.testing.assert_close(held[:, : LENGTHS[sequence]], scene.v[sequence])


def test_overflow_in_one_sequence_does_not_reach_the_next_user_of_its_blocks() -> None:
    scene = Scene(4, 2)
    scene.k[4].fill_(float("nan"))
    scene.v[4].fill_(float("inf"))
    scene.run([(4, 0, LENGTHS[4])])
    scene.tables[3] = scene.tables[4]
    scene.run([(3, 0, 5)])

    [decoded, _] = scene.run([(3, 5, 6), (5, 0, 1)])
    [chunk] = scene.run([(3, 6, 9)])

    torch.testing.assert_close(decoded, scene.dense(3, 5, 6))
    torch.testing.assert_close(chunk, scene.dense(3, 6, 9))


def test_a_mask_of_the_models_own_is_an_error() -> None:
    scene = Scene(4, 2)
    tensors = (scene.q[0][None], scene.k[0][None], scene.v[0][None])

    with pytest.raises(Internal, match="mask"):
        attend(Module(), *tensors, torch.zeros(1, 1, 1, 1))


def test_heads_that_do_not_fit_the_pool_are_an_error() -> None:
    scene = Scene(4, 2)
    batch = RaggedBatch([Row(start=0, n_tokens=1, blocks=[0])], BLOCK_TOKENS, CPU)

    with running(RunContext(scene.pool, batch)), pytest.raises(Internal, match="pool has blocks"):
        attend(Module(), *(tensor[None] for tensor in (scene.q[0], scene.q[0], scene.v[0])), None)


def test_rows_of_like_length_are_read_together() -> None:
    lengths = [1, 2, 17, 18, 33, 64, 100, 128]
    rows = [Row(start=length - 1, n_tokens=1, blocks=list(range(32))) for length in lengths]

    reads = RaggedBatch(rows, BLOCK_TOKENS, CPU).reads(2, None)

    assert sorted(int(token) for group in reads.groups for token in group.tokens) == list(range(8))
    assert len(reads.groups) == 4
    for group in reads.groups:
        for token in group.tokens.tolist():
            assert group.n_blocks <= 2 * -(-lengths[token] // BLOCK_TOKENS)


def test_pool_bytes_are_what_a_pool_takes() -> None:
    shapes = [KvShape(2, 8, 12), KvShape(4, 8, 8)]
    pool = KvPool(
        start=5, shapes=shapes, n_blocks=7, block_tokens=4, dtype=torch.bfloat16, device=torch.device("cpu")
    )

    assert pool.n_bytes == pool_bytes(shapes, 7, 4, torch.bfloat16) == (2 * 20 + 4 * 16) * 4 * 7 * 2
    assert pool.layer(6).k.shape == (7, 4, 4, 8)
    assert not any(pool.layer(5).k.flatten())
