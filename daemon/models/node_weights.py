"""The mesh's weights on this node: the local model folder, or what the cache holds and fetches of them from peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from daemon.models.cached_model import CachedModel
from daemon.models.inspection import survey
from daemon.models.manifests import LocalManifest
from daemon.models.tensor_files import TensorSource
from daemon.models.weight_cache import WeightCache
from daemon.models.weight_fetch import FetchProgress, WeightFetch, WeightPeer
from daemon.models.weight_server import WeightServer
from daemon.peering.bulk import BulkSocket
from daemon.views import CachedModelView
from hexmesh.errors import NotReady
from hexmesh.ids import NodeId
from hexmesh.membership.records import DeviceFacts
from hexmesh.weights.manifest import Chunk

_LOOK_UP_S = 20.0
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """The mesh's model as far as it is on this machine."""

    local: LocalManifest
    folder: Path
    """What workers and the tokenizer read."""
    tensors: TensorSource
    cached: CachedModel | None
    """None where all of the model is in a local folder."""


class NodeWeights:
    """Owner of this node's fetches, one at a time, and of what stages keep in the cache."""

    def __init__(
        self,
        model: HeldModel,
        cache: WeightCache,
        *,
        peers: Callable[[], Sequence[WeightPeer]],
        dial: Callable[[NodeId], Awaitable[BulkSocket]],
        is_busy: Callable[[], bool],
        on_progress: Callable[[int], None],
    ) -> None:
        """`on_progress` gets the bytes fetched so far in this process, whenever there are more."""
        self._model = model
        self._cache = cache
        self._peers = peers
        self._dial = dial
        self._is_busy = is_busy
        self._on_progress = on_progress
        self._one_at_a_time = asyncio.Lock()
        self._fetched_bytes = 0
        self._was_short = False
        self.progress: FetchProgress | None = None
        """Of the fetch that runs now."""
        self.room_bytes: int | None = None
        """What the cache may hold, as looked up last; None where the model's folder is here."""
        self.server = WeightServer(
            model_id=model.local.id,
            manifest=model.local.manifest,
            encoded=model.local.encoded,
            folder=model.folder,
            tensors=model.tensors,
            is_busy=is_busy,
        )

    @property
    def is_whole(self) -> bool:
        """Whether all of the model is in a local folder, so that nothing is ever fetched."""
        return self._model.cached is None

    @property
    def fetched_bytes(self) -> int:
        """Of tensors, since this process started."""
        return self._fetched_bytes

    async def run(self) -> None:
        """Keep looking up what the cache may hold now."""
        while not self.is_whole:
            self.room_bytes = await asyncio.to_thread(self._cache.room_bytes)
            await asyncio.sleep(_LOOK_UP_S)

    def bound_devices(self, devices: tuple[DeviceFacts, ...]) -> tuple[DeviceFacts, ...]:
        """The devices as plans may use them: once weights did not fit the cache, with no more memory than it has room.

        So the next plan gives this node less, or nothing, instead of failing in the same way again.
        """
        if not self._was_short or self.room_bytes is None:
            return devices
        room_bytes = max(1, self.room_bytes // max(1, len(devices)))
        return tuple(
            msgspec.structs.replace(
                facts,
                device=msgspec.structs.replace(
                    facts.device, budget_bytes=min(facts.device.budget_bytes, room_bytes)
                ),
            )
            for facts in devices
        )

    def models(self) -> list[CachedModelView]:
        """What the cache folder knows. Blocks."""
        return survey(self._cache)

    async def hold(self, stage: str, names: Iterable[str]) -> None:
        """Have the named tensors on the disk, and keep them there until `release`.

        Raises NotReady when the cache or the disk is too small, Lost when no node gives what lacks. What was fetched
        before a failure, a cancellation or a kill is not fetched again.
        """
        cached = self._model.cached
        if cached is None:
            return
        tensors = self._model.local.manifest.places(names)
        async with self._one_at_a_time:
            try:
                await _to_its_end(self._cache.reserve, stage, self._model.local.id, cached, tensors)
                await self._fetch(cached, tensors)
            except BaseException as error:
                self.release(stage)
                if isinstance(error, NotReady):
                    self.room_bytes, self._was_short = error.room_bytes, True
                raise
            finally:
                self.progress = None

    def release(self, stage: str) -> None:
        """The stage is gone: its tensors may be evicted when room is needed."""
        self._cache.release(stage)

    async def _fetch(self, cached: CachedModel, tensors: Sequence[int]) -> None:
        chunks = await _to_its_end(_prepare, cached, tensors)
        if not chunks:
            return
        before_bytes = self._fetched_bytes

        def note(progress: FetchProgress) -> None:
            self.progress = progress
            if before_bytes + progress.done_bytes > self._fetched_bytes:
                self._fetched_bytes = before_bytes + progress.done_bytes
                self._on_progress(self._fetched_bytes)

        fetch = WeightFetch(
            model_id=self._model.local.id,
            model=cached,
            chunks=chunks,
            peers=self._peers,
            dial=self._dial,
            on_progress=note,
            is_busy=self._is_busy,
        )
        await fetch.run()


async def _to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in a thread; a cancellation comes through after that, so that no thread changes files unseen."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        working.exception()
        raise


def _prepare(cached: CachedModel, tensors: Sequence[int]) -> dict[Chunk, int]:
    """What is to be fetched; tensors that lacked nothing but their name are finished."""
    chunks = cached.missing_chunks(tensors)
    lacking = {chunk.tensor for chunk in chunks}
    for tensor in tensors:
        if tensor not in lacking and cached.find(tensor) is None:
            cached.finish(tensor)
    return chunks
