"""Cluster files: what they mean, what is refused and how, and that they can be written again."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.fleet import Fleet, read_fleet, write_fleet
from hexmesh.fleet.file import Defaults, FleetDevice, FleetHost, FleetSite, Line
from hexmesh.toml_text import Bytes, BytesPerS, FlopsPerS, Seconds

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
GOOD = """\
name = "x"
[[host]]
name = "a"
count = 2
devices = [{ type = "A100-80GB", count = 8 }]
nic = "100Gbit/s"
[[host]]
name = "b"
site = "there"
devices = [
  { name = "own", memory = "24GiB", flops = { float16 = "70T" }, bandwidth = "800GB/s" },
  { type = "A6000", count = 2 },
]
[[wan]]
between = ["here", "there"]
rate = "1Gbit/s"
rate_back = "100Mbit/s"
rtt = "30ms"
"""


def test_a_file_says_what_it_says() -> None:
    fleet = read_fleet(GOOD)
    assert fleet.host_names() == {"a": ("a-0", "a-1"), "b": ("b",)}
    assert fleet.site_names() == ("here", "there")
    assert fleet.wan == (
        Line(
            between=("here", "there"), rate=BytesPerS(125e6), rate_back=BytesPerS(12.5e6), rtt=Seconds(0.03)
        ),
    )
    assert fleet.host[1].devices[0].memory == 24 * 2**30
    assert fleet.host[0].nic == 12.5e9


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "count = 2 }",
            'count = 2, memroy = "40GiB" }',
            "f.toml:12: host 2, devices 2, memroy: no such key 'memroy'; write 'memory'",
        ),
        (
            '"100Gbit/s"',
            '"fast"',
            "f.toml:6: host 1, nic: 'fast' is not a rate such as 10Gbit/s or 300GB/s; "
            "write a rate such as 10Gbit/s or 300GB/s",
        ),
        (
            '"100Gbit/s"',
            '"100Gbyte"',
            "f.toml:6: host 1, nic: unknown unit 'Gbyte' in rate '100Gbyte'; "
            "write a rate such as 10Gbit/s or 300GB/s",
        ),
        ("count = 2\n", 'count = "2"\n', "f.toml:4: host 1, count: expected `int`, got `str`"),
        ("count = 2\n", "count = 0\n", "f.toml:4: host 1, count: expected `int` >= 1"),
        ('rate = "1Gbit/s"', "rate = -3", "f.toml:16: wan 1, rate: -3 is out of range"),
        ('rate = "1Gbit/s"', "rate = true", "f.toml:16: wan 1, rate: true is not a rate"),
        ('rate = "1Gbit/s"', "rate = nan", "f.toml:16: wan 1, rate: nan is out of range"),
        (
            '"A6000"',
            '"A600"',
            "f.toml:12: host 2, devices 2, type: no device type 'A600' in the catalogue; write RTX-A6000",
        ),
        (
            "float16 =",
            "fp16 =",
            "f.toml:11: host 2, devices 1, flops: invalid enum value 'fp16'; "
            "allowed: 'float32', 'bfloat16', 'float16'",
        ),
        (
            'flops = { float16 = "70T" }, ',
            "",
            "f.toml:10: host 2, devices 1: no type, and no flops; "
            "name a type of the catalogue, or give all figures",
        ),
        (
            '"here", "there"',
            '"here", "ther"',
            "f.toml:15: wan 1, between: no host is in site 'ther'; name a site: here, there",
        ),
        (
            '"here", "there"',
            '"here", "here"',
            "f.toml:15: wan 1, between: both ends are 'here'; name two sites",
        ),
        (
            'name = "b"',
            'name = "a-1"',
            "f.toml:3: host 1, name: two hosts are called 'a-1'; give each a name",
        ),
        ("[[wan]]", "[[wam]]", "f.toml:14: wam: no such key 'wam'; write 'wan'"),
        ('name = "b"\n', "", "f.toml:7: host 2: 'name' is missing; add name = ..."),
        ('rate = "1Gbit/s"\n', "", "f.toml:14: wan 1: 'rate' is missing; add rate = ..."),
        (
            'rate = "1Gbit/s"',
            "rate = 0",
            "f.toml:16: wan 1, rate: a line of no rate; leave the line out, or give its rate",
        ),
        (
            'site = "there"',
            'site = "there"\ntp = [4]',
            "f.toml:10: host 2, tp: TP 4 of 3 devices; write up to 3",
        ),
        (
            'site = "there"',
            'site = "there"\nroles = ["prefil"]',
            "f.toml:10: host 2, roles 1: invalid enum value 'prefil'; allowed: 'mixed', 'prefill', 'decode'",
        ),
        (
            'site = "there"',
            'site = "there"\nfabric = "nvlink9"',
            "f.toml:10: host 2, fabric: no link 'nvlink9' in the catalogue; write nvlink",
        ),
        (
            'site = "there"',
            'site = "there"\ntp = [2]\nfabric = "none"',
            "f.toml:11: host 2, fabric: TP without a way between the devices; leave tp out, or name a fabric",
        ),
        ('name = "x"', "name = x", "f.toml:1: not TOML: Invalid value; correct that line"),
        ("[[wan]]", "[[site]]\nname = 'no'\n[[wan]]", "f.toml:15: site 1, name: no host is in site 'no'"),
        (
            "[[wan]]",
            "[[pair]]\nbetween = ['a', 'c']\nrate = 5\n[[wan]]",
            "f.toml:15: pair 1, between: no host 'c'; name a host: a, a-0, a-1, b",
        ),
        (
            "[[wan]]",
            "[[wan]]\nbetween = ['there', 'here']\nrate = 5\n[[wan]]",
            "f.toml:18: wan 2, between: here and there are connected above (wan 1); keep one; rate_back is the way",
        ),
        ("count = 2\n", "count = 4000\ncount_ = 1\n", "no such key 'count_'; write 'count'"),
        ('name = "b"', 'name = "b b"', "host 2, name: expected `str` matching regex"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_the_next_step(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidInput) as refusal:
        read_fleet(GOOD.replace(old, new, 1), "f.toml")
    assert expected in refusal.value.one_line()


def test_more_hosts_than_anybody_plans_for_are_refused() -> None:
    text = GOOD.replace("count = 2\n", "count = 4096\n", 1)
    with pytest.raises(InvalidInput, match="4097 hosts are more than 4096"):
        read_fleet(text)


def test_a_file_without_hosts_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'host' is missing"):
        read_fleet('name = "x"')


@pytest.mark.parametrize("path", sorted(FLEETS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_can_be_written_and_read_again(path: Path) -> None:
    fleet = read_fleet(path.read_text(encoding="utf-8"), path.name)
    assert fleet.name == path.stem
    assert read_fleet(write_fleet(fleet)) == fleet


_NAMES = st.from_regex(r"[a-z][a-z0-9_.+-]{0,8}", fullmatch=True)
_RATES = st.floats(1e3, 1e13).map(BytesPerS)
_SECONDS = st.floats(0.0, 10.0).map(Seconds)
_OWN_DEVICES = st.builds(
    FleetDevice,
    name=st.text(min_size=1, max_size=20),
    kind=st.sampled_from(["cuda", "rocm", "cpu"]),
    memory=st.floats(1e6, 1e12).map(Bytes),
    flops=st.dictionaries(
        st.sampled_from(["float16", "float32"]), st.floats(1e9, 1e16).map(FlopsPerS), min_size=1
    ),
    bandwidth=_RATES,
    count=st.integers(1, 64),
)
_CATALOGUE_DEVICES = st.builds(
    FleetDevice, type=st.sampled_from(["T4", "rtx 4090", "MI300X"]), count=st.integers(1, 8)
)
_HOSTS = st.builds(
    FleetHost,
    name=_NAMES,
    devices=st.lists(_OWN_DEVICES | _CATALOGUE_DEVICES, min_size=1, max_size=3).map(tuple),
    site=st.sampled_from(["here", "there"]),
    count=st.integers(1, 3),
    nic=st.none() | _RATES,
    nic_in=st.none() | _RATES,
    fabric=st.none() | st.sampled_from(["pcie4", "nvlink3"]),
    fabric_step=st.none() | _SECONDS,
    price_per_h=st.none() | st.floats(0, 100),
    tp=st.none() | st.just((1,)),
    roles=st.none() | st.just(("mixed", "decode")),
)
_FLEETS = st.builds(
    Fleet,
    host=st.lists(_HOSTS, min_size=1, max_size=4, unique_by=lambda host: host.name[:1]).map(tuple),
    name=st.text(max_size=10),
    note=st.text(max_size=10),
    defaults=st.builds(
        Defaults, nic=_RATES, site_rtt=_SECONDS, wan_rate=st.none() | _RATES, wan_rtt=_SECONDS
    ),
)


@settings(deadline=None)
@given(_FLEETS)
def test_any_fleet_can_be_written_and_read_again(fleet: Fleet) -> None:
    sites = fleet.site_names()
    fleet = msgspec.structs.replace(
        fleet,
        site=(FleetSite(name=sites[0], rtt=Seconds(0.001)),),
        wan=(Line(between=(sites[0], sites[-1]), rate=BytesPerS(5.0)),) if len(sites) > 1 else (),
    )
    assert read_fleet(write_fleet(fleet)) == fleet


def test_the_document_names_every_key() -> None:
    text = (FLEETS / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    for table in (Defaults, FleetHost, FleetDevice, FleetSite, Line):
        assert {field.encode_name for field in msgspec.structs.fields(table)} - {"between"} <= named, table
