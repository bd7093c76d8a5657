"""The watch over steps in workers: a worker is ended for the step that it computes, not for those that queue."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from daemon.stage_watch import RunningStep, StageWatch
from hexmesh.serving.watchdog import StepTimes
from hexmesh.wire.control import Ballot, Epoch
from hexmesh.wire.data import Row, Step

EPOCH = Epoch(ballot=Ballot(term=1, rank=0, node="a", boot=1), n=1)


class FakeWorker:
    """Ends its steps when it is killed, as a real one does."""

    pid = 0

    def __init__(self, watch: StageWatch) -> None:
        self.watch = watch
        self.steps: list[RunningStep] = []
        self.reason = ""

    def kill(self, reason: str) -> None:
        self.reason = reason
        for running in self.steps:
            self.watch.end(running, is_done=False)


@pytest.fixture
def watch() -> StageWatch:
    return StageWatch(is_heard=lambda _: True, on_unheard=lambda *_: None)


def begin(watch: StageWatch, worker: FakeWorker, stage: str, n_steps: int) -> None:
    """Steps of one, two, ... tokens."""
    for n in range(1, n_steps + 1):
        row = Row(start=0, n_tokens=n, blocks=[0])
        step = Step(epoch=EPOCH, cert=None, replica="r0", stage=0, step=n, driver="a", rows=[row])
        worker.steps.append(watch.begin(stage, step, cast(Any, worker), StepTimes(0.0, 1), stage))


def look_for(watch: StageWatch, seconds: float, now_s: float) -> float:
    """Look every 0.1 s for so long; the time then."""
    for _ in range(round(seconds * 10)):
        now_s += 0.1
        watch.look(now_s)
    return now_s


def test_the_time_of_a_step_runs_from_the_end_of_the_one_before(
    watch: StageWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FakeWorker(watch)
    began_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    now_s = began_s
    begin(watch, worker, "x", 3)
    now_s = look_for(watch, 9.0, now_s)
    watch.end(worker.steps[0], is_done=True)
    now_s = look_for(watch, 9.0, now_s)
    assert worker.reason == ""
    look_for(watch, 1.5, now_s)
    assert worker.reason == "x hung: no answer to a step of 2 tokens within 10.0 s"


def test_a_worker_of_two_stages_is_ended_once(watch: StageWatch) -> None:
    worker = FakeWorker(watch)
    begin(watch, worker, "x", 3)
    begin(watch, worker, "y", 3)
    look_for(watch, 11.0, time.monotonic())
    assert worker.reason.startswith("x hung: no answer to a step of 1 token ")
    assert watch._running == {}
