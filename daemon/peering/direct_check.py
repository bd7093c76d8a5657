"""Whether a peer that could not be dialled can be now: a handshake, and nothing said."""

from __future__ import annotations

import asyncio
import ssl

from daemon.peering.address import Address
from daemon.peering.connection import CLOSED_HERE, FrameConnection, Loss, loss_of
from daemon.peering.outgoing import CONNECT_S, Judge, connect_tcp, why_not_node
from hexmesh.errors import InvalidInput
from hexmesh.ids import NodeId
from hexmesh.wire.frames import Frame
from hexmesh.wire.peering import JOIN_LIMITS


async def why_not_dialable(
    address: Address, node_id: NodeId, context: ssl.SSLContext, judge: Judge
) -> Loss | None:
    """Dial the peer and hang up; None if it was reached, and it was that node."""
    check = _Check(address, node_id, judge)
    try:
        async with asyncio.timeout(CONNECT_S):
            sock = await connect_tcp(address)
            connection = FrameConnection(sock, context, check, JOIN_LIMITS, is_server=False)
            try:
                return await check.found
            finally:
                connection.close()
    except OSError as error:
        return loss_of(error)


class _Check:
    """Owner of one connection's events."""

    def __init__(self, address: Address, node_id: NodeId, judge: Judge) -> None:
        self.found: asyncio.Future[Loss | None] = asyncio.get_running_loop().create_future()
        self._address = address
        self._node_id = node_id
        self._judge = judge

    def on_open(self, connection: FrameConnection) -> None:
        if not self.found.done():
            self.found.set_result(why_not_node(connection, self._node_id, str(self._address), self._judge))

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        raise InvalidInput("a frame before a greeting")

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        if not self.found.done():
            self.found.set_result(loss if loss is not CLOSED_HERE else None)
