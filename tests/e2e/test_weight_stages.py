"""Stages of a real worker whose weights come from a peer: what a stage that grows fetches, and what it loads."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from daemon.compute.workers import Worker, Workshop
from daemon.models.cached_model import About
from daemon.models.manifests import local_manifest
from daemon.models.model_source import resolve_model
from daemon.models.node_weights import HeldModel, NodeWeights
from daemon.models.weight_cache import WeightCache
from daemon.models.weight_fetch import WeightPeer
from hexmesh.errors import NotReady
from hexmesh.wire.worker import LoadStage, StageLoaded
from tests.e2e.weight_peers import WeightMesh
from tests.golden.tiny_models import save_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WeightMesh]:
    """One peer with a tiny model of five layers."""
    folder = tmp_path_factory.mktemp("stages")
    save_tiny_model("qwen2_moe", folder / "model")
    (folder / "model" / "tokenizer.json").write_text("{}")
    local = local_manifest(resolve_model(str(folder / "model")), folder)
    mesh = WeightMesh(folder, local, folder / "model")
    mesh.start_peer("holder")
    yield mesh
    mesh.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[Worker]:
    async with asyncio.timeout(120), Workshop() as shop:
        yield await shop.start_worker("cpu", 1, None)


def weights_in(mesh: WeightMesh, folder: Path, cap_bytes: int | None = None) -> NodeWeights:
    """A node's weights with an empty cache."""
    cache = WeightCache(folder, cap_bytes)
    model = cache.model(mesh.local.id, mesh.local.manifest)
    files = {file.name: (mesh.model_folder / file.name).read_bytes() for file in mesh.local.manifest.files}
    model.describe(mesh.local.encoded, About(name="tiny", folder=None), files)
    return NodeWeights(
        HeldModel(local=mesh.local, folder=model.folder, tensors=model, cached=model),
        cache,
        peers=lambda: [WeightPeer(peer.node_id, peer.name) for peer in mesh.peers.values()],
        dial=mesh.dial,
        is_busy=lambda: False,
        on_progress=lambda _: None,
    )


def order(folder: Path, stage: str, start: int, stop: int) -> LoadStage:
    return LoadStage(
        stage=stage,
        pool=stage,
        model_dir=str(folder),
        model_id="tiny",
        start=start,
        stop=stop,
        dtype="float32",
        kv_blocks=4,
        block_tokens=8,
        budget_bytes=2**30,
    )


def bytes_of(mesh: WeightMesh, pattern: str) -> int:
    return sum(tensor.n_bytes for tensor in mesh.local.manifest.tensors if re.search(pattern, tensor.name))


async def test_a_stage_that_grows_by_two_layers_fetches_and_loads_exactly_those(
    mesh: WeightMesh, worker: Worker, tmp_path: Path
) -> None:
    weights = weights_in(mesh, tmp_path / "weights")
    folder = tmp_path / "weights" / mesh.local.id

    async def load(stage: str, start: int, stop: int) -> StageLoaded:
        wanted = order(folder, stage, start, stop)
        await weights.hold(stage, await worker.name_tensors(wanted))
        return await worker.load(wanted)

    first = await load("old", 0, 2)
    assert first.n_layers_reused == 0
    assert weights.fetched_bytes == bytes_of(mesh, r"layers\.[01]\.|embed_tokens|model\.norm")
    before_bytes = weights.fetched_bytes
    second = await load("new", 0, 4)
    assert second.n_layers_reused == 2
    assert weights.fetched_bytes - before_bytes == bytes_of(mesh, r"layers\.[23]\.")
    before_bytes = weights.fetched_bytes
    third = await load("back", 0, 2)
    assert (third.n_layers_reused, weights.fetched_bytes - before_bytes) == (2, 0)
    for stage in ("old", "new", "back"):
        worker.drop(stage)


async def test_a_cache_without_room_for_the_stage_says_so_and_keeps_nothing_for_it(
    mesh: WeightMesh, worker: Worker, tmp_path: Path
) -> None:
    weights = weights_in(mesh, tmp_path / "weights", cap_bytes=100_000)
    names = await worker.name_tensors(order(tmp_path / "weights" / mesh.local.id, "s", 0, 4))
    with pytest.raises(NotReady, match=r"need .* and it has room for 97\.7 KiB") as refusal:
        await weights.hold("s", names)
    assert refusal.value.code == "weights_cache_full"
    assert weights.fetched_bytes == 0
    assert weights.room_bytes == 100_000
