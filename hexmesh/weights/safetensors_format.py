"""The safetensors format: [u64 header length, little-endian][JSON header][tensors' bytes]. Only bytes, no tensors."""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

from hexmesh.errors import InvalidInput

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts."""
_ALIGN_BYTES = 8
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file, in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def header_bytes(first: bytes, file_bytes: int) -> int:
    """Length of the JSON header from a file's first 8 bytes. Raises InvalidInput."""
    if len(first) == LENGTH_BYTES:
        n_bytes: int = _LENGTH.unpack(first)[0]
        if n_bytes <= min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
            return n_bytes
    raise InvalidInput("it has no safetensors header", code="bad_weights")


def parse_header(header: bytes, file_bytes: int) -> dict[str, TensorPlace]:
    """Every tensor of a file by name. Raises InvalidInput where one would lie outside the file."""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"its safetensors header cannot be read: {error}", code="bad_weights") from error
    base = LENGTH_BYTES + len(header)
    places = {
        name: TensorPlace(
            entry.dtype, entry.shape, base + entry.data_offsets[0], base + entry.data_offsets[1]
        )
        for name, entry in entries.items()
    }
    for name, place in places.items():
        if not base <= place.start <= place.stop <= file_bytes:
            raise InvalidInput(f"tensor {name} lies outside the file: it is cut short", code="bad_weights")
    return places


def single_tensor_header(name: str, dtype: str, shape: tuple[int, ...], n_bytes: int) -> bytes:
    """What comes before the bytes of a file that holds one tensor, aligned for memory mapping."""
    entry = {name: {"dtype": dtype, "shape": shape, "data_offsets": (0, n_bytes)}}
    header = msgspec.json.encode(entry)
    header += b" " * (-(LENGTH_BYTES + len(header)) % _ALIGN_BYTES)
    return _LENGTH.pack(len(header)) + header
