"""What a plan is made from, as it is named on a command line: a cluster file, a model, a workload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from hexmesh.errors import InvalidInput
from hexmesh.fleet import Fleet, cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.model_spec.known import known_config, unknown_model
from hexmesh.plan import DtypeName
from hexmesh.workload import CLASSES, Workload, named_workload, read_trace, read_workload

MAX_FILE_BYTES = 256 * 2**20
_TRACES = (".csv", ".jsonl")
_DTYPES = cast(tuple[DtypeName, ...], get_args(DtypeName))
_DTYPE_ORDER: tuple[DtypeName, ...] = ("bfloat16", "float16", "float32")
"""What is computed in where neither the user nor the model says; the first that all devices can."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model to plan for."""

    name: str
    spec: ModelSpec
    dtype: DtypeName | None
    """The one that its config names."""


def load_fleet(path: str) -> Fleet:
    """The fleet of a cluster file. Raises InvalidInput."""
    return read_fleet(_text(path, "cluster file"), path)


def load_workload(text: str) -> Workload:
    """A class such as "HPLD@4/s", a workload file, or a trace. Raises InvalidInput."""
    if text.partition("@")[0] in CLASSES or not ("/" in text or "." in text):
        return named_workload(text)
    if text.endswith(_TRACES):
        trace = read_trace(_text(text, "trace"), text)
        return Workload.of(trace.lengths, trace.arrivals)
    return read_workload(_text(text, "workload file"), text)


def load_model(text: str) -> NamedModel:
    """A folder, a config.json, a known name or a hub id, of which only the config is fetched.

    Raises InvalidInput for what is no model or cannot be planned for, NotReady where the hub cannot be reached.
    """
    config = known_config(text)
    if config is None:
        path = _config_path(text)
        config = _object(_text(str(path), "model config"), str(path))
    try:
        spec = model_spec_from_config(config)
    except InvalidInput as error:
        raise InvalidInput(
            f"model {text}: {error.message}", code=error.code, next_step=error.next_step
        ) from None
    return NamedModel(_name(text), spec, _dtype(config))


def chosen_dtype(fleet: Fleet, model: NamedModel, asked: str | None) -> DtypeName:
    """The one that was asked for, else the model's, else the first that every device computes in."""
    if asked is not None:
        return _checked_dtype(asked)
    if model.dtype is not None:
        return model.dtype
    for dtype in _DTYPE_ORDER:
        try:
            cluster_of(fleet, dtype)
        except InvalidInput:
            continue
        return dtype
    raise InvalidInput("no dtype is one that all devices compute in", next_step="say which: --dtype")


def _checked_dtype(text: str) -> DtypeName:
    for dtype in _DTYPES:
        if dtype == text:
            return dtype
    raise InvalidInput(f"no dtype is called {text!r}", next_step=f"choose one of {', '.join(_DTYPES)}")


def _config_path(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "config.json").is_file():
            return path / "config.json"
        raise InvalidInput(f"{text} has no config.json", next_step="name a model's folder or its config.json")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise unknown_model(text)

    from daemon.models.hub import download

    return download(text, ("config.json",), None, None) / "config.json"


def _name(text: str) -> str:
    path = Path(text)
    return path.resolve().parent.name if path.name == "config.json" else path.name


def _dtype(config: Mapping[str, Any]) -> DtypeName | None:
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return next((dtype for dtype in _DTYPES if dtype == said), None)


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}", next_step="name a model's config.json") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{where} is not a JSON object", next_step="name a model's config.json")
    return value


def _text(path: str, what: str) -> str:
    return read_bytes(path, what).decode("utf-8", errors="replace")


def read_bytes(path: str, what: str) -> bytes:
    """A file that the user named. Raises InvalidInput where it cannot be read, or is too large to be meant."""
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInput(
                f"{what} {path} is over {MAX_FILE_BYTES >> 20} MiB", next_step="check the path"
            )
        return file.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidInput(f"{what} {path} cannot be read: {reason}", next_step="check the path") from None
