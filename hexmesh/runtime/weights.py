"""Tensors of a model folder: which file holds which, and lazy slices of only those that a stage needs.

On the CPU, tensors that keep their dtype stay views of the memory-mapped file: they cost page cache, not
memory of the process, and two workers of a host share them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hexmesh.errors import InvalidInput

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a model folder.

    Raises InvalidInput where they are missing, cut short or corrupt.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._file_of = self._read_index() if (model_dir / _INDEX).is_file() else self._read_single()

    @property
    def keys(self) -> Collection[str]:
        """Names of all tensors."""
        return self._file_of.keys()

    def slices(self, keys: Iterable[str], files: ExitStack) -> dict[str, Any]:
        """Lazy slices of the named tensors.

        Only the files that hold them are opened, until `files` closes.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._file_of[key], []).append(key)
        slices: dict[str, Any] = {}
        for file, wanted in sorted(by_file.items()):
            try:
                handle = files.enter_context(safe_open(self._dir / file, framework="pt", device="cpu"))
                slices.update({key: handle.get_slice(key) for key in wanted})
            except (OSError, SafetensorError) as error:
                raise self._unreadable(file, error) from error
        return slices

    def check_files(self, keys: Iterable[str]) -> None:
        """Raise InvalidInput unless every file that holds one of `keys` opens and has it."""
        with ExitStack() as files:
            self.slices(keys, files)

    def _read_index(self) -> dict[str, str]:
        try:
            weight_map = json.loads((self._dir / _INDEX).read_bytes())["weight_map"]
            named = {str(key): str(file) for key, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise self._unreadable(_INDEX, error) from error
        for file in named.values():
            if Path(file).name != file:
                raise InvalidInput(f"{_INDEX} names {file!r}, which is not a file of the model's own folder")
        return named

    def _read_single(self) -> dict[str, str]:
        if not (self._dir / _SINGLE).is_file():
            raise InvalidInput(
                f"no {_SINGLE} and no {_INDEX} in {self._dir}",
                next_step="save the model's weights in the safetensors format",
            )
        try:
            with safe_open(self._dir / _SINGLE, framework="pt", device="cpu") as handle:
                return dict.fromkeys(handle.keys(), _SINGLE)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(_SINGLE, error) from error

    def _unreadable(self, file: str, error: Exception) -> InvalidInput:
        return InvalidInput(f"cannot read {self._dir / file}: {error}", code="bad_weights")
