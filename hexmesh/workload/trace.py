"""Traces of real requests: CSV with a header, or one JSON object a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from hexmesh.errors import InvalidInput
from hexmesh.workload.arrivals import TraceArrivals
from hexmesh.workload.lengths import MAX_TOKENS, TracedLengths

MAX_REQUESTS = 5_000_000
ARRIVAL = ("arrival_s", "timestamp", "arrived_at", "arrival_time")
PROMPT = ("prompt_tokens", "contexttokens", "num_prefill_tokens", "input_tokens", "prompt_size")
OUTPUT = ("output_tokens", "generatedtokens", "num_decode_tokens", "token_size")
"""Names of columns, ours first: the others are of traces and simulators in the field."""


class TraceRow(msgspec.Struct, frozen=True):
    """One request of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


class Trace(msgspec.Struct, frozen=True):
    """Requests in order of arrival."""

    rows: tuple[TraceRow, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(prompt, output) tokens of each."""
        return tuple((row.prompt_tokens, row.output_tokens) for row in self.rows)

    @property
    def lengths(self) -> TracedLengths:
        return TracedLengths(pairs=self.pairs)

    @property
    def arrivals(self) -> TraceArrivals:
        return TraceArrivals(times=tuple(row.arrival_s for row in self.rows))


def read_trace(text: str, where: str = "trace") -> Trace:
    """The trace of a file's text, in order of arrival. Raises InvalidInput, naming file, line and column.

    Columns are arrival_s (seconds, or a date and time), prompt_tokens and output_tokens, or what others call them.
    """
    rows = list(_rows(text, where))
    if not rows:
        raise InvalidInput(f"{where}: no requests", next_step="give a trace with one request a line")
    return Trace(tuple(sorted(rows, key=lambda row: row.arrival_s)))


def _rows(text: str, where: str) -> Iterator[TraceRow]:
    is_json = text.lstrip().startswith("{")
    for n_rows, (line, record) in enumerate(_json_records(text, where) if is_json else _csv_records(text)):
        if n_rows >= MAX_REQUESTS:
            raise InvalidInput(f"{where}:{line}: over {MAX_REQUESTS} requests", next_step="cut the trace")
        values = {str(key).strip().lower(): value for key, value in record.items()}
        yield TraceRow(
            _seconds(_column(values, ARRIVAL, where, line), where, line),
            _tokens(_column(values, PROMPT, where, line), PROMPT[0], where, line),
            _tokens(_column(values, OUTPUT, where, line), OUTPUT[0], where, line),
        )


def _csv_records(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines())
    for record in reader:
        yield reader.line_num, record


def _json_records(text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InvalidInput(
                f"{where}:{number}: not JSON: {error}", next_step="write one object a line"
            ) from error
        if not isinstance(record, dict):
            raise InvalidInput(f"{where}:{number}: not a JSON object", next_step="write one object a line")
        yield number, record


def _column(values: Mapping[str, Any], names: tuple[str, ...], where: str, line: int) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values[name]
    found = ", ".join(values) or "nothing"
    raise InvalidInput(
        f"{where}:{line}: no {names[0]} among {found}",
        next_step=f"name the columns {ARRIVAL[0]}, {PROMPT[0]} and {OUTPUT[0]}",
    )


def _seconds(value: Any, where: str, line: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = _time_of(str(value), where, line)
    if not abs(number) < 1e12:
        raise InvalidInput(
            f"{where}:{line}: arrival {value!r} is out of range", next_step="give it in seconds"
        )
    return number


def _time_of(text: str, where: str, line: int) -> float:
    head, dot, fraction = text.partition(".")
    try:
        moment = datetime.fromisoformat(head if dot and fraction.isdigit() else text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return moment.timestamp() + (float(f"0.{fraction}") if dot and fraction.isdigit() else 0.0)
    except ValueError as error:
        raise InvalidInput(
            f"{where}:{line}: arrival {text!r} is neither seconds nor a time",
            next_step="write seconds, or a time such as 2023-11-16 18:15:46",
        ) from error


def _tokens(value: Any, name: str, where: str, line: int) -> int:
    try:
        tokens = float(value)
    except (TypeError, ValueError):
        tokens = -1.0
    if not (0 <= tokens <= MAX_TOKENS and tokens.is_integer()):
        raise InvalidInput(
            f"{where}:{line}: {name} is {value!r}, no count of tokens", next_step="write a whole number"
        )
    return int(tokens)
