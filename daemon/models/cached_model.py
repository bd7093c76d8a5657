"""A model in the cache: a folder that reads like any model folder, with one file for each tensor that is here.

    manifest.msgpack, about.json, config.json, tokenizer files, model.safetensors.index.json
    000017.safetensors        a whole tensor, by its place in the manifest
    000018.safetensors.part   a tensor on its way: chunks at their places; which ones are good, their hashes tell

So nothing is lost by a kill at any moment: after it, partial files are hashed and fetching goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from daemon.models.manifests import hash_chunk
from daemon.models.model_source import WEIGHTS_INDEX, ModelFolder, read_folder
from daemon.models.tensor_files import TensorBytes
from hexmesh.errors import HexmeshError, InvalidInput, NotReady
from hexmesh.units import show_bytes
from hexmesh.weights.manifest import Chunk, Manifest, decode_manifest
from hexmesh.weights.safetensors_format import single_tensor_header

MANIFEST_FILE = "manifest.msgpack"
ABOUT_FILE = "about.json"
_PART = ".part"


class TensorFile(NamedTuple):
    """What the tensor's file takes when whole, what it takes on the disk now, and when it was used last."""

    n_bytes: int
    disk_bytes: int
    used_at_unix_s: float


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest does not say: the model's name, and the local folder that it was read from last, if any."""

    name: str
    folder: str | None


