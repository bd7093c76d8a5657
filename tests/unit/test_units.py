"""Texts with units at the edge."""

from __future__ import annotations

import pytest

from hexmesh.errors import InvalidInput
from hexmesh.units import parse_duration_s, parse_flops, parse_rate


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("10Gbit/s", 1.25e9),
        ("10 Gb/s", 1.25e9),
        ("10Gbps", 1.25e9),
        ("10GB/s", 1e10),
        ("300 gbit/s", 3.75e10),
        ("2.5GiB/s", 2.5 * 2**30),
        ("100Mbit/s", 1.25e7),
        ("800B/s", 800.0),
        ("8bit/s", 1.0),
        ("3.35TB/s", 3.35e12),
    ],
)
def test_rates_are_in_bits_or_bytes(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("text", "flops_per_s"),
    [("312T", 3.12e14), ("71 TFLOP/s", 7.1e13), ("1.5PFLOPS", 1.5e15), ("5e", None), ("2", 2.0)],
)
def test_compute_rates(text: str, flops_per_s: float | None) -> None:
    if flops_per_s is None:
        with pytest.raises(InvalidInput, match="unknown unit 'e' in compute rate"):
            parse_flops(text)
    else:
        assert parse_flops(text) == pytest.approx(flops_per_s)


@pytest.mark.parametrize("text", ["10", "10Gbit", "10 miles/s", "10xB/s", "fast"])
def test_a_rate_without_its_unit_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_rate(text)


def test_microseconds() -> None:
    assert parse_duration_s("60us") == pytest.approx(6e-5)
