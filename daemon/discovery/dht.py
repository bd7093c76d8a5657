"""This node's part of the DHT: stores its record, fetches everybody's, and survives the death of p2pd.

Nothing waits for the DHT: records also travel over peer connections, and everyone keeps a local view. When
p2pd dies it is started again with back-off, and all else goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from daemon.discovery.hivemind_import import import_dht_node
from daemon.discovery.libp2p import multiaddr, split_multiaddr
from daemon.discovery.p2pd import P2pd, P2pdOptions, running_p2pd
from daemon.trust.attestor import Attestor
from hexmesh.errors import HexmeshError, InvalidInput, Lost, NotReady, Refused
from hexmesh.membership.records import facts_key, record_head

if TYPE_CHECKING:
    from daemon.discovery.dht_node import HivemindNode

log = logging.getLogger("hexmesh.dht")

FETCH_FIRST_S = 0.5
FIRST_BACKOFF_S = 0.2
LAST_BACKOFF_S = 30.0
STEADY_S = 60.0
"""A DHT that was up for this long starts again without back-off."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0
KNOWN_S = 5.0
"""A peer in the routing table is looked at again after this."""
ROLE_SETTLE_S = 10.0
"""What others say of a node's reach swings while hosts come up; p2pd is not restarted for that."""
_END_PATIENCE_S = 0.5
_MAX_PEERS = 512
_MAX_OWN_MADDRS = 8
_N_MEETINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtOptions:
    """Where the DHT listens (port 0 picks a free one) and whom it asks first.

    `advertise` is (host, port) where others reach it, if that is not where it listens.
    """

    identity_path: Path
    listen_host: str
    port: int
    advertise: tuple[str, int] | None = None
    initial_peers: tuple[str, ...] = ()
    fetch_busy_s: float = 5.0
    """Pause between fetches while members come and go."""
    fetch_quiet_s: float = 15.0


@dataclass(slots=True)
class _Acquaintance:
    """A DHT peer by address, and when to try it again."""

    maddr: str
    retry_s: float = FIRST_RETRY_S
    next_try_s: float = 0.0
    complaint: str = ""


