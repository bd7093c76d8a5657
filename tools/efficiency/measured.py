"""The published measurements of measured.toml, as rows of what was run and how long it took."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Kind = Literal["linear", "prompt", "decode", "prefill", "token", "all_reduce", "send"]

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement. `amount` is tokens, sequences or bytes, as the kind says."""

    kind: Kind
    device: str
    tp: int
    amount: int
    seconds: float


@cache
def points() -> tuple[Point, ...]:
    """Every measurement of the file."""
    return tuple(_points(tomllib.loads((HERE / "measured.toml").read_text(encoding="utf-8"))))


def sources() -> dict[str, dict[str, str]]:
    """Title and url of each source."""
    table: dict[str, dict[str, str]] = tomllib.loads((HERE / "measured.toml").read_text(encoding="utf-8"))[
        "source"
    ]
    return table


def _points(tables: dict[str, Any]) -> Iterator[Point]:
    linear, layer, request, collective = (
        tables[name] for name in ("linear", "layer", "request", "collective")
    )
    for row in linear["row"]:
        yield from _row("linear", row, linear["tokens"], row["ms"])
    for row in layer["row"]:
        yield from _row("prompt", row, layer["prompt_tokens"], row["prompt_ms"])
        yield from _row("decode", row, layer["decode_batch"], row["decode_ms"])
    for row in request["row"]:
        yield from _row("prefill", row, request["prompt_tokens"], row["prefill_ms"])
        yield from _row("token", row, request["prompt_tokens"], row["token_ms"])
    for row in collective["all_reduce"]:
        for tp, times in zip(row["tp"], row["ms"], strict=True):
            yield from _row("all_reduce", {**row, "tp": tp}, row["bytes"], times)
    for row in collective["send"]:
        yield from _row("send", row, [row["bytes"]], [row["ms"]])


def _row(kind: Kind, row: dict[str, Any], amounts: list[int], times_ms: list[float]) -> Iterator[Point]:
    for amount, ms in zip(amounts, times_ms, strict=True):
        yield Point(kind, row["device"], row.get("tp", 1), amount, ms / 1e3)
