"""Where a model's files come from: the one that ships with hexmesh, a local folder, or the Hugging Face hub.

Nothing here runs code of the model or loads its tensors. All functions block: call them in a thread.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hexmesh
from daemon.models.hub import download
from hexmesh.errors import InvalidInput

SHIPPED_MODEL = Path(hexmesh.__file__).parent / "assets" / "model"
SHIPPED_NAME = "hexmesh-glossary"
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from any thread."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
WEIGHTS_INDEX = "model.safetensors.index.json"
_CONFIG_FILES = ("config.json", "generation_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONVERT = "convert it with transformers: from_pretrained(...).save_pretrained(FOLDER) writes safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model whose files are on this machine."""

    folder: Path
    name: str
    """What clients call it: the folder's or the hub id's last part."""
    root: str
    """The model as it was asked for."""
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    files: tuple[Path, ...]
    """config, tokenizer and safetensors files that make the model up."""


def resolve_model(
    text: str | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    is_local_only: bool = False,
) -> ModelFolder:
    """The model that `text` names: a folder, a hub id, or None for the one that ships with hexmesh.

    Hub files go to `cache_dir`, by default the hub library's own cache (HF_HOME); broken downloads resume.
    `is_local_only`: nothing is downloaded.
    Raises InvalidInput for what is no model or unknown, NotReady where the hub cannot be reached.
    """
    if text is None:
        return read_folder(SHIPPED_MODEL, SHIPPED_NAME, SHIPPED_NAME)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return read_folder(folder, folder.resolve().name, text)
    if folder.exists() or not _HUB_ID.fullmatch(text):
        raise InvalidInput(
            f"{text!r} is neither a model folder nor a hub id",
            code="unknown_model",
            next_step="give a folder with config.json and safetensors files, or a hub id such as org/name",
        )
    wanted = (*_CONFIG_FILES, *TOKENIZER_FILES, WEIGHTS_INDEX, "*.safetensors")
    folder = download(text, wanted, cache_dir, progress, is_local_only=is_local_only)
    return read_folder(folder, text.split("/")[1], text)


def read_folder(folder: Path, name: str, root: str, *, is_with_weights: bool = True) -> ModelFolder:
    """The model in a folder. Without weights: config and tokenizer alone. Raises InvalidInput for what is no model."""
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise InvalidInput(
            f"model {root!r} has no config.json",
            code="not_a_model",
            next_step="give the folder that transformers' save_pretrained wrote",
        )
    if not (folder / "tokenizer.json").is_file():
        raise InvalidInput(
            f"model {root!r} has no tokenizer.json",
            code="no_tokenizer",
            next_step="write one: transformers' AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
        )
    generation_path = folder / "generation_config.json"
    small = (folder / file for file in (*_CONFIG_FILES, *TOKENIZER_FILES))
    return ModelFolder(
        folder=folder,
        name=name,
        root=root,
        config=_read_object(config_path),
        generation_config=_read_object(generation_path) if generation_path.is_file() else None,
        files=(
            *(path for path in small if path.is_file()),
            *(_weight_files(folder, root) if is_with_weights else ()),
        ),
    )


def _weight_files(folder: Path, root: str) -> list[Path]:
    """The safetensors files, by name: those of the index if there is one, else all."""
    index_path = folder / WEIGHTS_INDEX
    if index_path.is_file():
        shards = _read_object(index_path).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_file_name(shard) for shard in shards.values()):
            raise InvalidInput(f"{index_path} has no weight_map of file names", code="not_a_model")
        paths = [folder / shard for shard in sorted(set(shards.values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise InvalidInput(
                f"model {root!r} lacks {len(missing)} of {len(paths)} weight files: {missing[0]} ...",
                code="not_a_model",
                next_step="copy or download the missing files",
            )
        return [index_path, *paths]
    paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return paths
    old = next(
        (path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))), None
    )
    raise InvalidInput(
        f"model {root!r} has no safetensors files" + (f", only {old}" if old else ""),
        code="no_safetensors",
        next_step=_CONVERT,
    )


def _is_file_name(text: object) -> bool:
    return isinstance(text, str) and text == os.path.basename(text) and text.endswith(".safetensors")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}", code="not_a_model") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} is not a JSON object", code="not_a_model")
    return value
