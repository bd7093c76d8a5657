"""The daemon's calibration: steps in, corrected facts out, and news told."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from daemon import calibrator as calibrator_module
from daemon.calibrator import EVERY, Calibrator
from daemon.models.model_source import resolve_model
from daemon.pipeline import StepTrace
from hexmesh.cluster import Device, Link
from hexmesh.membership.records import DeviceFacts
from hexmesh.model_spec import model_spec_from_config
from hexmesh.plan import Replica, Stage
from hexmesh.wire.data import Row

SPEC = model_spec_from_config(resolve_model().config)
FACTS = DeviceFacts(
    device=Device(index=0, kind="cpu", name="cpu", budget_bytes=2**30, flops_per_s=1e10, bytes_per_s=1e10),
    n_threads=1,
    flops_spread=0.0,
    bytes_spread=0.0,
    measured_at_unix_s=0.0,
)
STAGE = Stage(
    node="n",
    devices=(0,),
    start=0,
    stop=SPEC.n_layers,
    kv_blocks=8,
    needed_bytes=0,
    room_bytes=0,
    predicted_step_s=0.0,
)
ROWS = [Row(start=100, n_tokens=1, blocks=[])]


async def test_steps_correct_the_facts_once_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrator_module, "TELL_S", 0.0)
    news = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        calibrator = Calibrator(SPEC, "float32", group=group, links=dict, on_news=news.set)
        calibrator.measured([FACTS])
        assert calibrator.corrected([FACTS]) == (FACTS,)
        for _ in range(EVERY * 50):
            calibrator.timed(STAGE, ROWS, 0.02)
        async with asyncio.timeout(20):
            await news.wait()
        (corrected,) = calibrator.corrected([FACTS])
        assert corrected.factors is not None
        found = corrected.factors
        assert 8 * (found.launch_s + found.row_s) + found.step_s > 0.01
        assert corrected.device == FACTS.device
        calibrator.measured([msgspec.structs.replace(FACTS, n_threads=2)])
        assert calibrator.corrected([FACTS]) == (FACTS,)


async def test_a_stage_over_several_devices_says_nothing_of_one() -> None:
    async with asyncio.TaskGroup() as group:
        calibrator = Calibrator(SPEC, "float32", group=group, links=dict, on_news=lambda: None)
        calibrator.measured([FACTS])
        for _ in range(EVERY * 50):
            calibrator.timed(msgspec.structs.replace(STAGE, devices=(0, 1)), ROWS, 0.02)
        assert calibrator._known[0].fit.factors() is None


async def test_steps_that_were_driven_tell_what_a_way_takes_beside_its_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrator_module, "TELL_S", 0.0)
    ways = [("n", "m"), ("m", "n")]
    links = {
        (src, dst): Link(src=src, dst=dst, rtt_p50_s=0.04, rtt_p95_s=0.04, bytes_per_s=1e8, lower_bound=False)
        for src, dst in ways
    }
    replica = Replica(
        id="r0",
        role="mixed",
        stages=(
            msgspec.structs.replace(STAGE, stop=4),
            msgspec.structs.replace(STAGE, node="m", start=4),
        ),
        block_tokens=16,
        predicted_tokens_per_s=1.0,
        predicted_batch=1,
    )
    trace = StepTrace(
        replica=replica,
        n_rows=1,
        n_tokens=1,
        round_trip_s=0.056,
        stage_seconds=[0.005, 0.005],
        queue_seconds=[0.0, 0.0],
    )
    news = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        calibrator = Calibrator(SPEC, "float32", group=group, links=lambda: links, on_news=news.set)
        assert calibrator.way_s is None
        for _ in range(30):
            calibrator.travelled(trace)
        async with asyncio.timeout(20):
            await news.wait()
    assert calibrator.way_s == pytest.approx(0.003, abs=1e-4)
