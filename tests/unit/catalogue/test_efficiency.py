"""The shipped factors are those that the fit gives, and the fit explains the measurements."""

from __future__ import annotations

import pytest

from hexmesh.catalogue.efficiency import POOLED, fitted
from tools.efficiency.__main__ import FACTORS, REPORT, report, toml
from tools.efficiency.fit import Fit, fit
from tools.efficiency.measured import points


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit()


def test_the_shipped_factors_are_fitted_ones(found: Fit) -> None:
    shipped = fitted()
    assert shipped.framework_step_s == pytest.approx(found.factors.framework_step_s, rel=2e-3)
    assert shipped.device.keys() == found.factors.device.keys()
    for name, row in found.factors.device.items():
        ours = shipped.device[name]
        assert (ours.prefill, ours.decode, ours.launch_s) == pytest.approx(
            (row.prefill, row.decode, row.launch_s), rel=2e-3
        ), name
    for name, link in found.factors.link.items():
        assert (shipped.link[name].rate, shipped.link[name].step_s) == pytest.approx(
            (link.rate, link.step_s), rel=2e-3
        ), name


def test_the_file_and_the_report_are_what_the_tool_writes(found: Fit) -> None:
    assert FACTORS.read_text(encoding="utf-8").splitlines()[:2] == toml(found.factors).splitlines()[:2]
    written, now = REPORT.read_text(encoding="utf-8").splitlines(), report(found).splitlines()
    assert len(written) == len(now)
    assert written[0] == now[0]


def test_every_measurement_but_lone_sends_is_predicted(found: Fit) -> None:
    assert len(found.predictions) == sum(point.kind != "send" for point in points())


def test_factors_are_shares(found: Fit) -> None:
    for row in found.factors.device.values():
        assert 0.3 < row.prefill < 1
        assert 0.6 < row.decode < 1
        assert 0 < row.launch_s < 3e-4


def test_layers_are_within_a_quarter_and_six_in_a_hundred_on_average(found: Fit) -> None:
    layers = [one.ratio for one in found.predictions if one.point.kind in ("linear", "prompt", "decode")]
    assert all(0.75 < ratio < 1.25 for ratio in layers)
    assert sum(abs(ratio - 1) for ratio in layers) / len(layers) < 0.07


def test_the_pooled_row_lies_among_the_others(found: Fit) -> None:
    rows = dict(found.factors.device)
    pooled = rows.pop(POOLED)
    assert (
        min(row.prefill for row in rows.values()) < pooled.prefill < max(row.prefill for row in rows.values())
    )
    assert pooled.points == 0
