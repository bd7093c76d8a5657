"""Where the tensors of a local model folder lie, and reading parts of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from daemon.models.model_source import WEIGHTS_INDEX, ModelFolder
from hexmesh.errors import InvalidInput
from hexmesh.weights.manifest import Manifest
from hexmesh.weights.safetensors_format import LENGTH_BYTES, TensorPlace, header_bytes, parse_header


class TensorBytes(NamedTuple):
    """A tensor's bytes in a file."""

    path: Path
    start: int


class TensorSource(Protocol):
    """Something on this machine that tensors can be read from; `tensor` is a place in the manifest."""

    def find(self, tensor: int) -> TensorBytes | None:
        """Where the whole tensor is, if it is here."""


class FolderTensors:
    """All tensors of a local model folder."""

    def __init__(self, places: Mapping[str, tuple[Path, TensorPlace]], manifest: Manifest) -> None:
        self._bytes = [
            TensorBytes(path, place.start)
            for tensor in manifest.tensors
            for path, place in [places[tensor.name]]
        ]

    def find(self, tensor: int) -> TensorBytes | None:
        return self._bytes[tensor]


def tensor_places(model: ModelFolder) -> dict[str, tuple[Path, TensorPlace]]:
    """Every tensor of the model by name: its file and where it lies in it. Blocks. Raises InvalidInput."""
    shards = [path for path in model.files if path.suffix == ".safetensors"]
    found = {path.name: read_header(path) for path in shards}
    index_path = model.folder / WEIGHTS_INDEX
    if index_path in model.files:
        named: dict[str, str] = json.loads(index_path.read_bytes())["weight_map"]
    else:
        named = {name: path.name for path in shards for name in found[path.name]}
    places = {}
    for name, file in named.items():
        if name not in found[file]:
            raise InvalidInput(
                f"{model.folder / file} lacks tensor {name}, which {WEIGHTS_INDEX} says it has",
                code="bad_weights",
                next_step="copy or download the model again",
            )
        places[name] = (model.folder / file, found[file][name])
    return places


def read_header(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name. Raises InvalidInput naming a file that is cut short or none."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            n_bytes = header_bytes(file.read(LENGTH_BYTES), file_bytes)
            return parse_header(file.read(n_bytes), file_bytes)
    except InvalidInput as error:
        raise InvalidInput(
            f"{path} is damaged: {error.message}",
            code="bad_weights",
            next_step="copy or download that file again",
        ) from error


def read_range(path: Path, start: int, buffer: memoryview) -> None:
    """Fill the buffer from a file. Raises OSError, also where the file ends before."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        n_done = 0
        while n_done < len(buffer):
            n_bytes = os.preadv(handle, [buffer[n_done:]], start + n_done)
            if n_bytes == 0:
                raise OSError(f"{path} ends at {start + n_done} bytes")
            n_done += n_bytes
    finally:
        os.close(handle)
