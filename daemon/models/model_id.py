"""The name that a model has everywhere in the mesh: SHA-256 over the contents of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daemon.models.model_source import ModelFolder
from hexmesh.ids import ModelId

_CACHE_NAME = "file_hashes.json"
_THREADS = 4

Stamp = tuple[int, int]
"""Size and mtime in ns: a file with the same stamp is taken to have the same content."""


def model_id(model: ModelFolder, cache_dir: Path) -> ModelId:
    """SHA-256 of the manifest: a line "digest  name" for each file, sorted by name.

    Digests are remembered in `cache_dir`, so that only new or changed files are read. Blocks.
    """
    digests = _digests(model.files, cache_dir / _CACHE_NAME)
    lines = sorted(f"{path.name}\0{digests[path]}\n" for path in model.files)
    return ModelId(hashlib.sha256("".join(lines).encode()).hexdigest())


def _digests(paths: Iterable[Path], cache_path: Path) -> dict[Path, str]:
    stamps = {path: _stamp(path) for path in paths}
    known = _read_cache(cache_path)
    fresh = [path for path, stamp in stamps.items() if known.get(_key(path), (None, ""))[0] != stamp]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = dict(zip(fresh, pool.map(_digest, fresh), strict=True))
    if hashed:
        _write_cache(cache_path, known | {_key(path): (stamps[path], hashed[path]) for path in fresh})
    return {path: hashed.get(path) or known[_key(path)][1] for path in stamps}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(path: Path) -> str:
    return str(path.resolve())


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_cache(path: Path) -> dict[str, tuple[Stamp, str]]:
    """What is remembered; nothing if the file is missing or not ours."""
    try:
        entries = json.loads(path.read_bytes())
        return {
            key: ((int(size), int(mtime_ns)), str(digest))
            for key, (size, mtime_ns, digest) in entries.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, known: dict[str, tuple[Stamp, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    alive = {key: [*stamp, digest] for key, (stamp, digest) in known.items() if os.path.exists(key)}
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(alive))
    partial.replace(path)
