"""TOML that people write, read into structs: errors name the file, the line, the key and what is allowed there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from hexmesh.errors import HexmeshError, InvalidInput
from hexmesh.units import parse_bytes, parse_duration_s, parse_flops, parse_rate

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Keys and positions from the top of a file, such as ("host", 1, "nic")."""

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_TOML_LINE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


class Bytes(float):
    """A size: "24GiB", or bytes."""


class BytesPerS(float):
    """A rate: "10Gbit/s", "300GB/s", or bytes per second."""


class FlopsPerS(float):
    """A compute rate: "71T", "71 TFLOP/s", or FLOP/s."""


class Seconds(float):
    """A duration: "40ms", or seconds."""


_PARSERS: dict[type, Callable[[str], float]] = {
    Bytes: parse_bytes,
    BytesPerS: parse_rate,
    FlopsPerS: parse_flops,
    Seconds: parse_duration_s,
}


_WANTED: dict[type, str] = {
    Bytes: "a size such as 24GiB",
    BytesPerS: "a rate such as 10Gbit/s or 300GB/s",
    FlopsPerS: "a compute rate such as 71T",
    Seconds: "a duration such as 40ms",
}


def read_toml(text: str, kind: type[T], where: str) -> T:
    """The struct that a file's text describes; `where` is the file's name. Raises InvalidInput."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _TOML_LINE.search(str(error))
        line = found.group(1) if found and found.group(1) else str(text.count("\n") + 1)
        message = _TOML_LINE.sub("", str(error))
        raise InvalidInput(f"{where}:{line}: not TOML: {message}", next_step="correct that line") from error
    try:
        return msgspec.convert(tables, kind, dec_hook=_quantity)
    except msgspec.ValidationError as error:
        raise _explained(str(error), text, kind, where) from error


def fault(text: str, where: str, path: Path, message: str, next_step: str = "") -> InvalidInput:
    """An error about one place of a file, for what only its reader can check."""
    shown = _shown(path)
    return InvalidInput(
        f"{where}:{line_of(text, path)}: {shown + ': ' if shown else ''}{message}",
        next_step=next_step,
    )


def line_of(text: str, path: Path) -> int:
    """The line of a key: of its own assignment where it can be told, else of its table's header."""
    lines = text.splitlines()
    table = str(path[0]) if path else ""
    nth = path[1] if len(path) > 1 and isinstance(path[1], int) else 0
    headers = [at for at, line in enumerate(lines) if re.match(rf"\s*\[+\s*{re.escape(table)}\s*\]+", line)]
    start = headers[nth] if nth < len(headers) else 0
    stop = next((at for at in headers if at > start), len(lines))
    keys = [step for step in path[1:] if isinstance(step, str)] or [table]
    for key in reversed(keys):
        position = next((path[at + 1] for at in range(len(path) - 1) if path[at] == keys[0] and at > 0), 0)
        found = [
            at for at in range(start, stop) if re.search(rf"(?<![\w-])\"?{re.escape(key)}\"?\s*=", lines[at])
        ]
        if found:
            return found[min(position if isinstance(position, int) else 0, len(found) - 1)] + 1
    return start + 1


def _quantity(kind: type, value: Any) -> Any:
    """A number with a unit, as text, or in base units. For msgspec, which wants ValueError."""
    parse = _PARSERS.get(kind)
    if parse is None:
        raise NotImplementedError(kind)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is not {_WANTED[kind]}")
    try:
        number = parse(value) if isinstance(value, str) else float(value)
    except HexmeshError as error:
        raise ValueError(error.one_line()) from error
    if not 0 <= number < 1e30:
        raise ValueError(f"{value!r} is out of range")
    return kind(number)


def _explained(message: str, text: str, kind: type, where: str) -> InvalidInput:
    what, _, place = re.sub(r" - at `key` in `\$", " - at `$", message).partition(" - at `$")
    path = tuple(key or int(index) for key, index in _STEP.findall(place.removesuffix("`")))
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", what)
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    choices = _choices(_kind_at(kind, path))
    allowed = list(getattr(_kind_at(kind, path), "__struct_encode_fields__", ()))
    if unknown:
        name = unknown.group(1)
        close = get_close_matches(name, allowed, n=1)
        next_step = f"write {close[0]!r}" if close else f"allowed: {', '.join(allowed)}"
        return fault(text, where, (*path, name), f"no such key {name!r}", next_step)
    if missing:
        return fault(text, where, path, f"{missing.group(1)!r} is missing", f"add {missing.group(1)} = ...")
    next_step = f"allowed: {', '.join(map(repr, choices))}" if "enum" in what else ""
    return fault(text, where, path, what[:1].lower() + what[1:], next_step)


def _kind_at(kind: Any, path: Path) -> Any:
    """The type that stands at a place of the file."""
    for step in path:
        if isinstance(step, int):
            kind = get_args(kind)[0] if get_args(kind) else Any
            continue
        names = dict(zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True))
        kind = _without_none(get_type_hints(kind)[names[step]]) if step in names else Any
    return kind


def _without_none(kind: Any) -> Any:
    options = [option for option in get_args(kind) if option is not type(None)]
    return options[0] if type(None) in get_args(kind) and len(options) == 1 else kind


def _choices(kind: Any) -> list[str]:
    """The values that a Literal allows, or the keys of a table whose keys are one."""
    while get_args(kind) and not isinstance(get_args(kind)[0], str):
        kind = get_args(kind)[0]
    return [str(choice) for choice in get_args(kind)]


def _shown(path: Path) -> str:
    """A place in words: host 2, devices 1, type."""
    words = list[str]()
    for step in path:
        if isinstance(step, int):
            words[-1] += f" {step + 1}"
        else:
            words.append(step)
    return ", ".join(words)