class MeshDht:
    """Owns p2pd and the DHT node on it; `run` keeps both alive.

    `on_record(signed)` gets every record that was fetched and differs from the last of that node; it verifies
    (`open_record`) and merges. It is called in the event loop and must not block.
    """

    def __init__(
        self,
        options: DhtOptions,
        attestor: Attestor,
        *,
        on_record: Callable[[bytes], object],
    ) -> None:
        self._options = options
        self._attestor = attestor
        self._on_record = on_record
        self._key = facts_key(attestor.mesh_id)
        self._port = options.port
        self._own_record: bytes | None = None
        self._own_changed = asyncio.Event()
        self._peers_changed = asyncio.Event()
        self._peers_met = asyncio.Event()
        self._acquaintances: dict[str, _Acquaintance] = {}
        self._last_seen: dict[str, bytes] = {}
        self._is_client = False
        self._settling: asyncio.TimerHandle | None = None
        self._role_changed = asyncio.Event()
        self._up = asyncio.Event()
        self._n_starts = 0
        self.maddrs: tuple[str, ...] = ()
        """Where other members reach this DHT node; for the node's record. Empty until it was up once."""
        self.fault: str | None = "it has not started yet"
        """Why the DHT is down; None while it is up."""
        self.pid: int | None = None
        """The p2pd process, while there is one."""
        self.node: HivemindNode | None = None
        """The DHT node on it, while there is one."""
        self.add_peers(options.initial_peers)

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    @property
    def port(self) -> int:
        """Where it listens; 0 until a free port was picked."""
        return self._port

    @property
    def n_starts(self) -> int:
        """How often p2pd was started."""
        return self._n_starts

    async def wait_up(self) -> None:
        """Wait until the DHT is up; the caller sets the deadline."""
        await self._up.wait()

    def publish(self, signed: bytes) -> None:
        """Store this record of ours from now on."""
        self._own_record = signed
        self._own_changed.set()

    def add_peers(self, maddrs: Iterable[str]) -> None:
        """Addresses of DHT peers, from certificates, records or a join; those known already do no harm."""
        for maddr in maddrs:
            try:
                _, peer_id = split_multiaddr(maddr)
            except InvalidInput as error:
                log.debug("DHT peer ignored reason=%s", error.message)
                continue
            known = self._acquaintances.get(peer_id)
            is_news = known is None or known.maddr != maddr
            if peer_id != self._attestor.dht_peer_id and is_news and len(self._acquaintances) < _MAX_PEERS:
                self._acquaintances[peer_id] = _Acquaintance(maddr)
                self._peers_changed.set()

    def forget_peer(self, peer_id: str) -> None:
        """Stop dialling a peer that was removed from the mesh."""
        self._acquaintances.pop(peer_id, None)

    def serve(self, *, is_dialable: bool) -> None:
        """Only nodes that others can dial hold keys; another one asks as a client, and nobody waits for it."""
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.get_running_loop().call_later(ROLE_SETTLE_S, self._set_role, not is_dialable)

    def _set_role(self, is_client: bool) -> None:
        if self._is_client != is_client:
            self._is_client = is_client
            self._role_changed.set()

    async def run(self) -> NoReturn:
        """Keep the DHT up until cancelled. p2pd ends with it."""
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        while True:
            started_s = loop.time()
            try:
                await self._run_once()
                continue
            except* (Lost, Refused, NotReady) as group:
                fault = _first(group)
            if loop.time() - started_s > STEADY_S:
                backoff_s = FIRST_BACKOFF_S
            if fault.message != self.fault:
                log.warning("DHT down reason=%s retry_s=%.1f", fault.one_line(), backoff_s)
            self.fault = fault.message
            await asyncio.sleep(backoff_s)
            backoff_s = min(LAST_BACKOFF_S, 2 * backoff_s)

    async def _run_once(self) -> None:
        """One life of p2pd, in one role. Raises a group of Lost when it ends or hangs."""
        module = await asyncio.to_thread(import_dht_node)
        async with running_p2pd(self._p2pd_options()) as p2pd:
            self._n_starts += 1
            self.pid = p2pd.pid
            try:
                self._role_changed.clear()
                node = await module.HivemindNode.open(
                    p2pd.control_socket, self._attestor, time.time, is_client=self._is_client
                )
                await self._serve_in_role(p2pd, node)
            except* Lost:
                raise Lost(await _why_it_ended(p2pd), code="dht_down") from None
            finally:
                self.pid = None

    async def _serve_in_role(self, p2pd: P2pd, node: HivemindNode) -> None:
        """Returns when this node is to change its role. Raises a group of Lost when p2pd ends or hangs."""
        self.node = node
        serving = asyncio.create_task(self._serve(p2pd, node), name="dht-serve")
        changing = asyncio.create_task(self._role_changed.wait(), name="dht-role")
        try:
            await asyncio.wait((serving, changing), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
            log.info("DHT role is %s now", "client" if self._is_client else "server")
        finally:
            self._up.clear()
            self.node = None
            for task in (serving, changing):
                task.cancel()
            await asyncio.wait((serving, changing))
            await node.close()

    async def _serve(self, p2pd: P2pd, node: HivemindNode) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            group.create_task(_raise_at_end(p2pd), name="dht-p2pd")
            await self._note_address(node)
            self._set_up()
            for acquaintance in self._acquaintances.values():
                acquaintance.next_try_s, acquaintance.retry_s = 0.0, FIRST_RETRY_S
            group.create_task(self._keep_meeting(node), name="dht-meet")
            group.create_task(self._keep_storing(node), name="dht-store")
            group.create_task(self._keep_fetching(node), name="dht-fetch")
        raise AssertionError("unreachable")

    def _p2pd_options(self) -> P2pdOptions:
        advertise = self._options.advertise
        return P2pdOptions(
            identity_path=self._options.identity_path,
            listen=multiaddr(self._options.listen_host, self._port),
            announce=multiaddr(*advertise) if advertise is not None else None,
        )

    async def _note_address(self, node: HivemindNode) -> None:
        """Remember the port that was picked, so that a restart comes back where others look for it."""
        self.maddrs = (await node.own_maddrs())[:_MAX_OWN_MADDRS]
        if self._port == 0 and self._options.advertise is None and self.maddrs:
            address, _ = split_multiaddr(self.maddrs[0])
            self._port = int(address.rpartition("/")[2])

    def _set_up(self) -> None:
        if self.fault is not None:
            log.info("DHT up pid=%s address=%s", self.pid, ",".join(self.maddrs))
        self.fault = None
        self._up.set()

    async def _keep_storing(self, node: HivemindNode) -> NoReturn:
        while True:
            self._own_changed.clear()
            if self._own_record is not None:
                await self._store(node, self._own_record)
            await self._own_changed.wait()

    async def _store(self, node: HivemindNode, signed: bytes) -> None:
        head = record_head(signed)
        with suppress(Lost):
            if not await node.store(self._key, head.subkey, signed, head.expires_at_unix_s):
                log.debug("DHT kept a newer record than ours")

    async def _keep_fetching(self, node: HivemindNode) -> NoReturn:
        """Fetch all records: soon again while they change, seldom when they do not."""
        pause_s = FETCH_FIRST_S
        while True:
            has_changed = await self._fetch(node)
            try:
                async with asyncio.timeout(self._options.fetch_busy_s if has_changed else pause_s):
                    await self._peers_met.wait()
                    self._peers_met.clear()
            except TimeoutError:
                pause_s = min(self._options.fetch_quiet_s, 2 * pause_s)
                self.maddrs = (await node.own_maddrs())[:_MAX_OWN_MADDRS]

    async def _fetch(self, node: HivemindNode) -> bool:
        """Pass on what is new; True if something was."""
        try:
            found = await node.fetch(self._key)
        except Lost as error:
            log.debug("DHT fetch failed reason=%s", error.message)
            return False
        news = {
            subkey: signed
            for subkey, signed in found.items()
            if subkey != self._attestor.node_id and self._last_seen.get(subkey) != signed
        }
        is_view_new = bool(found.keys() - self._last_seen.keys() - {self._attestor.node_id})
        self._last_seen = found
        for signed in news.values():
            self._on_record(signed)
        return is_view_new

    async def _keep_meeting(self, node: HivemindNode) -> NoReturn:
        """Get to know every peer whose address is known and that is not in the routing table."""
        loop = asyncio.get_running_loop()
        while True:
            self._peers_changed.clear()
            strangers = self._due_strangers(node, loop.time())
            met = await asyncio.gather(*(self._meet(node, one) for one in strangers))
            if any(met):
                with suppress(Lost):
                    await node.find_neighbours()
                self._own_changed.set()
                self._peers_met.set()
            if len(strangers) < _N_MEETINGS:
                with suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_RETRY_S):
                        await self._peers_changed.wait()

    def _due_strangers(self, node: HivemindNode, now_s: float) -> list[_Acquaintance]:
        strangers = []
        for peer in self._acquaintances.values():
            if peer.next_try_s > now_s:
                continue
            if node.knows(peer.maddr):
                peer.next_try_s = now_s + KNOWN_S
                continue
            strangers.append(peer)
            if len(strangers) == _N_MEETINGS:
                break
        return strangers

    async def _meet(self, node: HivemindNode, peer: _Acquaintance) -> bool:
        complaint = ""
        try:
            await node.meet(peer.maddr)
        except Lost as error:
            log.debug("DHT peer not met reason=%s", error.message)
        except Refused as error:
            complaint = error.code or error.message
            if complaint != peer.complaint:
                log.warning("DHT peer not met reason=%s", error.one_line())
        else:
            peer.retry_s = FIRST_RETRY_S
            peer.complaint = ""
            return True
        peer.complaint = complaint
        peer.next_try_s = asyncio.get_running_loop().time() + peer.retry_s
        peer.retry_s = min(LAST_RETRY_S, 2 * peer.retry_s)
        return False


async def _raise_at_end(p2pd: P2pd) -> NoReturn:
    raise Lost(await p2pd.wait(), code="dht_down")


async def _why_it_ended(p2pd: P2pd) -> str:
    """Calls often fail a moment before the process is known to be dead, and say less about it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_END_PATIENCE_S):
            return await p2pd.wait()
    return "p2pd does not answer"


def _first(group: BaseExceptionGroup[HexmeshError]) -> HexmeshError:
    """One failure of a group: all of them come from the same end of p2pd."""
    error = group.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
