"""The cache of fetched tensors: of several models, within a cap, least recently used ones going first."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from daemon.models.cached_model import CachedModel, disk_error, read_cached
from hexmesh.errors import NotReady
from hexmesh.units import show_bytes
from hexmesh.weights.eviction import CachedTensor, choose_evictions
from hexmesh.weights.manifest import Manifest

log = logging.getLogger("hexmesh.weights")

CACHE_NAME = "weights"
"""In the state folder, whose lock makes one daemon the only writer."""
DEFAULT_SHARE = 0.8
"""Without a cap of its own the cache may take so much of what is free and what it has already."""


class WeightCache:
    """Owner of the cache folder while the daemon runs. Methods block; call them in threads."""

    def __init__(self, folder: Path, cap_bytes: int | None = None) -> None:
        self.folder = folder
        self._cap_bytes = cap_bytes
        self._lock = threading.Lock()
        self._users: dict[str, tuple[str, frozenset[int]]] = {}

    def model(self, model_id: str, manifest: Manifest) -> CachedModel:
        """The model's place here, whether or not anything is in it."""
        return CachedModel(self.folder / model_id, manifest)

    def find(self, model_id: str) -> tuple[CachedModel, bytes] | None:
        """A model that is described here, with its encoded manifest."""
        return read_cached(self.folder / model_id, model_id)

    def models(self) -> dict[str, CachedModel]:
        """Every described model by id."""
        found = {}
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            known = read_cached(folder, folder.name)
            if known is not None:
                found[folder.name] = known[0]
        return found

    def room_bytes(self) -> int:
        """What tensors may take in all: the cap, or less where the disk has less."""
        available_bytes = self._free_bytes() + sum(
            file.disk_bytes for model in self.models().values() for file in model.files().values()
        )
        if self._cap_bytes is None:
            return int(available_bytes * DEFAULT_SHARE)
        return min(self._cap_bytes, available_bytes)

    def reserve(self, user: str, model_id: str, model: CachedModel, tensors: Iterable[int]) -> None:
        """Keep these tensors for `user` from now on, and make room for those that are not here.

        Raises NotReady naming the bytes when cap or disk are too small; then nothing is kept for the user.
        """
        wanted = frozenset(tensors)
        with self._lock:
            self._users[user] = (model_id, wanted)
            try:
                self._make_room(model, wanted)
            except BaseException:
                self.release(user)
                raise
            model.touch(wanted)

    def release(self, user: str) -> None:
        """The user needs its tensors no more. Does not block."""
        self._users.pop(user, None)

    def in_use(self) -> dict[str, set[int]]:
        """Tensors that somebody uses, by model."""
        used: dict[str, set[int]] = {}
        for model_id, tensors in list(self._users.values()):
            used.setdefault(model_id, set()).update(tensors)
        return used

    def _make_room(self, model: CachedModel, wanted: frozenset[int]) -> None:
        models = self.models()
        present = model.files() if model.folder.is_dir() else {}
        missing_bytes = sum(model.file_bytes(tensor) for tensor in wanted if tensor not in present)
        room_bytes = self.room_bytes()
        eviction = choose_evictions(self._cached(models), missing_bytes, room_bytes)
        if eviction.short_bytes:
            needed_bytes = missing_bytes + sum(
                tensor.n_bytes for tensor in self._cached(models) if tensor.is_in_use
            )
            raise NotReady(
                f"the stage's weights need {show_bytes(needed_bytes)} in the cache {self.folder}, in-use ones "
                f"included, and it has room for {show_bytes(room_bytes)}",
                code="weights_cache_full",
                next_step="raise --weights-cache, or free space on that disk",
                needed_bytes=needed_bytes,
                room_bytes=room_bytes,
            )
        for victim in eviction.victims:
            model_id, tensor = victim.key
            try:
                models[model_id].delete(tensor)
            except OSError as error:
                raise disk_error(self.folder, error) from error
        if eviction.victims:
            n_bytes = sum(victim.n_bytes for victim in eviction.victims)
            log.info("cache evicted tensors=%d bytes=%d", len(eviction.victims), n_bytes)

    def _cached(self, models: dict[str, CachedModel]) -> list[CachedTensor]:
        used = self.in_use()
        return [
            CachedTensor(
                key=(model_id, tensor),
                n_bytes=file.n_bytes,
                used_at_unix_s=file.used_at_unix_s,
                is_in_use=tensor in used.get(model_id, ()),
            )
            for model_id, model in models.items()
            for tensor, file in model.files().items()
        ]

    def _free_bytes(self) -> int:
        folder = self.folder
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def cache_of(state_dir: Path, cap_bytes: int | None = None) -> WeightCache:
    """The cache that belongs to a state folder."""
    return WeightCache(state_dir / CACHE_NAME, cap_bytes)
