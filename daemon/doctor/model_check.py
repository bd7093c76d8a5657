"""Is the model here, whole, supported, the mesh's own, and does a device hold at least a layer of it?

Nothing is downloaded: a hub id is looked for in the hub library's cache alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from daemon.compute.devices import DeviceSpec, choose_devices
from daemon.compute.inventory import Inventory
from daemon.config import JoinOptions
from daemon.doctor.finding import Finding, failed, not_run, passed, warned
from daemon.doctor.state_check import Stored, existing_parent
from daemon.models.inspection import survey
from daemon.models.manifests import HASHES_NAME, local_manifest
from daemon.models.model_source import SHIPPED_NAME, ModelFolder, resolve_model
from daemon.models.weight_cache import cache_of
from hexmesh.architectures import check_supported
from hexmesh.cost import STEP_TOKENS, CostModel, StepLimits, default_dtype
from hexmesh.errors import HexmeshError
from hexmesh.ids import short
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import DtypeName
from hexmesh.schedule.misfit import least_layer_bytes
from hexmesh.units import show_bytes
from hexmesh.wire.peering import ModelReference
from hexmesh.workload import Workload

_COMPARED_BYTES = 2**30
"""Larger models are not read for their id here: join does that, and remembers the digests."""
_BLOCK_TOKENS = 16
_CACHE_ROOM_BYTES = 2 * 2**30
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model whose files are here and whose type is supported."""

    files: ModelFolder
    spec: ModelSpec


class NotDownloaded(Exception):
    """The model is a hub id that the cache does not hold."""


def check_model(options: JoinOptions, stored: Stored) -> tuple[FoundModel | None, Finding]:
    """The model that join would take: --model, else the mesh's, else the one that ships with hexmesh."""
    check, reference = "model", stored.membership.model if stored.membership is not None else None
    text = options.model or (reference.root if reference is not None else None)
    if text is None and not options.founds:
        return None, not_run(check, "the mesh to be joined tells which model", "")
    try:
        files = _find(text)
        check_supported(files.config)
        spec = model_spec_from_config(files.config, generation_config=files.generation_config)
    except NotDownloaded:
        if options.model is None and reference is not None:
            return _from_peers(options, reference)
        return None, warned(check, f"{text} is not in the hub's cache", "join downloads it, or give a folder")
    except HexmeshError as error:
        if options.model is None and reference is not None:
            return _from_peers(options, reference)
        return None, failed(check, error.message, error.next_step or "give another with --model")
    except OSError as error:
        return None, failed(check, f"{text} cannot be read: {error.strerror}", "correct its owner or mode")
    found = FoundModel(files, spec)
    if (broken := _broken_weights(files)) is not None:
        return None, failed(check, broken, "copy or download that file again")
    if reference is None:
        return found, passed(check, f"{files.name} in {files.folder}, {spec.n_layers} layers, complete")
    n_bytes = sum(path.stat().st_size for path in files.files)
    if n_bytes > _COMPARED_BYTES:
        size = show_bytes(n_bytes)
        return found, passed(
            check, f"{files.name} is complete; join compares its {size} with the mesh's model"
        )
    own = _id_of(files, options.state_dir)
    if own != reference.model_id:
        return found, failed(
            check,
            f"the model at {files.folder} ({short(own)}) is not the mesh's {reference.name} "
            f"({short(reference.model_id)})",
            "give --model the folder that holds the mesh's model",
        )
    return found, passed(check, f"{reference.name} in {files.folder}, the mesh's own, complete")


def _from_peers(options: JoinOptions, reference: ModelReference) -> tuple[FoundModel | None, Finding]:
    """The mesh's model is not in a folder here: what the cache has of it."""
    known = cache_of(options.state_dir).find(reference.model_id)
    if known is None or not known[0].holds_files():
        said = f"{reference.name} is not on this host; join fetches what it needs from other nodes"
        return None, passed("model", said)
    files = known[0].read()
    (view,) = [view for view in survey(cache_of(options.state_dir)) if view.id == reference.model_id]
    shown = f"{show_bytes(view.cached_bytes)} of {show_bytes(view.weight_bytes)}"
    spec = model_spec_from_config(files.config, generation_config=files.generation_config)
    return FoundModel(files, spec), passed("model", f"{reference.name}, {shown} fetched from other nodes")


