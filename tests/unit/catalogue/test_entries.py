"""The catalogue's data: complete, sourced, and found by the names that people write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hexmesh.catalogue import device_named, devices, efficiency_of, link_named, links
from hexmesh.catalogue.entries import device_sources, link_sources
from hexmesh.catalogue.rates import fabric_of, sustained_bytes_per_s, sustained_flops_per_s
from hexmesh.errors import InvalidInput

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "fleets" / "README.md"


def test_every_figure_has_a_source_or_is_listed_as_unverified() -> None:
    for device in devices():
        assert device.sources or {"memory", "bandwidth", "flops"} <= set(device.unverified), device.name
        fields = {"memory", "bandwidth", "flops", "watts", *(f"flops.{dtype}" for dtype in device.flops)}
        assert set(device.unverified) <= fields, device.name
        assert set(device.sources) <= device_sources().keys(), device.name
    for link in links():
        assert link.sources or link.unverified == ("rate",) or link.name == "none", link.name
        assert set(link.sources) <= link_sources().keys(), link.name


def test_every_source_is_used_and_says_where_and_when() -> None:
    used = {source for entry in (*devices(), *links()) for source in entry.sources}
    assert used == device_sources().keys() | link_sources().keys()
    for source in (*device_sources().values(), *link_sources().values()):
        assert source.url.startswith("https://")
        assert source.read.year >= 2026


def test_figures_are_of_their_kind() -> None:
    for device in devices():
        assert 2**33 < device.memory_bytes < 2**39, device.name
        assert 1e11 < device.peak_bytes_per_s < 1e13, device.name
        peak = device.peak_flops_per_s
        assert peak.keys() <= {"float32", "float16", "bfloat16"}
        assert all(1e12 < value < 1e16 for value in peak.values()), device.name
        assert max(peak.values()) == max(peak.get("float16", 0), peak.get("bfloat16", 0)), device.name
        link_named(device.link)


def test_names_and_aliases_name_one_device_each() -> None:
    keys = [
        re.sub(r"[^a-z0-9+]", "", name.lower())
        for device in devices()
        for name in (device.name, *device.aliases)
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx a6000", "RTX-A6000"),
        ("A6000", "RTX-A6000"),
        ("h100", "H100-SXM"),
        ("GeForce RTX 4090", "RTX-4090"),
        ("mi300x", "MI300X"),
        ("Xeon Platinum 8480+", "Xeon-8480+"),
    ],
)
def test_devices_are_found_as_people_write_them(written: str, name: str) -> None:
    assert device_named(written).name == name


def test_an_unknown_device_is_answered_with_near_ones() -> None:
    with pytest.raises(InvalidInput, match="no device type 'A600'") as refusal:
        device_named("A600")
    assert "RTX-A6000" in refusal.value.next_step
    with pytest.raises(InvalidInput, match="no link 'nvlnk4'") as refusal:
        link_named("nvlnk4")
    assert "nvlink4" in refusal.value.next_step


def test_sustained_rates_are_peaks_times_the_fitted_factors() -> None:
    h100 = device_named("H100")
    row = efficiency_of(h100)
    assert sustained_flops_per_s(h100, "float16") == pytest.approx(989e12 * row.prefill)
    assert sustained_bytes_per_s(h100) == pytest.approx(3.35e12 * row.decode)
    with pytest.raises(InvalidInput, match="T4 does not compute in bfloat16"):
        sustained_flops_per_s(device_named("T4"), "bfloat16")


def test_classes_without_measurements_share_the_pooled_row() -> None:
    assert efficiency_of(device_named("MI300X")).points == 0
    assert efficiency_of(device_named("MI300X")) == efficiency_of(device_named("Gaudi-3"))
    assert efficiency_of(device_named("L4")).points > 0


def test_machines_of_one_device_have_no_fabric() -> None:
    assert fabric_of(link_named("none")) is None
    assert fabric_of(link_named("pcie4")) is not None


def test_the_document_lists_all_names() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    listed = text[text.index("## The catalogue") :]
    names = set(re.findall(r"[\w+-]+", listed))
    assert {device.name for device in devices()} | {link.name for link in links()} <= names
