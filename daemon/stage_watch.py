"""Watches the steps that run in this host's workers and those it passed on: names what hangs, and ends it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from daemon.compute.workers import Worker
from hexmesh.serving.watchdog import LOOK_S, SUSPECT_S, Patience, StepTimes
from hexmesh.wire.data import Step

log = logging.getLogger("hexmesh.watchdog")


@dataclass(slots=True, eq=False)
class RunningStep:
    """A step that a worker computes, or will once it has computed those before; owned by `StageWatch`."""

    stage: str
    step: Step
    worker: Worker
    times: StepTimes
    what: str
    n_tokens: int
    patience: Patience


@dataclass(frozen=True, slots=True)
class _PassedOn:
    """The last step that a stage sent to the next one, and where."""

    step: Step
    to: str
    patience: Patience


class StageWatch:
    """Owner of the waits. `run` looks at them; a worker that hangs is killed, and whoever owns it starts another."""

    def __init__(
        self,
        *,
        is_heard: Callable[[str], bool],
        on_unheard: Callable[[Step, str], None],
    ) -> None:
        """`on_unheard(step, node)`: the step was passed on to a node that does not answer."""
        self._is_heard = is_heard
        self._on_unheard = on_unheard
        self._running: dict[str, deque[RunningStep]] = {}
        """By stage, in the order in which they are computed: only the first one's time runs."""
        self._passed_on: dict[str, _PassedOn] = {}

    def begin(self, stage: str, step: Step, worker: Worker, times: StepTimes, what: str) -> RunningStep:
        """Watch a step from now until `end`; `what` names the stage for people."""
        n_tokens = sum(row.n_tokens for row in step.rows)
        patience = Patience(times.deadline_s(n_tokens), time.monotonic())
        running = RunningStep(stage, step, worker, times, what, n_tokens, patience)
        self._running.setdefault(stage, deque()).append(running)
        return running

    def end(self, running: RunningStep, *, is_done: bool) -> None:
        """The step came back, or never will; only what was done teaches."""
        now_s = time.monotonic()
        queue = self._running.get(running.stage)
        if queue is not None and running in queue:
            was_first = queue[0] is running
            queue.remove(running)
            if not queue:
                del self._running[running.stage]
            elif was_first:
                queue[0].patience = Patience(queue[0].patience.limit_s, now_s)
        if is_done:
            running.patience.spend(now_s)
            running.times.took(running.n_tokens, running.patience.spent_s)

    def passed_on(self, stage: str, step: Step, to: str) -> None:
        """A stage sent its step to the next one."""
        self._passed_on[stage] = _PassedOn(step, to, Patience(SUSPECT_S, time.monotonic()))

    def sent_to(self, node: str) -> list[Step]:
        """The last step that each stage here sent to a node; they are not watched any more."""
        stages = [stage for stage, passed in self._passed_on.items() if passed.to == node]
        return [self._passed_on.pop(stage).step for stage in stages]

    def forget(self, stage: str) -> None:
        """The stage is gone."""
        self._passed_on.pop(stage, None)

    async def run(self) -> NoReturn:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now_s: float) -> None:
        """Kill the workers whose steps are overdue, and report the steps that went to silent nodes."""
        for queue in list(self._running.values()):
            if not queue:  # its worker was killed just now, for another stage's step
                continue
            first = queue[0]
            first.patience.spend(now_s)
            if first.patience.is_over:
                self._end_hung(first)
        for stage, passed in list(self._passed_on.items()):
            passed.patience.spend(now_s)
            if passed.patience.is_over and not self._is_heard(passed.to):
                del self._passed_on[stage]
                self._on_unheard(passed.step, passed.to)

    def _end_hung(self, running: RunningStep) -> None:
        del self._running[running.stage]
        size = f"{running.n_tokens} token{'' if running.n_tokens == 1 else 's'}"
        reason = f"{running.what} hung: no answer to a step of {size} within {running.patience.limit_s:.1f} s"
        log.error("worker hung pid=%d step=%d reason=%s", running.worker.pid, running.step.step, reason)
        running.worker.kill(reason)
