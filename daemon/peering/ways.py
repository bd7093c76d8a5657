"""How peers are reached: by dialling, on connections that they dialled, or through a relay; and who reaches us.

Which way is taken is decided in `hexmesh.membership.reach`. While a peer is reached in another way than by
dialling, dialling is tried again from time to time, and what can move to the direct way does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import msgspec

from daemon.peering.address import Address
from daemon.peering.circuits import Circuits
from daemon.peering.connection import CLOSED_HERE, Loss
from daemon.peering.direct_check import why_not_dialable
from daemon.peering.incoming import Incoming
from daemon.peering.outgoing import MOVED, Judge, Outgoing
from hexmesh.errors import Lost
from hexmesh.ids import NodeId, short
from hexmesh.membership.reach import DirectWay, OwnReach, Way, choose_way
from hexmesh.wire.circuits import CallMe, CircuitOffered, OpenCircuit, TakeCircuit, Undialable
from hexmesh.wire.peering import Channel

_log = logging.getLogger("hexmesh.peers")

MAX_TAKES = 64
CALL_BACK_S = 5.0
"""A peer that is asked to dial has done so by then."""
_CHECK_PERIOD_S = 0.5
_MAX_CHECKS = 8
_QUIET_S = 1.0
_MOVE_PATIENCE_S = 10.0
"""A channel that never rests is moved to a better way after this, and its owner told that messages may be lost."""


class WaysOwner(Judge, Protocol):
    """The switchboard, as far as ways need it."""

    def address_of(self, node_id: NodeId) -> Address | None: ...

    def is_up(self, node_id: NodeId) -> bool: ...

    def incoming_of(self, node_id: NodeId) -> Mapping[Channel, Incoming]:
        """Connections that the peer dialled."""

    def outgoing_of(self, node_id: NodeId) -> Iterable[Outgoing]: ...

    def send(self, node_id: NodeId, message: msgspec.Struct) -> None: ...

    def accept_circuit(self, sock: socket.socket) -> None:
        """Speak to the node at the other end, which opened the circuit."""

    def complain(self, who: str, reason: str) -> None: ...

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]: ...


@dataclass(slots=True)
class _PeerWay:
    direct: DirectWay = field(default_factory=DirectWay)
    is_checked: bool = False
    """A check of the direct way is under way."""
    is_told_undialable: bool = False
    """Its record says so."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it dialled us."""


