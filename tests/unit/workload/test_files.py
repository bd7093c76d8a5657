"""Traces and workload files: what they mean, and what is refused with its line."""

from __future__ import annotations

import re
import time
from pathlib import Path

import msgspec
import pytest

from hexmesh.errors import InvalidInput
from hexmesh.workload import (
    CLASSES,
    ConstantLengths,
    GammaArrivals,
    LognormalLengths,
    PoissonArrivals,
    Slo,
    named_workload,
    read_trace,
    read_workload,
)
from hexmesh.workload.file import SloTable, WorkloadFile

CSV = "arrival_s,prompt_tokens,output_tokens\n3.5,10,2\n1,20,4\n"
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
JSONL = (
    '{"arrival_s": 1, "prompt_tokens": 20, "output_tokens": 4}\n\n'
    '{"arrival_s": 3.5, "prompt_tokens": 10, "output_tokens": 2}\n'
)


@pytest.mark.parametrize("text", [CSV, JSONL])
def test_a_trace_is_read_in_order_of_arrival(text: str) -> None:
    trace = read_trace(text)
    assert trace.pairs == ((20, 4), (10, 2))
    assert trace.arrivals.times == (1.0, 3.5)
    assert trace.lengths.mean_context == pytest.approx((4 * 22 + 2 * 11) / 6)


def test_times_of_day_and_other_names_of_columns_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    trace = read_trace(AZURE)
    assert trace.pairs == ((374, 44), (396, 109))
    first, second = trace.arrivals.times
    assert second - first == pytest.approx(4.314579, abs=1e-6)
    assert first == pytest.approx(1700158546.68059, abs=1e-5)
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "t: no requests"),
        (
            "a,b\n1,2\n",
            "t:2: no arrival_s among a, b; name the columns arrival_s, prompt_tokens and output_tokens",
        ),
        (CSV.replace("20", "2.5"), "t:3: prompt_tokens is '2.5', no count of tokens"),
        (CSV.replace(",4", ",-4"), "t:3: output_tokens is '-4', no count of tokens"),
        (CSV.replace("3.5", "soon"), "t:2: arrival 'soon' is neither seconds nor a time"),
        (CSV.replace("3.5", "nan"), "t:2: arrival 'nan' is out of range"),
        (JSONL.replace("}\n\n", "\n\n"), "t:1: not JSON"),
        (JSONL + "[1]\n", "t:4: not a JSON object"),
        (JSONL.replace('"output_tokens": 2', '"out": 2'), "t:3: no output_tokens among"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        read_trace(text, "t")
    assert expected in refusal.value.one_line()


def test_a_workload_file_says_what_it_says() -> None:
    workload = read_workload(
        'class = "LPHD"\nrequests_per_s = 4\nmax_concurrent_sequences = 64\n[slo]\nttft = "2s"\ntpot = "80ms"\n'
    )
    assert workload.lengths == CLASSES["LPHD"]
    assert workload.arrivals == PoissonArrivals(requests_per_s=4.0)
    assert workload.slo == Slo(ttft_s=2.0, tpot_s=0.08)
    assert workload.max_concurrent_sequences == 64


def test_lengths_and_arrivals_of_its_own() -> None:
    workload = read_workload(
        '[lengths]\ntype = "lognormal"\nprompt = 700\noutput = 90\noutput_cv = 0.5\n'
        '[arrivals]\ntype = "gamma"\nrequests_per_s = 2\ncv = 3\n'
    )
    assert workload.lengths == LognormalLengths(prompt=700, output=90, output_cv=0.5)
    assert workload.arrivals == GammaArrivals(requests_per_s=2.0, cv=3.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "w:1: class: neither class nor lengths; give one of the two"),
        (
            'class = "HPLD"\n[lengths]\ntype = "constant"\nprompt = 1\noutput = 1\n',
            "w:1: class: both class and lengths; give one of the two",
        ),
        ('class = "XPLD"', "w:1: class: invalid enum value 'XPLD'; allowed: 'HPLD', 'HPHD', 'LPHD', 'LPLD'"),
        (
            'class = "HPLD"\nrequests_per_s = 1\n[arrivals]\ntype = "poisson"\nrequests_per_s = 2\n',
            "w:2: requests_per_s: arrivals has a rate, too; give one of the two",
        ),
        (
            'class = "HPLD"\n[slo]\nttft = "0s"\n',
            "w:3: slo, ttft: a limit of no time; leave it out, or give more",
        ),
        ('class = "HPLD"\n[slo]\nttf = "1s"\n', "w:3: slo, ttf: no such key 'ttf'; write 'ttft'"),
        ('class = "HPLD"\nrequests_per_s = 0\n', "w:2: requests_per_s: expected `float` > 0.0"),
    ],
)
def test_a_bad_workload_file_is_refused_with_its_line(text: str, expected: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        read_workload(text, "w")
    assert expected in refusal.value.one_line()


def test_a_class_by_name_and_rate() -> None:
    assert named_workload("HPLD").arrivals is None
    assert named_workload("HPLD@2.5/s").requests_per_s == 2.5
    for wrong in ("HPLX", "HPLD@fast", "HPLD@0", "HPLD@nan"):
        with pytest.raises(InvalidInput):
            named_workload(wrong)


DOCUMENT = (Path(__file__).resolve().parents[3] / "docs" / "workloads.md").read_text(encoding="utf-8")


def test_the_document_names_every_key_and_its_example_is_one() -> None:
    named = set(re.findall(r"`(\w+)`", DOCUMENT))
    tables = (WorkloadFile, ConstantLengths, LognormalLengths, PoissonArrivals, GammaArrivals, SloTable)
    keys = {field.encode_name for table in tables for field in msgspec.structs.fields(table)}
    assert keys - {"slo", "lengths", "arrivals"} <= named
    example = "\n".join(line[4:] for line in DOCUMENT.splitlines() if line.startswith("    "))
    assert read_workload(example).slo == Slo(ttft_s=2.0, tpot_s=0.08, attainment=0.95)


@pytest.mark.parametrize("name", CLASSES)
def test_the_document_shows_the_classes(name: str) -> None:
    lengths = CLASSES[name]
    row = (
        f"| {name} | {lengths.prompt:,.0f} ({lengths.prompt_cv:.2f}) | {lengths.output:.0f} ({lengths.output_cv:.2f}) "
        f"| {lengths.mean_context:,.0f} |"
    )
    assert row in DOCUMENT
