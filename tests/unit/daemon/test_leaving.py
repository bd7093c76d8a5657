"""A leaving node serves its stages until they are quiet; the mesh's other parts are stand-ins."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from daemon import leaving


def state_that_the_mesh_has_left_behind() -> Any:
    """Another plan is in force elsewhere, and nothing entered here."""
    has_left = asyncio.Event()
    has_left.set()
    machine = SimpleNamespace(members=lambda now_s: {})
    return SimpleNamespace(
        is_leaving=False,
        coordination=SimpleNamespace(leave=lambda: None, has_left=has_left, blocked=None, machine=machine),
        gateway=SimpleNamespace(flights=list),
        epochs=SimpleNamespace(draining=None),
        loop_time=time.monotonic,
    )


async def test_steps_that_still_come_by_keep_a_leaving_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "QUIET_S", 0.1)
    state = state_that_the_mesh_has_left_behind()
    stages = SimpleNamespace(last_step_s=time.monotonic())

    async def keep_stepping() -> None:
        for _ in range(6):
            await asyncio.sleep(0.05)
            stages.last_step_s = time.monotonic()

    async with asyncio.TaskGroup() as group:
        group.create_task(keep_stepping())
        await leaving.drain(state, cast(Any, stages))
        left_s = time.monotonic()
    assert state.is_leaving
    assert left_s - stages.last_step_s > 0.1
