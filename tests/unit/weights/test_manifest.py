"""Manifests: what they say of a model, what names it, and what of a stranger's bytes is not believed."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from hexmesh.errors import InvalidInput, Refused
from hexmesh.weights.manifest import (
    CHUNK_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    decode_manifest,
    encode_manifest,
    make_manifest,
    manifest_id,
)

CONFIG = FileEntry("config.json", 2, hashlib.sha256(b"{}").digest())


def tensor(name: str, n_bytes: int) -> TensorEntry:
    n_chunks = -(-n_bytes // CHUNK_BYTES)
    digests = b"".join(hashlib.sha256(f"{name}{chunk}".encode()).digest() for chunk in range(n_chunks))
    return TensorEntry(name, "F32", (n_bytes // 4,), n_bytes, digests)


def test_chunks_cover_a_tensor_once() -> None:
    large = tensor("large", 2 * CHUNK_BYTES + 12)
    ranges = [large.chunk_range(chunk) for chunk in range(large.n_chunks)]
    assert ranges == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 12),
    ]
    assert len({large.digest(chunk) for chunk in range(3)}) == 3
    assert (tensor("empty", 0).n_chunks, tensor("exact", CHUNK_BYTES).n_chunks) == (0, 1)


def test_the_order_in_which_tensors_are_found_does_not_matter() -> None:
    entries = [tensor("b", 8), tensor("a", 8), tensor("c", 0)]
    first = encode_manifest(make_manifest([CONFIG], entries))
    second = encode_manifest(make_manifest([CONFIG], entries[::-1]))
    assert first == second
    assert manifest_id(first) == hashlib.sha256(second).hexdigest()


def test_what_comes_back_is_what_was_encoded() -> None:
    manifest = make_manifest([CONFIG], [tensor("b", 8), tensor("a", CHUNK_BYTES + 1)])
    encoded = encode_manifest(manifest)
    assert decode_manifest(encoded, manifest_id(encoded)) == manifest
    assert manifest.weight_bytes == CHUNK_BYTES + 9
    assert manifest.places(["b", "a"]) == [0, 1]
    assert manifest.has(Chunk(0, 1))
    assert not any(manifest.has(chunk) for chunk in (Chunk(0, 2), Chunk(2, 0), Chunk(-1, 0), Chunk(0, -1)))
    with pytest.raises(InvalidInput, match="no tensor z"):
        manifest.places(["a", "z"])


def test_another_models_manifest_is_refused() -> None:
    encoded = encode_manifest(make_manifest([CONFIG], [tensor("a", 8)]))
    with pytest.raises(Refused, match="came for model"):
        decode_manifest(encoded, "00" * 32)


@pytest.mark.parametrize(
    "unsound",
    [
        Manifest(2, (CONFIG,), ()),
        Manifest(1, (msgspec.structs.replace(CONFIG, name="../config.json"),), ()),
        Manifest(1, (msgspec.structs.replace(CONFIG, name=".hidden"),), ()),
        Manifest(1, (msgspec.structs.replace(CONFIG, n_bytes=2**40),), ()),
        Manifest(1, (CONFIG, CONFIG), ()),
        Manifest(1, (), (tensor("b", 8), tensor("a", 8))),
        Manifest(1, (), (msgspec.structs.replace(tensor("a", 8), n_bytes=-1),)),
        Manifest(1, (), (msgspec.structs.replace(tensor("a", 8), n_bytes=CHUNK_BYTES + 1),)),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(unsound: Manifest) -> None:
    encoded = encode_manifest(unsound)
    with pytest.raises(InvalidInput, match="contradicts itself"):
        decode_manifest(encoded, manifest_id(encoded))


@pytest.mark.parametrize("nonsense", [b"", b"\x00", b"\x93\x01\x90", b"\xff" * 40])
def test_what_is_no_manifest_is_refused(nonsense: bytes) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        decode_manifest(nonsense, manifest_id(nonsense))