class CachedModel:
    """Owner of the model's folder in the cache. All methods block."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._headers: dict[int, bytes] = {}

    def describe(self, encoded: bytes, about: About, files: Mapping[str, bytes]) -> None:
        """Write everything but tensors. Raises HexmeshError when the disk does not take it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                _write_whole(self.folder / name, data)
            if files:
                shards = {
                    tensor.name: _file_name(place) for place, tensor in enumerate(self.manifest.tensors)
                }
                _write_whole(self.folder / WEIGHTS_INDEX, msgspec.json.encode({"weight_map": shards}))
            _write_whole(self.folder / ABOUT_FILE, msgspec.json.encode(about))
            _write_whole(self.folder / MANIFEST_FILE, encoded)
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def read(self) -> ModelFolder:
        """The model with config and tokenizer; which tensors are here changes. Raises InvalidInput."""
        about = read_about(self.folder)
        return read_folder(self.folder, about.name, about.name, is_with_weights=False)

    def holds_files(self) -> bool:
        """Whether config and tokenizer are here as the manifest has them."""
        for file in self.manifest.files:
            try:
                data = (self.folder / file.name).read_bytes()
            except OSError:
                return False
            if hashlib.sha256(data).digest() != file.digest:
                return False
        return (self.folder / WEIGHTS_INDEX).is_file()

    # --- tensors ---

    def tensor_file(self, tensor: int) -> Path:
        """Where the whole tensor is, or will be."""
        return self.folder / _file_name(tensor)

    def find(self, tensor: int) -> TensorBytes | None:
        """Where the whole tensor is; None while it is not."""
        path, header = self.tensor_file(tensor), self._header(tensor)
        try:
            is_whole = path.stat().st_size == len(header) + self.manifest.tensors[tensor].n_bytes
        except OSError:
            return None
        return TensorBytes(path, len(header)) if is_whole else None

    def file_bytes(self, tensor: int) -> int:
        """What the tensor's file takes."""
        return len(self._header(tensor)) + self.manifest.tensors[tensor].n_bytes

    def missing_chunks(self, tensors: Iterable[int]) -> dict[Chunk, int]:
        """What is not here of those tensors, with bytes. Chunks of partial files are read and hashed."""
        return {
            Chunk(tensor, index): self.manifest.chunk_bytes(Chunk(tensor, index))
            for tensor in tensors
            if self.find(tensor) is None
            for index in range(self.manifest.tensors[tensor].n_chunks)
            if not self._has_chunk(Chunk(tensor, index))
        }

    def write(self, chunk: Chunk, data: memoryview) -> None:
        """Put a checked chunk in its place in the partial file. Raises HexmeshError when the disk does not take it."""
        header = self._header(chunk.tensor)
        start, _ = self.manifest.tensors[chunk.tensor].chunk_range(chunk.part)
        try:
            handle = self._open_partial(chunk.tensor)
            try:
                n_done = 0
                while n_done < len(data):
                    n_done += os.pwrite(handle, data[n_done:], len(header) + start + n_done)
            finally:
                os.close(handle)
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def finish(self, tensor: int) -> None:
        """All chunks are in place: make the partial file the whole one, on the disk before it is called so."""
        try:
            handle = self._open_partial(tensor)
            try:
                os.fdatasync(handle)
            finally:
                os.close(handle)
            self._partial_file(tensor).replace(self.tensor_file(tensor))
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def is_sound(self, tensor: int) -> bool:
        """Whether the whole tensor's file holds what the manifest says: reads all of it."""
        found = self.find(tensor)
        if found is None:
            return False
        entry = self.manifest.tensors[tensor]
        with contextlib.suppress(OSError):
            if found.path.read_bytes()[: found.start] != self._header(tensor):
                return False
            return all(
                hash_chunk(found.path, found.start + start, stop - start) == entry.digest(index)
                for index in range(entry.n_chunks)
                for start, stop in [entry.chunk_range(index)]
            )
        return False

    def delete(self, tensor: int) -> None:
        """Remove the tensor, whole or partial; a process that has it mapped keeps its memory."""
        self.tensor_file(tensor).unlink(missing_ok=True)
        self._partial_file(tensor).unlink(missing_ok=True)

    def touch(self, tensors: Iterable[int]) -> None:
        """They are used now."""
        for tensor in tensors:
            with contextlib.suppress(OSError):
                os.utime(self.tensor_file(tensor))

    def files(self) -> dict[int, TensorFile]:
        """Every tensor's file that is here, whole or partial."""
        found = {}
        for path in self.folder.iterdir():
            stem = path.name.removesuffix(_PART).removesuffix(".safetensors")
            if stem.isdecimal() and int(stem) < len(self.manifest.tensors):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found[int(stem)] = TensorFile(status.st_size, status.st_blocks * 512, status.st_mtime)
        return found

    def _partial_file(self, tensor: int) -> Path:
        return self.folder / (_file_name(tensor) + _PART)

    def _header(self, tensor: int) -> bytes:
        if tensor not in self._headers:
            entry = self.manifest.tensors[tensor]
            self._headers[tensor] = single_tensor_header(entry.name, entry.dtype, entry.shape, entry.n_bytes)
        return self._headers[tensor]

    def _open_partial(self, tensor: int) -> int:
        handle = os.open(self._partial_file(tensor), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        header, n_bytes = self._header(tensor), self.file_bytes(tensor)
        if os.fstat(handle).st_size != n_bytes:
            try:
                os.ftruncate(handle, n_bytes)
                os.pwrite(handle, header, 0)
            except OSError:
                os.close(handle)
                raise
        return handle

    def _has_chunk(self, chunk: Chunk) -> bool:
        entry = self.manifest.tensors[chunk.tensor]
        start, stop = entry.chunk_range(chunk.part)
        try:
            path = self._partial_file(chunk.tensor)
            digest = hash_chunk(path, len(self._header(chunk.tensor)) + start, stop - start)
        except OSError:
            return False
        return digest == entry.digest(chunk.part)


def read_cached(folder: Path, model_id: str) -> tuple[CachedModel, bytes] | None:
    """The model in a folder of the cache with its encoded manifest; None where there is none, or a damaged one."""
    try:
        encoded = (folder / MANIFEST_FILE).read_bytes()
        return CachedModel(folder, decode_manifest(encoded, model_id)), encoded
    except (OSError, HexmeshError):
        return None


def read_about(folder: Path) -> About:
    """What was noted beside the manifest. Raises InvalidInput."""
    try:
        return msgspec.json.decode((folder / ABOUT_FILE).read_bytes(), type=About)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidInput(f"{folder / ABOUT_FILE} cannot be read: {error}") from error


def disk_error(folder: Path, error: OSError) -> NotReady:
    """A disk that does not take what it should, with the bytes that it has."""
    try:
        status = os.statvfs(folder if folder.exists() else folder.parent)
        free_bytes = status.f_bavail * status.f_frsize
    except OSError:
        free_bytes = 0
    return NotReady(
        f"the weights cache {folder} cannot be written: {error.strerror or error} "
        f"({show_bytes(free_bytes)} free there)",
        code="disk_full" if error.errno in (28, 122) else "cache_not_written",
        next_step="make room on that disk, or put the state folder on a larger one",
        room_bytes=free_bytes,
    )


def _file_name(tensor: int) -> str:
    return f"{tensor:06d}.safetensors"


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.unfinished")
    partial.write_bytes(data)
    partial.replace(path)
