"""The C kernels in every instruction set that this CPU has: shapes, threads, bounds, and what they refuse."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.runtime import native_attention
from hexmesh.runtime.kv_pool import KvPool, KvShape, LayerKv
from hexmesh.runtime.ragged import RaggedBatch
from hexmesh.runtime.shaping import Shaping
from hexmesh.wire.data import Row
from tests.unit.runtime.attention_scene import CPU, LAYER, SETS, Scene, threads, using

pytestmark = pytest.mark.skipif(
    not SETS, reason="kernels are not built: python setup.py build_ext --inplace, or pip install -e"
)
KERNELS = native_attention.KERNELS
NAN = float("nan")
FORK_LIMIT_S = 60


@pytest.fixture(params=SETS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dims", [(24, 16), (64, 64), (80, 80), (96, 128), (128, 128), (256, 256), (4, 5)])
@pytest.mark.parametrize(
    ("heads", "block_tokens"), [((2, 2), 8), ((6, 2), 16), ((4, 1), 32), ((12, 1), 16), ((5, 1), 3)]
)
def test_shapes(heads: tuple[int, int], block_tokens: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    scene = Scene(
        n_heads=heads[0],
        n_kv_heads=heads[1],
        k_dim=dims[0],
        v_dim=dims[1],
        block_tokens=block_tokens,
        dtype=dtype,
        lengths=(1, 63, 64, 65, 150, 70, 131),
        chunks=(1, 1, 1, 65, 67, 2, 1),
    )
    scene.store_past()

    scene.check(scene.run(scene.new_rows()), scene.new_rows())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (12, 1)])
@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 90, 2**40])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_windows_caps_and_sinks(
    heads: tuple[int, int], window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    scene = Scene(
        n_heads=heads[0], n_kv_heads=heads[1], k_dim=24, v_dim=16, lengths=(150, 300, 70), chunks=(1, 140, 5)
    )
    options: dict[str, object] = {"sliding_window": window, "softcap": softcap, "scaling": 0.6}
    if has_sinks:
        options["s_aux"] = torch.linspace(-2, 6, heads[0])
    scene.store_past()

    scene.check(scene.run(scene.new_rows(), **options), scene.new_rows(), **options)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_not_finite_is_stored_as_zero(dtype: torch.dtype, value: float) -> None:
    scene = Scene(n_heads=2, n_kv_heads=1, k_dim=20, v_dim=20, dtype=dtype, lengths=(30, 30), chunks=(30, 5))
    for tensors in (scene.k, scene.v):
        tensors[0][:, ::3] = value
    scene.store_past()

    answers = scene.run(scene.new_rows())

    for tensors in (scene.k, scene.v):
        tensors[0][:, ::3] = 0
    scene.check(answers, scene.new_rows())


def long_scene() -> Scene:
    """More than threads are worth, with contexts of several parts."""
    return Scene(
        n_heads=6,
        n_kv_heads=2,
        k_dim=64,
        v_dim=80,
        block_tokens=16,
        lengths=(2_500, 1_030, 40, 2_049, 1_025, 1_100),
        chunks=(1, 2, 40, 5, 1, 130),
    )


@pytest.mark.usefixtures("path")
def test_long_contexts_are_put_together_from_parts() -> None:
    scene = long_scene()
    scene.store_past()
    options: dict[str, object] = {"s_aux": torch.linspace(-1, 9, 6)}

    scene.check(scene.run(scene.new_rows(), **options), scene.new_rows(), **options)


@pytest.mark.usefixtures("path")
def test_an_answer_depends_neither_on_threads_nor_on_the_rest_of_the_batch() -> None:
    scene = long_scene()
    rows = scene.new_rows()
    with threads(1):
        scene.store_past()
        alone = [scene.run([row])[0] for row in rows]
    held = scene.pool.layer(LAYER).k.clone()

    with threads(3):
        scene.store_past()
        together = scene.run(rows)

    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert torch.equal(held, scene.pool.layer(LAYER).k)


def test_two_threads_of_python_may_attend_at_once() -> None:
    scenes = [long_scene(), long_scene()]

    def run(scene: Scene) -> list[torch.Tensor]:
        with threads(3):
            scene.store_past()
            return [answer for _ in range(5) for answer in scene.run(scene.new_rows())]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, scenes)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    scenes[0].check(first[:6], scenes[0].new_rows())


def test_a_forked_process_has_threads_of_its_own() -> None:
    scene = long_scene()
    with threads(3):
        scene.store_past()
        expected = torch.cat(scene.run(scene.new_rows()))
        layer, batch, tensors = _plain_call(scene)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(FORK_LIMIT_S)
            torch.set_num_threads(1)  # torch's own threads do not outlive a fork
            out = native_attention.attend(layer, batch, *tensors, Shaping(64**-0.5, None, None), None)
            has_threads = len(os.listdir("/proc/self/task")) > 1
            os._exit(0 if torch.equal(out, expected) and has_threads else 1)
        _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0


def _plain_call(scene: Scene) -> tuple[LayerKv, RaggedBatch, list[torch.Tensor]]:
    rows = scene.new_rows()
    batch = RaggedBatch(
        [Row(start=a, n_tokens=b - a, blocks=scene.tables[s]) for s, a, b in rows], scene.block_tokens, CPU
    )
    tensors = [
        torch.cat([given[s][:, a:b] for s, a, b in rows], dim=1) for given in (scene.q, scene.k, scene.v)
    ]
    return scene.pool.layer(LAYER), batch, tensors


@st.composite
def small_scenes(draw: st.DrawFn) -> Scene:
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 12]))
    n_kv_heads = draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    return Scene(
        n_heads=group * n_kv_heads,
        n_kv_heads=n_kv_heads,
        k_dim=draw(st.integers(4, 70)),
        v_dim=draw(st.integers(4, 70)),
        block_tokens=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        lengths=tuple(lengths),
        chunks=tuple(draw(st.one_of(st.just(1), st.integers(1, length))) for length in lengths),
    )


@settings(max_examples=150, deadline=None)
@given(scene=small_scenes(), path=st.sampled_from(SETS or ["none"]), window=st.integers(0, 100))
def test_nothing_but_own_positions_is_read_or_written(scene: Scene, path: str, window: int) -> None:
    """All other memory is NaN: it would show in the answer if read, and not be NaN any more if written."""
    layer, guards = _guarded(scene)
    scene.pool._layers[LAYER] = layer
    options: dict[str, object] = {"sliding_window": window or None}
    with using(path):
        scene.store_past()
        answers = scene.run(scene.new_rows(), **options)

    scene.check(answers, scene.new_rows(), **options)
    for buffer, start, stop in guards:
        assert buffer[:start].isnan().all()
        assert buffer[stop:].isnan().all()
    used = torch.zeros(scene.pool.n_blocks, scene.block_tokens, dtype=torch.bool)
    for table, length in zip(scene.tables, scene.lengths, strict=True):
        for position in range(length):
            used[table[position // scene.block_tokens], position % scene.block_tokens] = True
    for pool in (layer.k, layer.v):
        assert torch.equal(~pool.isnan().any(3).any(1), used)
        assert torch.equal(~pool.isnan().all(3).all(1), used)


def _guarded(scene: Scene) -> tuple[LayerKv, list[tuple[torch.Tensor, int, int]]]:
    """A layer as the scene's, in the middle of NaNs and full of them; the buffers and what lies between the guards."""
    pools, guards = [], []
    for like in (scene.pool.layer(LAYER).k, scene.pool.layer(LAYER).v):
        n, guard = like.numel(), 1000
        buffer = torch.full((n + 2 * guard,), NAN, dtype=like.dtype)
        pools.append(buffer[guard : guard + n].view(like.shape))
        guards.append((buffer, guard, guard + n))
    return LayerKv(*pools), guards


