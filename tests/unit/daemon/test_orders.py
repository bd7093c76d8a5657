"""Orders find the node that they are for, and come back with its standing or its refusal."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from daemon import orders
from daemon.orders import NodeOrders
from hexmesh.errors import Lost, NoRoom, TimedOut
from hexmesh.membership.records import Directory, KnownRecord
from hexmesh.wire.orders import NodeOrder, NodeReply, NodeStanding, OrderAction
from tests.node_records import node_record

TOKYO, OSAKA = "a" * 40, "b" * 40


def directory_of(**nodes: str) -> Directory:
    directory = Directory()
    for name, node in nodes.items():
        record = node_record(node, name=name)
        directory.merge(KnownRecord(record=record, key_hash=b"", expires_at_unix_s=1e10, signed=b""))
    return directory


class FakeUpkeep:
    """Obeys, or has no room."""

    def __init__(self, node: str, *, has_room: bool = True) -> None:
        self.node = node
        self.has_room = has_room
        self.obeyed: list[tuple[OrderAction, float]] = []

    async def obey(self, action: OrderAction, deadline_s: float) -> NodeStanding:
        if not self.has_room:
            raise NoRoom("no room", code="no_room", next_step="add some", needed_bytes=3, room_bytes=2)
        self.obeyed.append((action, deadline_s))
        return NodeStanding(
            id=self.node, name="n", availability="drained", stages=1, requests_left=2, drain_left_s=3.0
        )


class FakeWire:
    """Two nodes and what travels between them."""

    def __init__(self, group: asyncio.TaskGroup, osaka: FakeUpkeep) -> None:
        self.is_cut = self.is_deaf = False
        self.ends: dict[str, NodeOrders] = {}
        directory = directory_of(tokyo=TOKYO, osaka=OSAKA)
        for node, upkeep in ((TOKYO, FakeUpkeep(TOKYO)), (OSAKA, osaka)):
            end = FakeEnd(self, node)
            self.ends[node] = NodeOrders(
                courier=cast(Any, end), group=group, directory=directory, upkeep=cast(Any, upkeep)
            )

    def carry(self, src: str, to: str, message: NodeOrder | NodeReply) -> bool:
        if self.is_cut:
            return False
        if isinstance(message, NodeReply):
            self.ends[to].on_reply(src, message)
        elif not self.is_deaf:
            self.ends[to].on_order(src, message)
        return True


class FakeEnd:
    def __init__(self, wire: FakeWire, node_id: str) -> None:
        self.wire = wire
        self.node_id = node_id

    def send(self, to: str, message: Any, payload: bytes = b"", *, channel: str = "data") -> bool:
        return self.wire.carry(self.node_id, to, message)


async def test_an_order_is_obeyed_where_it_is_meant_for() -> None:
    osaka = FakeUpkeep(OSAKA)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        wire = FakeWire(group, osaka)
        standing = await wire.ends[TOKYO].give("osaka", "drain", 7.0)
        here = await wire.ends[OSAKA].give(OSAKA[:6], "show")
    assert (standing.id, standing.requests_left, here.id) == (OSAKA, 2, OSAKA)
    assert osaka.obeyed == [("drain", 7.0), ("show", 0.0)]


async def test_a_refusal_comes_back_with_its_bytes() -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        wire = FakeWire(group, FakeUpkeep(OSAKA, has_room=False))
        with pytest.raises(NoRoom, match="no room") as refused:
            await wire.ends[TOKYO].give("osaka", "drain")
    assert (refused.value.needed_bytes, refused.value.room_bytes, refused.value.exit_code) == (3, 2, 4)


async def test_a_node_that_cannot_be_reached_or_is_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "ANSWER_S", 0.05)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        wire = FakeWire(group, FakeUpkeep(OSAKA))
        wire.is_deaf = True
        with pytest.raises(TimedOut, match="osaka did not answer"):
            await wire.ends[TOKYO].give("osaka", "cordon")
        wire.is_cut = True
        with pytest.raises(Lost, match="osaka cannot be reached"):
            await wire.ends[TOKYO].give("osaka", "cordon")
