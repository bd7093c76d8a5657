"""What the cache folder holds, and whether it and the local model folder are what their manifests say."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

from daemon.models.cached_model import CachedModel, read_about, read_cached
from daemon.models.manifests import hash_chunk
from daemon.models.model_source import resolve_model
from daemon.models.tensor_files import tensor_places
from daemon.models.weight_cache import WeightCache
from daemon.views import CachedModelView, DamageView, VerifiedModelView
from hexmesh.errors import HexmeshError
from hexmesh.ids import short
from hexmesh.weights.manifest import Manifest

Count = Callable[[int], None]
"""Called with the bytes that were just checked."""

_LAYER = re.compile(r"\.(\d+)\.")
_FETCHED_AGAIN = "deleted: it is fetched again when it is needed"


def survey(cache: WeightCache) -> list[CachedModelView]:
    """Every model that the folder knows, by id. Blocks, for a moment."""
    in_use = cache.in_use()
    return [_view(model_id, model, bool(in_use.get(model_id))) for model_id, model in cache.models().items()]


def verify(cache: WeightCache, count: Count = lambda n_bytes: None) -> Iterator[VerifiedModelView]:
    """Hash all that is there, afresh, a model at a time. What is damaged in the cache is deleted. Blocks for long."""
    for folder in sorted(cache.folder.iterdir()) if cache.folder.is_dir() else ():
        known = read_cached(folder, folder.name)
        if known is None:
            yield _unreadable(folder)
        else:
            yield _verified(folder.name, known[0], count)


def _view(model_id: str, model: CachedModel, is_in_use: bool) -> CachedModelView:
    about, manifest = read_about(model.folder), model.manifest
    whole = {tensor for tensor in range(len(manifest.tensors)) if model.find(tensor) is not None}
    times = [file.used_at_unix_s for file in model.files().values()]
    return CachedModelView(
        id=model_id,
        name=about.name,
        folder=about.folder,
        weight_bytes=manifest.weight_bytes,
        cached_bytes=sum(manifest.tensors[tensor].n_bytes for tensor in whole),
        complete=about.folder is not None or len(whole) == len(manifest.tensors),
        layers=layers_of(manifest, whole),
        tensors=len(manifest.tensors),
        cached_tensors=len(whole),
        used_at_unix_s=max(times, default=None),
        in_use=is_in_use,
    )


def layers_of(manifest: Manifest, whole: Iterable[int]) -> list[tuple[int, int]]:
    """Layers [start, stop) whose tensors are all among `whole`; the first number in a tensor's name is its layer's."""
    present = set(whole)
    complete: dict[int, bool] = {}
    for place, tensor in enumerate(manifest.tensors):
        if (found := _LAYER.search(tensor.name)) is not None:
            layer = int(found.group(1))
            complete[layer] = complete.get(layer, True) and place in present
    layers = sorted(layer for layer, is_complete in complete.items() if is_complete)
    runs = [[at for _, at in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return [(run[0], run[-1] + 1) for run in runs]


def _verified(model_id: str, model: CachedModel, count: Count) -> VerifiedModelView:
    about = read_about(model.folder)
    damages = [*_cached_damages(model, count), *_description_damages(model)]
    if about.folder is not None:
        damages += _folder_damages(Path(about.folder), model.manifest, count)
    return VerifiedModelView(id=model_id, name=about.name, folder=about.folder, damages=damages)


def _cached_damages(model: CachedModel, count: Count) -> Iterator[DamageView]:
    for tensor, entry in enumerate(model.manifest.tensors):
        path = model.tensor_file(tensor)
        if path.exists():
            if not model.is_sound(tensor):
                model.delete(tensor)
                yield DamageView(path=str(path), tensor=entry.name, repair=_FETCHED_AGAIN)
            count(entry.n_bytes)


def _description_damages(model: CachedModel) -> Iterator[DamageView]:
    for file in model.manifest.files:
        path = model.folder / file.name
        if path.exists() and hashlib.sha256(path.read_bytes()).digest() != file.digest:
            path.unlink()
            yield DamageView(
                path=str(path), tensor=None, repair="deleted: it is fetched again at the next start"
            )


def _folder_damages(folder: Path, manifest: Manifest, count: Count) -> Iterator[DamageView]:
    """A folder is the user's own: nothing in it is deleted."""
    repair = "copy or download that file again"
    try:
        places = tensor_places(resolve_model(str(folder)))
    except (HexmeshError, OSError) as error:
        yield DamageView(path=str(folder), tensor=None, repair=f"{error}; copy or download the model again")
        return
    for file in manifest.files:
        path = folder / file.name
        if not path.is_file() or hash_chunk(path, 0, path.stat().st_size) != file.digest:
            yield DamageView(path=str(path), tensor=None, repair=repair)
    for tensor in manifest.tensors:
        path, place = places.get(tensor.name, (folder, None))
        is_sound = place is not None and all(
            hash_chunk(path, place.start + start, stop - start) == tensor.digest(index)
            for index in range(tensor.n_chunks)
            for start, stop in [tensor.chunk_range(index)]
            if place.start + stop <= place.stop
        )
        if not is_sound:
            yield DamageView(path=str(path), tensor=tensor.name, repair=repair)
        count(tensor.n_bytes)


def _unreadable(folder: Path) -> VerifiedModelView:
    damage = DamageView(
        path=str(folder),
        tensor=None,
        repair="its manifest is damaged or missing; the daemon gets it again when it starts, or delete the folder",
    )
    return VerifiedModelView(id=folder.name, name=short(folder.name), folder=None, damages=[damage])
