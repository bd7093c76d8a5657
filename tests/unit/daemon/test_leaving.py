"""A leaving node goes when nothing needs it, and not later; the mesh's other parts are stand-ins."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from daemon import leaving

ME, OTHER = "me", "other"


@dataclass
class FakeMesh:
    """What a leaving node looks at, and what it says, in order."""

    has_part: bool = True
    flights: list[str] = field(default_factory=list)
    is_draining: bool = False
    blocked: object = None
    others_say: str = "active"
    said: list[str] = field(default_factory=list)
    has_left: asyncio.Event = field(default_factory=asyncio.Event)

    def state(self) -> Any:
        plan = SimpleNamespace(stages_of=lambda node: ["stage"] if self.has_part else [])
        other = SimpleNamespace(two_way=True, state="held")
        mine = SimpleNamespace(two_way=True, state="self")
        return SimpleNamespace(
            node_id=ME,
            is_leaving=False,
            plan_now=lambda: plan,
            coordination=_Coordination(self, SimpleNamespace(members=lambda now_s: {ME: mine, OTHER: other})),
            directory=SimpleNamespace(availability=lambda nodes: {OTHER: self.others_say}),
            gateway=SimpleNamespace(flights=lambda: self.flights),
            epochs=SimpleNamespace(draining_here=lambda: "epoch" if self.is_draining else None),
            loop_time=time.monotonic,
        )

    async def say(self, availability: str) -> None:
        self.said.append(availability)

    async def leave(self) -> None:
        await leaving.drain(self.state(), cast(Any, self))


@dataclass
class _Coordination:
    mesh: FakeMesh
    machine: Any

    @property
    def blocked(self) -> object:
        return self.mesh.blocked

    @property
    def has_left(self) -> asyncio.Event:
        return self.mesh.has_left

    def leave(self) -> None:
        self.mesh.said.append("asked to be let go")
        self.mesh.has_left.set()


ALL_SAID = ["leaving", "asked to be let go", "left"]


async def becomes(task: asyncio.Task[None], mesh: FakeMesh, **changes: object) -> None:
    """The task still waits; then something changes."""
    await asyncio.sleep(3 * leaving._POLL_S)
    assert not task.done()
    assert mesh.said == ["leaving"]
    for name, value in changes.items():
        setattr(mesh, name, value)


async def test_a_node_moves_its_stages_then_ends_its_requests_then_goes() -> None:
    mesh = FakeMesh(flights=["one"], is_draining=True)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(mesh.leave())
        await becomes(task, mesh, has_part=False)
        await becomes(task, mesh, is_draining=False)
        await becomes(task, mesh, flights=[])
    assert mesh.said == ALL_SAID


@pytest.mark.parametrize(
    "stuck",
    [FakeMesh(blocked="too little memory"), FakeMesh(others_say="leaving"), FakeMesh(others_say="left")],
)
async def test_where_nothing_can_take_the_stages_over_only_its_own_clients_are_waited_for(
    stuck: FakeMesh,
) -> None:
    stuck.flights = ["one"]
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(stuck.leave())
        await becomes(task, stuck, flights=[])
    assert stuck.said == ALL_SAID


async def test_every_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REPLAN_PATIENCE_S", "DRAIN_PATIENCE_S", "HAND_OVER_PATIENCE_S"):
        monkeypatch.setattr(leaving, name, 0.05)
    mesh = FakeMesh(flights=["endless"], is_draining=True)
    async with asyncio.timeout(5):
        await mesh.leave()
    assert mesh.said == ALL_SAID
