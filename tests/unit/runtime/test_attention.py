"""Paged ragged attention against dense attention written down plainly, by our kernels and by torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hexmesh.errors import Internal
from hexmesh.runtime.attention import RunContext, attend, running
from hexmesh.runtime.kv_pool import KvPool, KvShape, pool_bytes
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.wire.data import Row
from tests.unit.runtime.attention_scene import CPU, LAYER, SETS, Module, Scene, using

LENGTHS = (1, 4, 5, 13, 22, 9)
CHUNKS = (1, 4, 2, 1, 1, 6)
"""How many of each sequence's tokens are new: decode rows, whole prompts and a later chunk."""


@pytest.fixture(params=["torch", *SETS], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def scene_of(n_heads: int, n_kv_heads: int) -> Scene:
    return Scene(n_heads=n_heads, n_kv_heads=n_kv_heads, lengths=LENGTHS, chunks=CHUNKS)


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
    scene = scene_of(*heads)
    scene.store_past()
    options = dict(options)
    if options.pop("sinks", False):
        options["s_aux"] = torch.linspace(-1, 1, scene.n_heads)

    answers = scene.run(scene.new_rows(), **options)

    scene.check(answers, scene.new_rows(), **options)


def test_only_own_blocks_are_written() -> None:
    scene = scene_of(4, 2)
    scene.store_past()
    scene.run(scene.new_rows())
    layer = scene.pool.layer(LAYER)

    used = {block for table in scene.tables for block in table}
    for block in set(range(scene.pool.n_blocks)) - used:
        assert not layer.k[block].any()
        assert not layer.v[block].any()
    for sequence, table in enumerate(scene.tables):
        for pool, given in ((layer.k, scene.k), (layer.v, scene.v)):
            held = torch.cat([pool[block] for block in table], dim=1)
            assert torch.equal(held[:, : LENGTHS[sequence]], given[sequence])


def test_overflow_in_one_sequence_does_not_reach_the_next_user_of_its_blocks() -> None:
    scene = scene_of(4, 2)
    scene.k[4].fill_(float("nan"))
    scene.v[4].fill_(float("inf"))
    scene.run([(4, 0, LENGTHS[4])])
    scene.tables[3] = scene.tables[4]
    scene.run([(3, 0, 5)])

    decoded = scene.run([(3, 5, 6), (5, 0, 1)])
    chunk = scene.run([(3, 6, 9)])

    scene.check(decoded, [(3, 5, 6), (5, 0, 1)])
    scene.check(chunk, [(3, 6, 9)])


def test_overflow_in_one_sequence_does_not_reach_others_of_its_batch() -> None:
    scene = scene_of(6, 2)
    scene.store_past()
    for bad, value in ((1, float("nan")), (3, float("inf"))):
        for tensors in (scene.q, scene.k, scene.v):
            tensors[bad].fill_(value)

    answers = scene.run(scene.new_rows())

    good = [row for row in scene.new_rows() if row[0] not in (1, 3)]
    scene.check([answers[s] for s, _, _ in good], good)


def test_queries_and_keys_of_any_strides_are_the_same() -> None:
    scene = scene_of(6, 2)
    scene.store_past()
    plain = scene.run([(4, 21, 22), (5, 3, 9)])

    def strided(tensor: torch.Tensor) -> torch.Tensor:
        """Token-major, and every other element of a wider tensor."""
        wide = torch.full((tensor.shape[1], tensor.shape[0], tensor.shape[2] * 2), float("nan"))
        view = wide.transpose(0, 1)[..., ::2]
        return view.copy_(tensor)

    for tensors in (scene.q, scene.k, scene.v):
        tensors[:] = [strided(tensor) for tensor in tensors]
    again = scene.run([(4, 21, 22), (5, 3, 9)])

    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_mask_of_the_models_own_is_an_error() -> None:
    scene = scene_of(4, 2)
    tensors = (scene.q[0][None], scene.k[0][None], scene.v[0][None])

    with pytest.raises(Internal, match="mask"):
        attend(Module(), *tensors, torch.zeros(1, 1, 1, 1))


def test_heads_that_do_not_fit_the_pool_are_an_error() -> None:
    scene = scene_of(4, 2)
    batch = RaggedBatch([Row(start=0, n_tokens=1, blocks=[0])], scene.block_tokens, CPU)

    with running(RunContext(scene.pool, batch)), pytest.raises(Internal, match="pool has blocks"):
        attend(Module(), *(tensor[None] for tensor in (scene.q[0], scene.q[0], scene.v[0])), None)


def test_rows_of_like_length_are_read_together() -> None:
    lengths = [1, 2, 17, 18, 33, 64, 100, 128]
    rows = [Row(start=length - 1, n_tokens=1, blocks=list(range(32))) for length in lengths]

    reads = RaggedBatch(rows, 4, CPU).reads(2, None)

    assert sorted(int(token) for group in reads.groups for token in group.tokens) == list(range(8))
    assert len(reads.groups) == 4
    for group in reads.groups:
        for token in group.tokens.tolist():
            assert group.n_blocks <= 2 * -(-lengths[token] // 4)


def test_pool_bytes_are_what_a_pool_takes() -> None:
    shapes = [KvShape(2, 8, 12), KvShape(4, 8, 8)]
    pool = KvPool(
        start=5, shapes=shapes, n_blocks=7, block_tokens=4, dtype=torch.bfloat16, device=torch.device("cpu")
    )

    assert pool.n_bytes == pool_bytes(shapes, 7, 4, torch.bfloat16) == (2 * 20 + 4 * 16) * 4 * 7 * 2
    assert pool.layer(6).k.shape == (7, 4, 4, 8)
    assert not any(pool.layer(5).k.flatten())