def check_memory(
    options: JoinOptions, stored: Stored, inventory: Inventory, model: FoundModel | None
) -> Finding:
    """Whether --device names what is here and a device's budget holds one layer and one sequence."""
    check = "memory"
    try:
        devices = choose_devices(
            ",".join(options.device), inventory, threads=options.threads, memory_bytes=options.memory_bytes
        )
    except HexmeshError as error:
        return failed(check, error.message, error.next_step)
    if model is None:
        return not_run(check, "the model is not known, so its need is not either")
    costs = planners_costs(model.spec, _dtype(options, stored, devices))
    floor_tokens = costs.limits.context_tokens
    needs = {device: least_layer_bytes(costs, floor_tokens, device.kind) for device in devices}
    said = ", ".join(
        f"{device.torch_name} gives {show_bytes(device.budget_bytes)} "
        f"and a layer of {model.files.name} needs {show_bytes(needs[device])}"
        for device in devices
    )
    if all(device.budget_bytes < need for device, need in needs.items()):
        return failed(
            check,
            f"too little memory for even one layer: {said}",
            "give more with --memory, free memory on this host, or take a smaller model or dtype",
        )
    too_much = [device for device in devices if device.budget_bytes > _free_bytes(device, inventory)]
    if too_much and options.memory_bytes is not None:
        free = show_bytes(_free_bytes(too_much[0], inventory))
        return warned(
            check,
            f"--memory {show_bytes(options.memory_bytes)} is more than {too_much[0].torch_name} has free, {free}",
            "give less with --memory, unless this host's daemon is what uses it",
        )
    return passed(check, said)


def check_cache(options: JoinOptions, model: FoundModel | None, free_bytes: Callable[[Path], int]) -> Finding:
    """Room for a download, where the model is one that is not here yet."""
    check = "model cache"
    if model is not None or options.model is None or not _is_hub_id(options.model):
        return not_run(check, "nothing has to be downloaded")
    folder = _hub_cache()
    n_free = free_bytes(existing_parent(folder))
    said = f"{show_bytes(n_free)} are free in {folder}; how much {options.model} needs is not known here"
    if n_free < _CACHE_ROOM_BYTES:
        return failed(check, said, "make room, point HF_HOME to a larger disk, or give a folder")
    return passed(check, said)


def planners_costs(spec: ModelSpec, dtype: DtypeName) -> CostModel:
    """Costs as the planner counts them for the default workload; context_tokens is one sequence's must."""
    workload = Workload()
    most = spec.max_position_tokens
    n_sequences = workload.max_concurrent_sequences
    limits = StepLimits(
        step_tokens=min(STEP_TOKENS, n_sequences * most),
        logits_rows=n_sequences,
        context_tokens=min(most, workload.prompt_tokens + workload.output_tokens),
    )
    return CostModel(spec, dtype, _BLOCK_TOKENS, limits)


def _find(text: str | None) -> ModelFolder:
    if text is None or text == SHIPPED_NAME:
        return resolve_model()
    if not _is_hub_id(text):
        return resolve_model(text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return resolve_model(snapshot_download(text, local_files_only=True))
    except LocalEntryNotFoundError:
        raise NotDownloaded from None


def _is_hub_id(text: str) -> bool:
    return not Path(text).expanduser().exists() and _HUB_ID.fullmatch(text) is not None


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _broken_weights(files: ModelFolder) -> str | None:
    """The first safetensors file that is shorter or longer than its own header says; None where all hold."""
    for path in files.files:
        if path.suffix != ".safetensors":
            continue
        try:
            wanted_bytes = _safetensors_bytes(path)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error):
            return f"{path} is damaged: it has no safetensors header"
        if wanted_bytes != path.stat().st_size:
            return f"{path} is incomplete: {path.stat().st_size} bytes, and its header says {wanted_bytes}"
    return None


def _safetensors_bytes(path: Path) -> int:
    with path.open("rb") as file:
        (n_header,) = struct.unpack("<Q", file.read(8))
        if n_header > os.fstat(file.fileno()).st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(file.read(n_header))
    stops: Iterable[int] = (
        int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"
    )
    return 8 + int(n_header) + max(stops, default=0)


def _id_of(files: ModelFolder, state_dir: Path) -> str:
    """The model's id, with the digests that the state folder remembers; that folder is not written to."""
    with tempfile.TemporaryDirectory(prefix="hexmesh-doctor-") as scratch:
        if os.access(state_dir / HASHES_NAME, os.R_OK):
            shutil.copy(state_dir / HASHES_NAME, scratch)
        return local_manifest(files, Path(scratch)).id


def _dtype(options: JoinOptions, stored: Stored, devices: Iterable[DeviceSpec]) -> DtypeName:
    if stored.membership is not None:
        return cast(DtypeName, stored.membership.dtype)
    return options.dtype or default_dtype(device.kind for device in devices)


def _free_bytes(device: DeviceSpec, inventory: Inventory) -> int:
    if device.kind == "cpu":
        return inventory.available_bytes
    return inventory.gpu(int(device.torch_name.partition(":")[2])).free_bytes
