"""The safetensors format, against the library that defines it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hexmesh.errors import InvalidInput
from hexmesh.weights.safetensors_format import (
    LENGTH_BYTES,
    TensorPlace,
    header_bytes,
    parse_header,
    single_tensor_header,
)


def places(data: bytes) -> dict[str, TensorPlace]:
    n_bytes = header_bytes(data[:LENGTH_BYTES], len(data))
    return parse_header(data[LENGTH_BYTES : LENGTH_BYTES + n_bytes], len(data))


def test_tensors_are_found_where_the_library_wrote_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.tensor([1.5], dtype=torch.bfloat16),
        "none": torch.zeros(0),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "m.safetensors").read_bytes()
    found = places(data)
    assert {name: (place.dtype, place.shape) for name, place in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (1,)),
        "none": ("F32", (0,)),
    }
    assert data[found["a"].start : found["a"].stop] == tensors["a"].numpy().tobytes()


def test_the_library_reads_a_file_of_one_tensor(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    header = single_tensor_header('odd "name"', "F32", (3, 2), 24)
    assert len(header) % 8 == 0
    (tmp_path / "one.safetensors").write_bytes(header + values.numpy().tobytes())
    (name, read), *others = load_file(tmp_path / "one.safetensors").items()
    assert (name, others) == ('odd "name"', [])
    assert torch.equal(read, values)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 8, (1000).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_header_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="no safetensors header"):
        header_bytes(data[:LENGTH_BYTES], len(data))


def test_a_tensor_outside_the_file_is_refused() -> None:
    whole = single_tensor_header("a", "F32", (4,), 16) + bytes(16)
    assert list(places(whole)) == ["a"]
    with pytest.raises(InvalidInput, match="cut short"):
        places(whole[:-1])


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}']
)
def test_a_header_of_nonsense_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_header(header, 1000)
