"""Weights between processes over real connections: from several peers, past dead, hung, full and lying ones."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from daemon.models import weight_fetch
from daemon.models.inspection import survey, verify
from daemon.models.weight_cache import WeightCache
from daemon.models.weight_fetch import FetchProgress
from hexmesh.errors import NotReady
from tests.e2e.weight_peers import MIB, WeightMesh, spoil, weight_mesh

N_TENSORS = 16
TENSOR_BYTES = 5 * MIB
ALL = range(N_TENSORS)
SLOW_PAUSE_S = 0.01
"""After each 256 KiB: 25 MB/s at most, so that a fetch of 80 MiB has a middle."""


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[WeightMesh]:
    with weight_mesh(tmp_path, n_tensors=N_TENSORS, tensor_bytes=TENSOR_BYTES) as mesh:
        yield mesh


def is_sound(mesh: WeightMesh, name: str = "cache") -> bool:
    """Whether every tensor is here, as the folder has it."""
    model = mesh.cache(name)
    return all(model.is_sound(tensor) for tensor in ALL)


async def test_two_peers_share_a_fetch_and_only_what_is_wanted_comes(mesh: WeightMesh) -> None:
    mesh.start_peer("one", pause_s=SLOW_PAUSE_S)
    mesh.start_peer("two", pause_s=SLOW_PAUSE_S)
    seen: set[str] = set()
    model = mesh.cache()
    n_bytes = await mesh.fetch(model, [0, 3, 4, 5, 6, 7], lambda progress: seen.update(progress.peers))
    assert n_bytes == 6 * TENSOR_BYTES
    assert seen == {"one", "two"}
    assert sorted(model.files()) == [0, 3, 4, 5, 6, 7]
    tensor = mesh.local.manifest.tensors[3]
    with (
        safe_open(model.tensor_file(3), framework="numpy") as ours,
        safe_open(mesh.model_folder / "model.safetensors", framework="numpy") as theirs,
    ):
        assert (ours.get_tensor(tensor.name) == theirs.get_tensor(tensor.name)).all()
    assert await mesh.fetch(model, [3, 4]) == 0


async def test_a_killed_peer_leaves_its_share_to_the_other(mesh: WeightMesh) -> None:
    doomed = mesh.start_peer("doomed", pause_s=SLOW_PAUSE_S)
    mesh.start_peer("other", pause_s=SLOW_PAUSE_S)
    killed_at: list[int] = []

    def kill_in_the_middle(progress: FetchProgress) -> None:
        if "doomed" in progress.peers and progress.done_bytes > 8 * MIB and not killed_at:
            killed_at.append(progress.done_bytes)
            doomed.process.kill()

    assert await mesh.fetch(mesh.cache(), ALL, kill_in_the_middle) == N_TENSORS * TENSOR_BYTES
    assert killed_at
    assert killed_at[0] < N_TENSORS * TENSOR_BYTES
    assert is_sound(mesh)


async def test_the_only_peer_dies_and_the_fetch_goes_on_when_it_returns(mesh: WeightMesh) -> None:
    only = mesh.start_peer("only", pause_s=SLOW_PAUSE_S)
    troubles: set[str | None] = set()
    is_back = False

    def kill_then_restart(progress: FetchProgress) -> None:
        nonlocal is_back
        if only.process.poll() is None and progress.done_bytes > 8 * MIB and not is_back:
            only.process.kill()
            only.process.wait()
        troubles.add(progress.trouble)
        if progress.trouble is not None and not is_back:
            is_back = True
            mesh.start_peer("only", again=only)

    assert await mesh.fetch(mesh.cache(), ALL, kill_then_restart) == N_TENSORS * TENSOR_BYTES
    assert is_back
    assert any(trouble is not None and trouble.startswith("only: ") for trouble in troubles)
    assert is_sound(mesh)


async def test_a_hung_peer_is_given_up_after_its_deadline(
    mesh: WeightMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_fetch, "STALL_S", 1.0)
    hung = mesh.start_peer("hung", pause_s=SLOW_PAUSE_S)
    mesh.start_peer("other", pause_s=SLOW_PAUSE_S)
    is_stopped = False

    def stop_in_the_middle(progress: FetchProgress) -> None:
        nonlocal is_stopped
        if "hung" in progress.peers and progress.done_bytes > 4 * MIB and not is_stopped:
            is_stopped = True
            hung.process.send_signal(signal.SIGSTOP)

    assert await mesh.fetch(mesh.cache(), ALL, stop_in_the_middle) == N_TENSORS * TENSOR_BYTES
    assert is_stopped
    assert is_sound(mesh)


async def test_a_flipped_byte_is_found_named_and_fetched_elsewhere(
    mesh: WeightMesh, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(mesh.model_folder, mesh.folder / "spoilt")
    liar = mesh.start_peer("liar", model=mesh.folder / "spoilt")
    # its manifest was made of the sound files; now every tensor but the first three has a wrong byte
    weights = mesh.folder / "spoilt" / "model.safetensors"
    for tensor in range(3, N_TENSORS):
        spoil(weights, weights.stat().st_size - (N_TENSORS - tensor) * TENSOR_BYTES + 100)
    mesh.start_peer("honest", pause_s=SLOW_PAUSE_S)
    with caplog.at_level(logging.WARNING, "hexmesh.weights"):
        await mesh.fetch(mesh.cache(), ALL)
    assert liar.process.poll() is None
    (said,) = [record.getMessage() for record in caplog.records if "damaged range" in record.getMessage()]
    assert "node=liar" in said
    assert "tensor layers." in said
    assert is_sound(mesh)


async def test_a_restart_goes_on_where_the_end_was(tmp_path: Path) -> None:
    with weight_mesh(tmp_path, n_tensors=1, tensor_bytes=40 * MIB + 5) as mesh:
        mesh.start_peer("one", pause_s=SLOW_PAUSE_S)
        done_bytes = 0
        is_far = asyncio.Event()

        def note(progress: FetchProgress) -> None:
            nonlocal done_bytes
            done_bytes = progress.done_bytes
            if done_bytes >= 12 * MIB:
                is_far.set()

        fetching = asyncio.create_task(mesh.fetch(mesh.cache(), [0], note))
        await is_far.wait()
        fetching.cancel()
        await asyncio.wait([fetching])
        model = mesh.cache()  # all that a new process knows is on the disk
        left_bytes = sum(model.missing_chunks([0]).values())
        assert 0 < left_bytes <= 40 * MIB + 5 - done_bytes
        assert model.find(0) is None
        assert await mesh.fetch(model, [0]) == left_bytes
        assert model.is_sound(0)


async def test_a_peer_that_serves_enough_others_says_when_to_come_back(mesh: WeightMesh) -> None:
    peer = mesh.start_peer("popular")
    held = [await mesh.dial(peer.node_id) for _ in range(8)]
    is_freed = False

    def free(progress: FetchProgress) -> None:
        nonlocal is_freed
        if progress.trouble is not None and not is_freed:
            assert "too many nodes" in progress.trouble
            is_freed = True
            for sock in held:
                with sock:
                    pass

    assert await mesh.fetch(mesh.cache(), [0], free) == TENSOR_BYTES
    assert is_freed


async def test_a_disk_that_takes_no_more_ends_the_fetch_with_the_bytes(mesh: WeightMesh) -> None:
    mesh.start_peer("one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = mesh.cache()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        with pytest.raises(NotReady, match=r"cannot be written: File too large \(.* free there\)") as refusal:
            await mesh.fetch(model, ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refusal.value.room_bytes is not None
    assert "make room" in refusal.value.next_step
    assert await mesh.fetch(model, ALL) == N_TENSORS * TENSOR_BYTES


async def test_the_cache_keeps_its_cap_and_what_stages_use(mesh: WeightMesh) -> None:
    mesh.start_peer("one")
    cache = WeightCache(mesh.folder / "weights", cap_bytes=10 * (TENSOR_BYTES + 1000))
    model = cache.model(mesh.local.id, mesh.local.manifest)
    shutil.copytree(mesh.cache("described").folder, model.folder)

    async def hold(user: str, tensors: range) -> None:
        cache.reserve(user, mesh.local.id, model, tensors)
        await mesh.fetch(model, tensors)

    await hold("old", range(4))
    await hold("new", range(4, 8))
    cache.release("old")
    for tensor in (0, 1):  # used longer ago than the others
        os.utime(model.tensor_file(tensor), (1.0, 1.0))
    await hold("newer", range(8, 12))
    assert sorted(model.files()) == [2, 3, *range(4, 12)]
    with pytest.raises(NotReady, match=r"need 55\.0 MiB in the cache .* has room for 50\.0 MiB") as refusal:
        cache.reserve("too much", mesh.local.id, model, range(12, 15))
    assert (refusal.value.needed_bytes or 0) > (refusal.value.room_bytes or 0) > 0
    assert sorted(model.files()) == [2, 3, *range(4, 12)]
    cache.release("new")
    await hold("too much", range(12, 15))
    assert set(range(8, 15)) <= set(model.files())
    (view,) = survey(cache)
    assert (view.layers[-1][1], view.complete, view.in_use) == (15, False, True)


async def test_verify_finds_and_deletes_what_is_damaged(mesh: WeightMesh) -> None:
    mesh.start_peer("one")
    cache = WeightCache(mesh.folder / "weights")
    model = cache.model(mesh.local.id, mesh.local.manifest)
    shutil.copytree(mesh.cache("described").folder, model.folder)
    await mesh.fetch(model, range(4))
    assert [view.damages for view in verify(cache)] == [[]]
    spoil(model.tensor_file(2), TENSOR_BYTES // 2)
    (view,) = verify(cache)
    assert [(damage.path, damage.tensor) for damage in view.damages] == [
        (str(model.tensor_file(2)), mesh.local.manifest.tensors[2].name)
    ]
    assert sorted(model.files()) == [0, 1, 3]
    assert await mesh.fetch(model, range(4)) == TENSOR_BYTES
    assert [view.damages for view in verify(cache)] == [[]]
