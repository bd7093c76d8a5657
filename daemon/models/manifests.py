"""Makes the manifest of a local model folder: reads and hashes every file once, and remembers what it found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import msgspec

from daemon.models.model_source import WEIGHTS_INDEX, ModelFolder, Progress
from daemon.models.tensor_files import read_range, tensor_places
from hexmesh.ids import ModelId
from hexmesh.weights.manifest import (
    CHUNK_BYTES,
    FileEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
    make_manifest,
    manifest_id,
)
from hexmesh.weights.safetensors_format import TensorPlace

HASHES_NAME = "file_hashes.msgpack"
_THREADS = 4


class _Hashed(msgspec.Struct, frozen=True, array_like=True):
    """A file's digests, and the size and mtime at which they were right: the same stamp means the same content."""

    n_bytes: int
    mtime_ns: int
    digest: bytes = b""
    """Of a config or tokenizer file."""
    tensors: dict[str, bytes] = {}
    """Of a safetensors file: every tensor's chunk digests."""


@dataclass(frozen=True, slots=True)
class LocalManifest:
    """A manifest with its encoding and its hash, the model's id."""

    manifest: Manifest
    encoded: bytes
    id: ModelId


def local_manifest(model: ModelFolder, cache_dir: Path, progress: Progress | None = None) -> LocalManifest:
    """The manifest of a model folder. Blocks while it reads the files that are new or changed since last time."""
    places = tensor_places(model)
    paths = [path for path in model.files if path.name != WEIGHTS_INDEX]
    known = _read_known(cache_dir / HASHES_NAME)
    stamped = {path: _stamp(path) for path in paths}
    fresh = [path for path in paths if not _is_same(known.get(_key(path)), stamped[path])]
    if fresh:
        hashed = _hash(fresh, places, stamped, _Counter(fresh, progress))
        known |= {_key(path): entry for path, entry in hashed.items()}
        _write_known(cache_dir / HASHES_NAME, known)
    files = [
        FileEntry(path.name, stamped[path].n_bytes, known[_key(path)].digest)
        for path in paths
        if path.suffix != ".safetensors"
    ]
    tensors = [
        TensorEntry(name, place.dtype, place.shape, place.stop - place.start, known[_key(path)].tensors[name])
        for name, (path, place) in places.items()
    ]
    manifest = make_manifest(files, tensors)
    encoded = encode_manifest(manifest)
    return LocalManifest(manifest, encoded, manifest_id(encoded))


def hash_chunk(path: Path, start: int, n_bytes: int) -> bytes:
    """SHA-256 of a part of a file."""
    buffer = memoryview(bytearray(n_bytes))
    read_range(path, start, buffer)
    return hashlib.sha256(buffer).digest()


class _Counter:
    """Tells a progress callback how much is hashed; called from several threads."""

    def __init__(self, paths: list[Path], progress: Progress | None) -> None:
        self._total_bytes = sum(path.stat().st_size for path in paths)
        self._progress = progress
        self._done_bytes = 0
        self._lock = Lock()

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._done_bytes += n_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


def _hash(
    paths: list[Path],
    places: Mapping[str, tuple[Path, TensorPlace]],
    stamped: Mapping[Path, _Hashed],
    counter: _Counter,
) -> dict[Path, _Hashed]:
    """New entries for those files. Tensors are hashed side by side, so that one large file takes several cores."""
    tensors = [(path, name, place) for name, (path, place) in places.items() if path in paths]

    def hash_tensor(one: tuple[Path, str, TensorPlace]) -> bytes:
        path, _, place = one
        digests = []
        for start in range(place.start, place.stop, CHUNK_BYTES):
            n_bytes = min(CHUNK_BYTES, place.stop - start)
            digests.append(hash_chunk(path, start, n_bytes))
            counter.add(n_bytes)
        return b"".join(digests)

    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(hash_tensor, tensors))
    found: dict[Path, dict[str, bytes]] = {}
    for (path, name, _), tensor_digests in zip(tensors, digests, strict=True):
        found.setdefault(path, {})[name] = tensor_digests
    return {
        path: msgspec.structs.replace(stamped[path], tensors=found.get(path, {}))
        if path.suffix == ".safetensors"
        else msgspec.structs.replace(stamped[path], digest=hash_chunk(path, 0, stamped[path].n_bytes))
        for path in paths
    }


def _key(path: Path) -> str:
    return str(path.resolve())


def _stamp(path: Path) -> _Hashed:
    status = path.stat()
    return _Hashed(status.st_size, status.st_mtime_ns)


def _is_same(known: _Hashed | None, now: _Hashed) -> bool:
    return known is not None and (known.n_bytes, known.mtime_ns) == (now.n_bytes, now.mtime_ns)


def _read_known(path: Path) -> dict[str, _Hashed]:
    """What is remembered; nothing if the file is missing or not ours."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=dict[str, _Hashed])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}


def _write_known(path: Path, known: Mapping[str, _Hashed]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    alive = {key: entry for key, entry in known.items() if os.path.exists(key)}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(msgspec.msgpack.encode(alive))
    partial.replace(path)
