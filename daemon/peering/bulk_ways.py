"""How bulk connections are got: as others are, except that a peer that dials back answers on that connection."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, Protocol, assert_never
from weakref import WeakSet

import msgspec

from daemon.peering.address import Address
from daemon.peering.bulk import BulkSocket
from daemon.peering.bulk_dial import BulkDialler
from daemon.peering.incoming import Incoming
from daemon.peering.ways import CALL_BACK_S, Ways
from hexmesh.errors import HexmeshError, Lost
from hexmesh.identity.certificates import MemberIdentity
from hexmesh.ids import NodeId, short
from hexmesh.membership.reach import Way
from hexmesh.wire.circuits import CallMe

MAX_CALLS_BACK = 4
"""Dials under way at once because one peer asked for them."""


class BulkOwner(Protocol):
    """The switchboard, as far as bulk connections need it."""

    def address_of(self, node_id: NodeId) -> Address | None: ...

    def send(self, node_id: NodeId, message: msgspec.Struct) -> None: ...

    def complain(self, who: str, reason: str) -> None: ...

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


class BulkWays:
    """Owner of what is being opened. Threads own the connections; here they are known only to abort them.

    `serve` takes connections on which peers ask; None: they get no answers.
    """

    def __init__(
        self,
        owner: BulkOwner,
        ways: Ways,
        dialler: BulkDialler,
        serve: Callable[[BulkSocket], None] | None,
    ) -> None:
        self._owner = owner
        self._ways = ways
        self._dialler = dialler
        self._serve = serve
        self._sockets: WeakSet[BulkSocket] = WeakSet()
        self._awaited: dict[asyncio.Future[BulkSocket], NodeId] = {}
        """Who was asked to dial, the longest ago first."""
        self._n_calls_back: Counter[NodeId] = Counter()
        self._turns = count()

    async def open(self, node_id: NodeId) -> BulkSocket:
        """A connection on which the peer answers, got in a second way if the first fails. Raises Lost or Refused."""
        address = self._owner.address_of(node_id)
        if address is None:
            raise Lost(f"no way to node {short(node_id)} is known", code="unknown_peer")
        way = self._ways.way_of_bulk(node_id)
        try:
            sock = await self._open(node_id, address, way)
        except Lost:
            other = self._ways.way_of_bulk(node_id, failed=way)
            if other == way:
                raise
            sock = await self._open(node_id, address, other)
        self._sockets.add(sock)
        return sock

    def accept(self, incoming: Incoming) -> None:
        """A member dialled: to ask, or because it was asked to."""
        take = self._taker(incoming)
        if take is None:
            incoming.close()
            return
        sock = incoming.detach()
        self._sockets.add(sock)
        take(sock)

    def call_back(self, node_id: NodeId) -> None:
        """The peer has questions and cannot dial this node."""
        address = self._owner.address_of(node_id)
        if self._serve is None or address is None or self._n_calls_back[node_id] >= MAX_CALLS_BACK:
            return
        self._n_calls_back[node_id] += 1
        calling = self._owner.start(self._call_back(node_id, address, self._serve))
        calling.add_done_callback(lambda _: self._n_calls_back.subtract([node_id]))

    def abort(self, which: Callable[[MemberIdentity], bool] = lambda member: True) -> None:
        """End the connections with these members."""
        for sock in list(self._sockets):
            if which(sock.member):
                sock.abort()

    async def _open(self, node_id: NodeId, address: Address, way: Way) -> BulkSocket:
        match way:
            case "direct":
                return await self._dialler.dial(node_id, address)
            case "accepted" | "call_back":
                return await self._called_back(node_id)
            case "circuit":
                circuit = await self._ways.open_circuit(node_id, next(self._turns))
                return await self._dialler.greet(node_id, circuit, "its end of a circuit")
            case _:
                assert_never(way)

    async def _called_back(self, node_id: NodeId) -> BulkSocket:
        asker: asyncio.Future[BulkSocket] = asyncio.get_running_loop().create_future()
        self._awaited[asker] = node_id
        self._owner.send(node_id, CallMe(channel="bulk"))
        try:
            async with asyncio.timeout(CALL_BACK_S):
                return await asker
        except BaseException as error:
            if asker.done() and not asker.cancelled():
                asker.result().close()
            if isinstance(error, TimeoutError):
                raise Lost(f"node {short(node_id)} did not call back", code="unreachable") from None
            raise
        finally:
            del self._awaited[asker]

    def _taker(self, incoming: Incoming) -> Callable[[BulkSocket], None] | None:
        assert incoming.member is not None
        assert incoming.hello is not None
        if not incoming.hello.is_call_back:
            return self._serve
        for asker, asked in self._awaited.items():
            if asked == incoming.member.node_id and not asker.done():
                return asker.set_result
        return None

    async def _call_back(
        self, node_id: NodeId, address: Address, serve: Callable[[BulkSocket], None]
    ) -> None:
        try:
            sock = await self._dialler.dial(node_id, address, is_call_back=True)
        except HexmeshError as error:
            self._owner.complain(short(node_id), error.message)
        else:
            self._sockets.add(sock)
            serve(sock)
