"""Units at the edge: people write and read GiB, ms and Gbit/s; everything inside is SI base units."""

from __future__ import annotations

import re

from hexmesh.errors import InvalidInput

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_DURATION_UNITS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_RATE_UNIT = re.compile(r"([kmgt]?i?)(bit|[bB])(?:/s|ps)", re.IGNORECASE)
_FLOPS_UNITS = {"": 1.0, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_NUMBER_WITH_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z/]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes from text such as "2GiB", "512MB" or "1048576". Raises InvalidInput."""
    number, unit = _split(text, "a size such as 2GiB or 512MiB")
    factor = _SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise InvalidInput(
            f"unknown unit {unit!r} in size {text!r}", next_step="write a size such as 2GiB or 512MiB"
        )
    return round(number * factor)


def parse_duration_s(text: str) -> float:
    """Seconds from text such as "60s", "1h" or "250ms". Raises InvalidInput."""
    number, unit = _split(text, "a duration such as 60s or 1h")
    factor = _DURATION_UNITS.get(unit.lower())
    if factor is None:
        raise InvalidInput(
            f"unknown unit {unit!r} in duration {text!r}", next_step="write a duration such as 60s or 1h"
        )
    return number * factor


def parse_rate(text: str) -> float:
    """Bytes per second from text such as "10Gbit/s", "10Gb/s" or "300GB/s"; b is a bit, B a byte.

    Raises InvalidInput.
    """
    number, unit = _split(text, "a rate such as 10Gbit/s or 300GB/s")
    found = _RATE_UNIT.fullmatch(unit)
    if found is None or found.group(1).lower() not in _PREFIXES:
        raise InvalidInput(
            f"unknown unit {unit!r} in rate {text!r}", next_step="write a rate such as 10Gbit/s or 300GB/s"
        )
    factor = _PREFIXES[found.group(1).lower()]
    return number * factor if found.group(2) == "B" else number * factor / 8


def parse_flops(text: str) -> float:
    """FLOP/s from text such as "312T" or "71 TFLOP/s". Raises InvalidInput."""
    wanted = "a compute rate such as 312T or 71 TFLOP/s"
    number, unit = _split(text, wanted)
    prefix = unit.lower().removesuffix("/s").removesuffix("flops").removesuffix("flop")
    factor = _FLOPS_UNITS.get(prefix)
    if factor is None:
        raise InvalidInput(f"unknown unit {unit!r} in compute rate {text!r}", next_step=f"write {wanted}")
    return number * factor


def show_bytes(n_bytes: float) -> str:
    """A size for people, such as "1.5 GiB"."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def show_duration(seconds: float) -> str:
    """A duration for people, such as "3.2 ms", "45.0 s" or "2 h 5 m"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} m"
    return f"{minutes // 60} h {minutes % 60} m"


def show_bit_rate(bytes_per_s: float) -> str:
    """A link's rate for people, such as "9.4 Gbit/s"."""
    bits_per_s = bytes_per_s * 8
    for unit, factor in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:.1f} {unit}"
    return f"{bits_per_s:.0f} bit/s"


def show_flops(flops_per_s: float) -> str:
    """A compute rate for people, such as "1.9 TFLOP/s"."""
    for unit, factor in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops_per_s >= factor:
            return f"{flops_per_s / factor:.1f} {unit}"
    return f"{flops_per_s / 1e6:.1f} MFLOP/s"


def _split(text: str, wanted: str) -> tuple[float, str]:
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    if match is None:
        raise InvalidInput(f"{text!r} is not {wanted}", next_step=f"write {wanted}")
    return float(match.group(1)), match.group(2)
