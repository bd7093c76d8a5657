"""Operators' orders to nodes: given at any peer, carried to the node that they are for, answered with its standing."""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import dataclass, field

from daemon.courier import Courier
from daemon.naming import find_node
from daemon.upkeep import Upkeep
from hexmesh.errors import HexmeshError, Lost, NoRoom, Refused, TimedOut
from hexmesh.membership.records import Directory, NodeRecord
from hexmesh.wire.orders import NodeOrder, NodeReply, NodeStanding, OrderAction, OrderFailure

log = logging.getLogger("hexmesh.orders")

ANSWER_S = 20.0
"""How long a node may take to answer: a drain looks for other room first."""


@dataclass(slots=True)
class NodeOrders:
    """Owner of the orders that wait for their answers."""

    courier: Courier
    group: asyncio.TaskGroup
    directory: Directory
    upkeep: Upkeep
    _waiting: dict[tuple[str, int], asyncio.Future[NodeReply]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def give(self, node: str, action: OrderAction, deadline_s: float = 0.0) -> NodeStanding:
        """The node's standing after the order; `node` is a name, an id or the start of one.

        Raises InvalidInput, NoRoom, Refused, Lost or TimedOut.
        """
        records = {one.node: one for one in self.directory.records()}
        record = records[find_node({one.node: one.name for one in records.values()}, node)]
        if record.node == self.courier.node_id:
            return await self.upkeep.obey(action, deadline_s)
        return _standing_of(await self._ask(record, action, deadline_s))

    def on_order(self, src: str, order: NodeOrder) -> None:
        """A peer passes an order for this node on."""
        self.group.create_task(self._answer(src, order), name=f"order-{order.action}")

    def on_reply(self, src: str, reply: NodeReply) -> None:
        """The answer to an order that was given here."""
        waiting = self._waiting.get((src, reply.order))
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    async def _ask(self, record: NodeRecord, action: OrderAction, deadline_s: float) -> NodeReply:
        order = NodeOrder(order=next(self._numbers), action=action, deadline_s=deadline_s)
        key = (record.node, order.order)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            if not self.courier.send(record.node, order, channel="control"):
                raise Lost(
                    f"{record.name} cannot be reached",
                    code="node_unreachable",
                    next_step="a node keeps its availability itself: start it, or see hexmesh members",
                )
            async with asyncio.timeout(ANSWER_S):
                return await self._waiting[key]
        except TimeoutError:
            raise TimedOut(
                f"{record.name} did not answer within {ANSWER_S:.0f} s", next_step="see hexmesh members"
            ) from None
        finally:
            del self._waiting[key]

    async def _answer(self, src: str, order: NodeOrder) -> None:
        try:
            standing = await self.upkeep.obey(order.action, order.deadline_s)
        except HexmeshError as error:
            reply = NodeReply(order=order.order, standing=None, failure=_as_failure(error))
        else:
            reply = NodeReply(order=order.order, standing=standing)
        self.courier.send(src, reply, channel="control")


def _as_failure(error: HexmeshError) -> OrderFailure:
    bytes_of = (
        {"needed_bytes": error.needed_bytes, "room_bytes": error.room_bytes}
        if isinstance(error, NoRoom)
        else {}
    )
    return OrderFailure(code=error.code, message=error.message, next_step=error.next_step, **bytes_of)


def _standing_of(reply: NodeReply) -> NodeStanding:
    failure = reply.failure
    if failure is None:
        assert reply.standing is not None
        return reply.standing
    if failure.needed_bytes is not None and failure.room_bytes is not None:
        raise NoRoom(
            failure.message,
            code=failure.code,
            next_step=failure.next_step,
            needed_bytes=failure.needed_bytes,
            room_bytes=failure.room_bytes,
        )
    raise Refused(failure.message, code=failure.code, next_step=failure.next_step)
