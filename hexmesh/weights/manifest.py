"""A model's manifest: its files and tensors, down to the SHA-256 of every chunk. Its own hash is the model's id.

Tensors stand in it by name, not by file, so that the id does not depend on how the checkpoint was cut into files.
Chunks are what peers send each other: each is checked by itself, wherever it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from hexmesh.errors import InvalidInput, Refused
from hexmesh.ids import ModelId, short

CHUNK_BYTES = 4 * 1024 * 1024
"""Part of the id's definition: another value would give every model another id."""
MAX_FILE_BYTES = 64 * 1024 * 1024
"""Of config and tokenizer files; the largest tokenizers have some 35 MB."""
DIGEST_BYTES = 32


class FileEntry(msgspec.Struct, frozen=True, array_like=True):
    """A config or tokenizer file."""

    name: str
    n_bytes: int
    digest: bytes


class TensorEntry(msgspec.Struct, frozen=True, array_like=True):
    """A tensor. `digests` are the SHA-256 of its chunks, one after the other."""

    name: str
    dtype: str
    """As safetensors names it, such as "BF16"."""
    shape: tuple[int, ...]
    n_bytes: int
    digests: bytes

    @property
    def n_chunks(self) -> int:
        return -(-self.n_bytes // CHUNK_BYTES)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """(start, stop) of a chunk in the tensor's bytes."""
        start = index * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self.n_bytes)

    def digest(self, index: int) -> bytes:
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


class Chunk(NamedTuple):
    """A piece of a tensor, by the tensor's place in the manifest."""

    tensor: int
    part: int


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """Files and tensors, each sorted by name."""

    version: int
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    def chunk_bytes(self, chunk: Chunk) -> int:
        start, stop = self.tensors[chunk.tensor].chunk_range(chunk.part)
        return stop - start

    def is_genuine(self, chunk: Chunk, digest: bytes) -> bool:
        """Whether bytes with that digest are the chunk's."""
        return self.tensors[chunk.tensor].digest(chunk.part) == digest

    def has(self, chunk: Chunk) -> bool:
        """Whether there is such a chunk at all."""
        return 0 <= chunk.tensor < len(self.tensors) and 0 <= chunk.part < self.tensors[chunk.tensor].n_chunks

    def places(self, names: Iterable[str]) -> list[int]:
        """Places of the named tensors. Raises InvalidInput for a name that is none."""
        index = {tensor.name: place for place, tensor in enumerate(self.tensors)}
        try:
            return sorted(index[name] for name in names)
        except KeyError as error:
            raise InvalidInput(f"the model has no tensor {error.args[0]}", code="bad_weights") from None


def make_manifest(files: Sequence[FileEntry], tensors: Sequence[TensorEntry]) -> Manifest:
    """The manifest of a whole model."""
    return Manifest(
        version=1,
        files=tuple(sorted(files, key=lambda file: file.name)),
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)),
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes that the model's id is the hash of."""
    return msgspec.msgpack.encode(manifest)


def manifest_id(encoded: bytes) -> ModelId:
    """The model's id."""
    return ModelId(hashlib.sha256(encoded).hexdigest())


def decode_manifest(encoded: bytes, model_id: str) -> Manifest:
    """The manifest of exactly that model. Raises Refused for another's, InvalidInput for nonsense."""
    if (found := manifest_id(encoded)) != model_id:
        raise Refused(
            f"a manifest of model {short(found)} came for model {short(model_id)}", code="wrong_manifest"
        )
    try:
        manifest = msgspec.msgpack.decode(encoded, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the manifest cannot be read: {error}", code="bad_manifest") from error
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    names = [file.name for file in manifest.files]
    tensors = [tensor.name for tensor in manifest.tensors]
    is_sound = (
        manifest.version == 1
        and names == sorted(set(names))
        and tensors == sorted(set(tensors))
        and all(_is_plain(name) for name in names)
        and all(0 <= file.n_bytes <= MAX_FILE_BYTES for file in manifest.files)
        and all(
            tensor.n_bytes >= 0 and len(tensor.digests) == tensor.n_chunks * DIGEST_BYTES
            for tensor in manifest.tensors
        )
    )
    if not is_sound:
        raise InvalidInput("the manifest contradicts itself", code="bad_manifest")


def _is_plain(name: str) -> bool:
    """A file name that stays in its folder and hides nothing."""
    return (
        bool(name)
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
        and name.isprintable()
    )