def call(rows: list[Row], n_tokens: int, n_heads: int = 2) -> torch.Tensor:
    """Attention in a pool of 4 blocks of 4 tokens."""
    pool = KvPool(
        start=0,
        shapes=[KvShape(2, 8, 8)],
        n_blocks=4,
        block_tokens=4,
        dtype=torch.float32,
        device=CPU,
    )
    q, kv = torch.ones(n_heads, n_tokens, 8), torch.ones(2, n_tokens, 8)
    batch = RaggedBatch(rows, 4, CPU)
    return native_attention.attend(pool.layer(0), batch, q, kv, kv, Shaping(1.0, None, None), None)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row(start=0, n_tokens=1, blocks=[4]), "a block is outside the pool"),
        (Row(start=0, n_tokens=1, blocks=[-1]), "a block is outside the pool"),
        (Row(start=3, n_tokens=2, blocks=[0]), "a row is longer than its blocks"),
        (Row(start=4, n_tokens=1, blocks=[0]), "a row is longer than its blocks"),
        (Row(start=0, n_tokens=1, blocks=[]), "a row is longer than its blocks"),
        (Row(start=-1, n_tokens=1, blocks=[0]), "a row is out of range"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_the_pool_are_refused(row: Row, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        call([row], 2)


def test_query_heads_that_no_kv_heads_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        call([Row(start=0, n_tokens=1, blocks=[0])], 1, n_heads=3)


def test_a_wrong_number_of_arguments_is_refused() -> None:
    assert KERNELS is not None
    with pytest.raises(TypeError, match="takes 29 arguments"):
        KERNELS.attend(1, 2)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    assert KERNELS is not None
    with pytest.raises(ValueError, match="no kernels for 'mmx' here"):
        KERNELS.use("mmx")


def test_dtypes_and_heads_without_kernels_are_left_to_torch() -> None:
    def layer(dtype: torch.dtype, k_dim: int) -> LayerKv:
        return LayerKv(torch.zeros(1, 1, 4, k_dim, dtype=dtype), torch.zeros(1, 1, 4, 8, dtype=dtype))

    assert native_attention.serves(layer(torch.bfloat16, 4))
    assert not native_attention.serves(layer(torch.float16, 8))
    assert not native_attention.serves(layer(torch.float32, 3))
