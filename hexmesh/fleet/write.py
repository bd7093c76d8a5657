"""A fleet as the text of a cluster file; `read_fleet` of it gives the same fleet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.fleet.file import Fleet
from hexmesh.toml_text import Bytes, BytesPerS, FlopsPerS, Seconds
from hexmesh.units import parse_bytes, parse_duration_s, parse_flops, parse_rate

_Unit = tuple[str, float]
_UNITS: dict[type, tuple[Callable[[str], float], tuple[_Unit, ...]]] = {
    Bytes: (parse_bytes, (("GiB", 2**30), ("MiB", 2**20), ("GB", 1e9))),
    BytesPerS: (parse_rate, (("Gbit/s", 1e9 / 8), ("Mbit/s", 1e6 / 8), ("GB/s", 1e9))),
    FlopsPerS: (parse_flops, (("T", 1e12), ("G", 1e9))),
    Seconds: (parse_duration_s, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))),
}


def write_fleet(fleet: Fleet) -> str:
    """The text of a cluster file."""
    return "\n".join(_lines(fleet)).lstrip("\n") + "\n"


def _lines(fleet: Fleet) -> Iterator[str]:
    for name in ("name", "note"):
        if value := getattr(fleet, name):
            yield f"{name} = {_value(value)}"
    if keys := _keys(fleet.defaults):
        yield from ("", "[defaults]", *(f"{key} = {_value(value)}" for key, value in keys))
    for table in ("site", "host", "wan", "pair"):
        for entry in getattr(fleet, table):
            yield from ("", f"[[{table}]]", *(f"{key} = {_value(value)}" for key, value in _keys(entry)))


def _keys(entry: msgspec.Struct) -> list[tuple[str, Any]]:
    """Keys that differ from their defaults, in the order of the struct."""
    fields = msgspec.structs.fields(entry)
    values = [(field, getattr(entry, field.name)) for field in fields]
    return [(field.encode_name, value) for field, value in values if field.required or value != field.default]


def _value(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in _keys(value)) + " }"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, tuple):
        items = [_value(inner) for inner in value]
        wide = any(item.startswith("{") for item in items) and len(items) > 1
        return "[\n  " + ",\n  ".join(items) + ",\n]" if wide else f"[{', '.join(items)}]"
    if type(value) in _UNITS:
        return _quantity(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quantity(value: float) -> str:
    """With the unit that gives the shortest exact text, else in base units."""
    parse, units = _UNITS[type(value)]
    texts = [f"{value / factor:.12g}{unit}" for unit, factor in units]
    exact = [text for text in texts if len(text) < 16 and _is(parse, text, value)]
    if not exact:
        return repr(float(value))
    return f'"{min(exact, key=lambda text: ("." in text, len(text)))}"'


def _is(parse: Callable[[str], float], text: str, value: float) -> bool:
    try:
        return parse(text) == value
    except InvalidInput:
        return False
