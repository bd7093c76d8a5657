"""The mesh's model as this host has it: in a local folder, in the hub's cache, or fetched from peers piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from daemon.config import JoinOptions
from daemon.models.cached_model import About
from daemon.models.from_peers import describe_from_peers
from daemon.models.manifests import LocalManifest, local_manifest
from daemon.models.model_source import SHIPPED_NAME, ModelFolder, resolve_model
from daemon.models.node_weights import HeldModel
from daemon.models.tensor_files import FolderTensors, tensor_places
from daemon.models.weight_cache import WeightCache, cache_of
from daemon.peering.bulk import BulkSocket
from hexmesh.architectures import check_supported
from hexmesh.errors import HexmeshError, NotReady, Refused
from hexmesh.ids import short
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.units import show_bytes
from hexmesh.weights.manifest import manifest_id
from hexmesh.wire.peering import MemberAddress, ModelReference

log = logging.getLogger("hexmesh.weights")
progress = logging.getLogger("hexmesh.progress")

Dial = Callable[[MemberAddress], Awaitable[BulkSocket]]

_SAID_FROM_BYTES = 2**30
"""Hashing less than this takes a second or two."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The mesh's model with what of its files is here."""

    name: str
    files: ModelFolder
    spec: ModelSpec
    held: HeldModel

    @property
    def id(self) -> str:
        return self.held.local.id

    @property
    def reference(self) -> ModelReference:
        """How others are told of it."""
        return ModelReference(name=self.name, model_id=self.id, root=_root_of(self.files))


async def load_model(text: str | None, options: JoinOptions, *, is_local_only: bool = False) -> LocalModel:
    """Find the model's files and judge its architecture before anything else is done with it."""
    source = None if text in (None, SHIPPED_NAME) else text
    files = await asyncio.to_thread(
        resolve_model, source, progress=TenthsSaid("downloading the model"), is_local_only=is_local_only
    )
    spec = _judged(files)
    held = await asyncio.to_thread(_hold_folder, files, options)
    return LocalModel(options.served_name or files.name, files, spec, held)


async def find_model(
    options: JoinOptions, reference: ModelReference, members: Sequence[MemberAddress], dial: Dial
) -> LocalModel:
    """The mesh's model: where --model says, else where the founder has it, if that is here too, else from peers."""
    cache = cache_of(options.state_dir)
    if options.model is not None:
        model = await load_model(options.model, options)
        if model.id != reference.model_id:
            raise Refused(
                f"the model at {model.files.folder} ({short(model.id)}) is not the mesh's "
                f"{reference.name} ({short(reference.model_id)})",
                code="model_mismatch",
                next_step="give --model the folder that holds the mesh's model, or leave --model out",
            )
    else:
        local = await _look_at_root(options, reference, can_fetch=bool(members))
        model = local or await _from_cache_or_peers(reference, cache, members, dial)
    if model.held.cached is None:
        await asyncio.to_thread(_note_folder, cache, model)
    return replace(model, name=reference.name)


async def _look_at_root(
    options: JoinOptions, reference: ModelReference, *, can_fetch: bool
) -> LocalModel | None:
    """The founder's folder or hub id as this host sees it; None where it is not here, or something else is."""
    try:
        model = await load_model(reference.root, options, is_local_only=can_fetch)
    except (HexmeshError, OSError) as error:
        if not can_fetch and isinstance(
            error, NotReady
        ):  # a hub that cannot be reached, and nobody else to ask
            raise
        log.info("the model is not at %s on this host: %s", reference.root, error)
        return None
    if model.id != reference.model_id:
        progress.info(
            "%s on this host is not the mesh's model (%s, not %s): it is not used",
            reference.root,
            short(model.id),
            short(reference.model_id),
        )
        return None
    return model


async def _from_cache_or_peers(
    reference: ModelReference, cache: WeightCache, members: Sequence[MemberAddress], dial: Dial
) -> LocalModel:
    known = await asyncio.to_thread(cache.find, reference.model_id)
    if known is None or not await asyncio.to_thread(known[0].holds_files):
        await describe_from_peers(reference, cache, members, dial)
        known = await asyncio.to_thread(cache.find, reference.model_id)
        assert known is not None, "it was written a moment ago"
    cached, encoded = known
    files = await asyncio.to_thread(cached.read)
    local = LocalManifest(cached.manifest, encoded, manifest_id(encoded))
    held = HeldModel(local=local, folder=cached.folder, tensors=cached, cached=cached)
    return LocalModel(reference.name, files, _judged(files), held)


def _hold_folder(files: ModelFolder, options: JoinOptions) -> HeldModel:
    n_bytes = sum(path.stat().st_size for path in files.files)
    told = TenthsSaid("hashing the model") if n_bytes >= _SAID_FROM_BYTES else None
    local = local_manifest(files, options.state_dir, told)
    tensors = FolderTensors(tensor_places(files), local.manifest)
    return HeldModel(local=local, folder=files.folder, tensors=tensors, cached=None)


def _judged(files: ModelFolder) -> ModelSpec:
    check_supported(files.config)
    return model_spec_from_config(files.config, generation_config=files.generation_config)


def _note_folder(cache: WeightCache, model: LocalModel) -> None:
    """Write down where the model is, for `hexmesh model`."""
    about = About(name=model.name, folder=str(model.files.folder.resolve()))
    try:
        cache.model(model.id, model.held.local.manifest).describe(model.held.local.encoded, about, {})
    except HexmeshError as error:
        log.warning("the model's manifest is not noted reason=%s", error.message)


class TenthsSaid:
    """Logs how far something is, at each tenth; called from any thread."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._told_tenths = -1

    def __call__(self, n_done_bytes: int, n_total_bytes: int) -> None:
        tenths = 10 * n_done_bytes // max(1, n_total_bytes)
        if tenths > self._told_tenths:
            self._told_tenths = tenths
            progress.info("%s: %s of %s", self._what, show_bytes(n_done_bytes), show_bytes(n_total_bytes))


def _root_of(files: ModelFolder) -> str:
    """The model as other hosts should look for it: an absolute folder, or a name that means the same everywhere."""
    return (
        str(Path(files.root).expanduser().resolve()) if Path(files.root).expanduser().is_dir() else files.root
    )