class Ways:
    """Owner of what is known of the way to each peer, of this node's circuits, and of what others say of us."""

    def __init__(self, owner: WaysOwner, context: ssl.SSLContext, on_reach: Callable[[], None]) -> None:
        self._owner = owner
        self._context = context
        self._on_reach = on_reach
        self._circuits = Circuits(context, owner)
        self._ways: dict[NodeId, _PeerWay] = {}
        self._relays: set[NodeId] = set()
        self._n_taking = 0
        self.reach = OwnReach()
        """Who dials this node, and who cannot."""

    async def drain(self, patience_s: float) -> None:
        """Let circuits whose ends here are closed pass on their last bytes."""
        await self._circuits.drain(patience_s)

    def close(self) -> None:
        """End this node's circuits."""
        self._circuits.close()

    def direct(self, node: NodeId) -> DirectWay:
        """What is known of dialling the peer."""
        return self._way(node).direct

    def learn(self, node: NodeId, *, is_relay: bool, is_dialable: bool) -> None:
        """What a peer's record says."""
        (self._relays.add if is_relay else self._relays.discard)(node)
        way = self._way(node)
        if way.is_told_undialable != is_dialable:
            return
        way.is_told_undialable = not is_dialable
        if is_dialable:
            way.direct.look_again()
        else:
            way.direct.presume_closed("others cannot dial it")

    def forget(self, node: NodeId) -> None:
        """The peer is not known any more."""
        self._relays.discard(node)
        self._ways.pop(node, None)
        self._note_reach(lambda: self.reach.forget(node))

    # What a link that wants a connection asks.

    def way_of(self, link: Outgoing) -> Way:
        has_accepted = link.channel in self._owner.incoming_of(link.node_id)
        is_dialable = self.direct(link.node_id).is_open
        return self._choose(
            link.node_id, is_dialable=is_dialable, has_accepted=has_accepted, failed=link.failed
        )

    def way_of_bulk(self, node: NodeId, failed: Way | None = None) -> Way:
        """How to get a bulk connection, when `failed` was tried in vain just now.

        A dial for bulk that failed says little of dialling in general, so it is held against this try alone.
        """
        is_dialable = self.direct(node).is_open and failed != "direct"
        return self._choose(node, is_dialable=is_dialable, has_accepted=False, failed=failed)

    def _choose(self, node: NodeId, *, is_dialable: bool, has_accepted: bool, failed: Way | None) -> Way:
        control = self._owner.incoming_of(node).get("control")
        return choose_way(
            is_dialable=is_dialable,
            has_accepted=has_accepted,
            is_heard=control is not None and not control.is_relayed,
            has_relay=bool(self._relays_to(node)),
            failed=failed,
        )

    async def called_back(self, link: Outgoing) -> Incoming:
        """The connection that the peer dialled for this channel, asked for if there is none. Raises Lost."""
        if link.channel not in self._owner.incoming_of(link.node_id) and link.channel != "control":
            self._owner.send(link.node_id, CallMe(channel=link.channel))
        try:
            async with asyncio.timeout(CALL_BACK_S):
                return await self._arrival(link)
        except TimeoutError:
            raise Lost(f"node {short(link.node_id)} did not call back") from None

    async def _arrival(self, link: Outgoing) -> Incoming:
        way = self._way(link.node_id)
        while (incoming := self._owner.incoming_of(link.node_id).get(link.channel)) is None:
            way.arrived.clear()
            await way.arrived.wait()
        return incoming

    async def open_circuit(self, node: NodeId, turn: int) -> socket.socket:
        """A socket with the peer at its other end, through one relay after another. Raises Lost."""
        relays = self._relays_to(node)
        if not relays:
            raise Lost("no relay is connected")
        relay, address = relays[turn % len(relays)]
        return await self._circuits.dial(relay, address, OpenCircuit(to=node))

    def _relays_to(self, node: NodeId) -> list[tuple[NodeId, Address]]:
        """Relays that are up, other than the node itself."""
        return [
            (relay, address)
            for relay in sorted(self._relays - {node})
            if self._owner.is_up(relay) and (address := self._owner.address_of(relay)) is not None
        ]

    # What happens to connections.

    def came_up(self, link: Outgoing) -> None:
        """A link to the peer has a connection."""
        if link.way == "direct":
            self._dialled(link.node_id)
        elif link.channel == "control":
            reason = self.direct(link.node_id).reason
            address = str(self._owner.address_of(link.node_id))
            self._owner.send(link.node_id, Undialable(address=address, reason=reason))

    def arrived(self, node: NodeId, *, is_relayed: bool) -> None:
        """The peer dialled this node, itself or through a relay."""
        self._way(node).arrived.set()
        if not is_relayed:
            self._note_reach(lambda: self.reach.reached(node))

    def dial_failed(self, node: NodeId, loss: Loss) -> None:
        """Dialling the peer came to nothing."""
        direct = self.direct(node)
        if self._owner.incoming_of(node) and direct.is_open:
            _log.warning(
                "peer reaches this node and cannot be dialled node=%s address=%s reason=%s "
                "next_step=open its peer port to other nodes, or give it --advertise",
                short(node),
                self._owner.address_of(node),
                loss.message,
            )
        direct.failed(loss.message, asyncio.get_running_loop().time())

    def receive(self, node: NodeId, message: Undialable | CircuitOffered) -> None:
        """The peer says that it cannot dial this node, or, as a relay, that a third one cannot."""
        match message:
            case Undialable():
                _log.debug("peer cannot dial this node node=%s reason=%s", short(node), message.reason)
                self._note_reach(lambda: self.reach.missed(node, f"{message.address}: {message.reason}"))
            case CircuitOffered():
                if node in self._relays and self._n_taking < MAX_TAKES:
                    self._owner.start(self._take_circuit(node, message))

    async def _take_circuit(self, relay: NodeId, offer: CircuitOffered) -> None:
        address = self._owner.address_of(relay)
        if address is None:
            return
        self._n_taking += 1
        try:
            sock = await self._circuits.dial(relay, address, TakeCircuit(circuit=offer.circuit))
        except Lost as error:
            self._owner.complain(short(NodeId(offer.src)), error.message)
        else:
            self._owner.accept_circuit(sock)
        finally:
            self._n_taking -= 1

    # The direct way, again.

    async def keep_checking(self) -> NoReturn:
        """Try to dial peers that are reached in another way, each when it is due."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_CHECK_PERIOD_S)
            n_free = _MAX_CHECKS - sum(way.is_checked for way in self._ways.values())
            now_s = loop.time()
            due = [
                node for node, way in self._ways.items() if not way.is_checked and way.direct.is_due(now_s)
            ]
            for node in [node for node in due if self._owner.is_up(node)][:n_free]:
                if (address := self._owner.address_of(node)) is not None:
                    self._owner.start(self._check(node, address))

    async def _check(self, node: NodeId, address: Address) -> None:
        way = self._way(node)
        way.is_checked = True
        try:
            loss = await why_not_dialable(address, node, self._context, self._owner)
        finally:
            way.is_checked = False
        if loss is not None:
            self.dial_failed(node, loss)
        else:
            self._dialled(node)

    def _dialled(self, node: NodeId) -> None:
        """The direct way works; what took another one moves to it."""
        direct = self.direct(node)
        was_open = direct.is_open
        direct.worked()
        if was_open:
            return
        _log.info("peer can be dialled node=%s address=%s", short(node), self._owner.address_of(node))
        for link in self._owner.outgoing_of(node):
            if link.is_up and link.way != "direct":
                self._owner.start(_move(link))

    def _note_reach(self, note: Callable[[], None]) -> None:
        was_dialable = self.reach.is_dialable
        note()
        if self.reach.is_dialable == was_dialable:
            return
        if was_dialable:
            node, reason = next(iter(self.reach.missed_by.items()))
            _log.warning(
                "others cannot dial this node: node=%s says %s next_step=open its peer port, give --advertise, "
                "or run hexmesh bootstrap at an address that both reach",
                short(NodeId(node)),
                reason,
            )
        else:
            _log.info("others can dial this node now")
        self._on_reach()

    def _way(self, node: NodeId) -> _PeerWay:
        return self._ways.setdefault(node, _PeerWay())


async def _move(link: Outgoing) -> None:
    """Leave the present connection when nothing is on it; control repeats itself, and probes are lost gladly."""
    loop = asyncio.get_running_loop()
    stop_s = loop.time() + _MOVE_PATIENCE_S
    is_lossless = link.channel in ("control", "probe") or link.is_quiet(_QUIET_S)
    while not is_lossless and loop.time() < stop_s:
        await asyncio.sleep(_QUIET_S / 10)
        is_lossless = link.is_quiet(_QUIET_S)
    if link.way != "direct":
        link.drop_connection(MOVED if is_lossless else CLOSED_HERE)
