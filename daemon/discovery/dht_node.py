"""The only module that imports hivemind: a DHTNode in our event loop, closed to strangers.

Import it through `daemon.discovery.hivemind_import`, off the event loop.

Every request and response carries its sender's certificates and a signature over the whole message, the
time, a nonce and the libp2p peer id of the one that it is for; so a message of a member can be used neither
twice nor elsewhere. Every record is checked on each store and each read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.auth import AuthorizerBase, AuthRole, AuthRPCWrapper
from hivemind.utils.multiaddr import Multiaddr

from daemon.complaints import Complaints
from daemon.discovery.libp2p import split_multiaddr
from daemon.trust.attestor import Attestor
from hexmesh.errors import HexmeshError, Lost, Refused, TimedOut
from hexmesh.ids import short
from hexmesh.membership.records import Chain, open_record
from hexmesh.wire.peering import MAX_CLOCK_DIFFERENCE_S

log = logging.getLogger("hexmesh.dht")

CALL_PATIENCE_S = 3.0
_CONNECT_PATIENCE_S = 5.0
_SEARCH_PATIENCE_S = 12.0
_CLOSE_PATIENCE_S = 1.0
_FRESH_S = 10.0
"""A request is accepted for this long either side of our clock; its nonce is remembered for twice that."""
_NONCE_BYTES = 16
_MAX_CHAIN_BYTES = 16 * 1024
_MAX_JUDGED = 4096
_EXPIRED_SLACK_S = 10.0
_CHAIN = msgspec.msgpack.Decoder(tuple[bytes, ...])


class MemberAuthorizer(AuthorizerBase):  # type: ignore[misc]
    """Signs our calls and refuses those that no member made for us, now, once."""

    def __init__(self, attestor: Attestor, now_unix_s: Callable[[], float]) -> None:
        self._attestor = attestor
        self._now_unix_s = now_unix_s
        self._peer_id = PeerID.from_base58(attestor.dht_peer_id).to_bytes()
        self._nonces: OrderedDict[bytes, float] = OrderedDict()

    async def sign_request(self, request: Any, service_public_key: PeerID | None) -> None:
        """`service_public_key` is the peer id of the one that is called (see `_calls_to`)."""
        assert service_public_key is not None, "every call is for one peer"
        auth = request.auth
        self._fill(auth.client_access_token)
        auth.service_public_key = service_public_key.to_bytes()
        auth.time = self._now_unix_s()
        auth.nonce = secrets.token_bytes(_NONCE_BYTES)
        auth.signature = self._attestor.sign(_signed_part(b"request", request))

    async def validate_request(self, request: Any) -> bool:
        """Raises Refused, which the caller is told; hivemind's own way would answer with an odd error."""
        auth = request.auth
        now_unix_s = self._now_unix_s()
        self._verify(auth.client_access_token, b"request", request)
        if auth.service_public_key != self._peer_id:
            raise Refused("this call is for another DHT peer", code="not_a_member")
        if len(auth.nonce) != _NONCE_BYTES or auth.nonce in self._nonces:
            raise Refused("this call was made before", code="not_a_member")
        if abs(auth.time - now_unix_s) > _FRESH_S:
            raise Refused(f"our clocks differ by {auth.time - now_unix_s:+.1f} s", code="clock_difference")
        self._remember(auth.nonce, now_unix_s)
        return True

    async def sign_response(self, response: Any, request: Any) -> None:
        auth = response.auth
        self._fill(auth.service_access_token)
        auth.nonce = request.auth.nonce
        auth.signature = self._attestor.sign(_signed_part(b"response", response))

    async def validate_response(self, response: Any, request: Any) -> bool:
        auth = response.auth
        try:
            chain = self._verify(auth.service_access_token, b"response", response)
        except Refused as error:
            log.debug("answer of a DHT peer refused: %s", error.message)
            return False
        answerer = PeerID.from_base58(self._attestor.identify(chain).dht_peer_id).to_bytes()
        return bool(auth.nonce == request.auth.nonce and answerer == request.auth.service_public_key)

    def _fill(self, token: Any) -> None:
        token.username = self._attestor.node_id
        token.public_key = msgspec.msgpack.encode(self._attestor.chain)

    def _verify(self, token: Any, role: bytes, message: Any) -> Chain:
        """The sender's chain, if it is a member's and signed the message. Raises Refused."""
        if not 0 < len(token.public_key) <= _MAX_CHAIN_BYTES:
            raise Refused("only members of the mesh may call its DHT", code="not_a_member")
        try:
            chain = _CHAIN.decode(token.public_key)
        except msgspec.DecodeError as error:
            raise Refused("only members of the mesh may call its DHT", code="not_a_member") from error
        signature = message.auth.signature
        self._attestor.verify(chain, _signed_part(role, message), signature)
        return chain

    def _remember(self, nonce: bytes, now_unix_s: float) -> None:
        self._nonces[nonce] = now_unix_s
        while self._nonces and next(iter(self._nonces.values())) < now_unix_s - 2 * _FRESH_S:
            self._nonces.popitem(last=False)


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Lets only signed node records of this mesh pass, each under its signer's id.

    hivemind drops a whole answer if one record in it is not valid. So records of removed members and records
    that expired a moment ago pass here; whoever reads them judges them again (`open_record`).
    """

    def __init__(self, attestor: Attestor, now_unix_s: Callable[[], float]) -> None:
        self._attestor = attestor
        self._now_unix_s = now_unix_s
        self._judged: OrderedDict[bytes, bool] = OrderedDict()
        self._complaints = Complaints()

    def validate(self, record: DHTRecord) -> bool:
        digest = hashlib.sha256(
            b"".join((record.key, record.subkey, repr(record.expiration_time).encode(), b"/", record.value))
        ).digest()
        verdict = self._judged.get(digest)
        if verdict is None:
            verdict = self._judged[digest] = self._judge(record)
            if len(self._judged) > _MAX_JUDGED:
                self._judged.popitem(last=False)
        return verdict

    def _judge(self, record: DHTRecord) -> bool:
        try:
            subkey = msgspec.msgpack.decode(record.subkey, type=str)
            signed = msgspec.msgpack.decode(record.value, type=bytes)
            known = open_record(
                signed,
                mesh_id=self._attestor.mesh_id,
                verify=self._attestor.verify_origin,
                now_unix_s=self._now_unix_s() - _EXPIRED_SLACK_S,
            )
        except (Refused, msgspec.DecodeError, UnicodeDecodeError) as error:
            self._complain(str(error))
            return False
        is_consistent = (
            subkey == known.record.node
            and record.key == known.key_hash
            and abs(record.expiration_time - known.expires_at_unix_s) < 1e-6
        )
        if not is_consistent:
            self._complain(f"{short(known.record.node)}'s record lies in another's place")
        return is_consistent

    def _complain(self, reason: str) -> None:
        if self._complaints.is_news("record", reason, self._now_unix_s()):
            log.warning("DHT record refused reason=%s", reason)


class HivemindNode:
    """A DHTNode on a p2pd that runs already. Calls end within seconds whatever happens to p2pd."""

    def __init__(self, p2p: P2P, node: DHTNode, now_unix_s: Callable[[], float]) -> None:
        self._p2p = p2p
        self._node = node
        self._now_unix_s = now_unix_s
        self._calls: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(
        cls,
        control_socket: Path,
        attestor: Attestor,
        now_unix_s: Callable[[], float] = time.time,
        *,
        is_client: bool = False,
    ) -> HivemindNode:
        """A client asks and is never asked: others do not list it. Raises Lost or TimedOut: p2pd is silent."""
        async with _p2pd_call("p2pd does not answer"):
            p2p = await P2P.replicate(Multiaddr(f"/unix{control_socket}"))
            _retrieve_failures(p2p)
            authorizer = MemberAuthorizer(attestor, now_unix_s)
            node = await DHTNode.create(
                p2p=p2p,
                node_id=DHTID.generate(source=attestor.node_id.encode()),
                wait_timeout=CALL_PATIENCE_S,
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                record_validator=RecordValidator(attestor, now_unix_s),
                authorizer=authorizer,
                client_mode=is_client,
            )
        node.protocol.get_stub = _calls_to(p2p, node.protocol, authorizer)
        return cls(p2p, node, now_unix_s)

    async def close(self) -> None:
        """Let go of p2pd. Handlers are not unregistered: that waits for ever on a dead p2pd."""
        self._node.is_alive = False
        self._p2p.call_protobuf_handler = _fail_at_once
        for answer in list(self._p2p._client.control._pending_calls.values()):
            if not answer.done():
                answer.set_exception(P2PDaemonError("the DHT is closed"))
        if self._calls:
            await asyncio.wait(self._calls, timeout=_CLOSE_PATIENCE_S)
        await self._p2p.shutdown()

    async def own_maddrs(self) -> tuple[str, ...]:
        """Where others reach this node, peer id included. Raises Lost or TimedOut: p2pd is dead or hangs."""
        async with _p2pd_call("p2pd does not answer"):
            return tuple(str(maddr) for maddr in await self._node.get_visible_maddrs(latest=True))

    async def meet(self, maddr: str) -> float:
        """Connect to a DHT peer and get to know each other; how far its clock is ahead, in seconds.

        Raises Lost or TimedOut when it cannot be reached, and Refused when it is no member, refuses us, or
        its clock differs by more than the DHT allows.
        """
        address, peer = split_multiaddr(maddr)
        peer_id = PeerID.from_base58(peer)
        async with _p2pd_call(f"no DHT peer answers at {address}"):
            await self._p2p._client.connect(peer_id, [Multiaddr(address)])
        request = dht_pb2.PingRequest(peer=self._node.protocol.node_info, validate=True)
        asked_unix_s = self._now_unix_s()
        response = await self._ping(peer_id, request, address)
        clock_ahead_s = _clock_ahead_s(response.dht_time, asked_unix_s, self._now_unix_s())
        if abs(clock_ahead_s) > MAX_CLOCK_DIFFERENCE_S:
            raise Refused(
                f"the clock of the DHT peer at {address} is {clock_ahead_s:+.1f} s off ours; "
                f"the DHT allows {MAX_CLOCK_DIFFERENCE_S:.0f} s",
                code="clock_difference",
                next_step="synchronise both hosts' clocks with NTP",
            )
        if not response.available and not self._node.protocol.client_mode:
            log.warning("DHT peer at %s cannot reach us back; check --listen and --advertise", address)
        await self._node.protocol.update_routing_table(
            DHTID.from_bytes(response.peer.node_id), peer_id, responded=True
        )
        return clock_ahead_s

    async def find_neighbours(self) -> None:
        """Fill the routing table with the peers nearest to us."""
        await self._call(self._node.find_nearest_nodes([self._node.node_id]))

    def knows(self, maddr: str) -> bool:
        """Whether a peer is in the routing table now."""
        peer_id = PeerID.from_base58(split_multiaddr(maddr)[1])
        return self._node.protocol.routing_table.get(peer_id=peer_id) is not None

    async def store(self, key: bytes, subkey: str, value: bytes, expires_at_unix_s: float) -> bool:
        """Store under (key, subkey); False when a newer value lies there or a validator refuses it."""
        return bool(await self._call(self._node.store(key, value, expires_at_unix_s, subkey=subkey)))

    async def fetch(self, key: bytes) -> dict[str, bytes]:
        """All that lies under the key, by subkey."""
        found = await self._call(self._node.get(key, latest=True))
        if found is None or not isinstance(found.value, dict):
            return {}
        return {
            subkey: entry.value for subkey, entry in found.value.items() if isinstance(entry.value, bytes)
        }

    async def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a search of hivemind's to its end even when nobody waits for it any more.

        A cancelled search leaves tasks behind that asyncio reports as lost. Its end is near in any case:
        every request has a deadline, and `close` makes all of them fail.
        """
        task = asyncio.create_task(work)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        task.add_done_callback(_retrieve)
        async with _p2pd_call("the DHT does not answer", patience_s=_SEARCH_PATIENCE_S):
            return await asyncio.shield(task)

    async def _ping(self, peer_id: PeerID, request: Any, address: str) -> Any:
        """hivemind's `call_ping` hides why a peer refuses; this says it."""
        stub = self._node.protocol.get_stub(peer_id)
        try:
            async with asyncio.timeout(CALL_PATIENCE_S):
                response = await stub.rpc_ping(request)
        except P2PHandlerError as error:
            raise Refused(f"the DHT peer at {address} refuses us: {error}", code="dht_refused") from error
        except TimeoutError:
            raise TimedOut(f"no DHT peer answers at {address} within {CALL_PATIENCE_S:.0f} s") from None
        except (P2PDaemonError, OSError, EOFError) as error:
            raise Lost(f"no DHT peer answers at {address}: {error}") from error
        if response is None or not response.peer.node_id:
            raise Refused(f"the DHT peer at {address} is not a member of this mesh", code="not_a_member")
        return response


@asynccontextmanager
async def _p2pd_call(blocker: str, patience_s: float = _CONNECT_PATIENCE_S) -> AsyncIterator[None]:
    """Turns what hivemind raises when p2pd or a peer fails into Lost or TimedOut, within a time."""
    try:
        async with asyncio.timeout(patience_s):
            yield
    except TimeoutError:
        raise TimedOut(blocker, code="dht_down") from None
    except HexmeshError:
        raise
    except Exception as error:  # whatever hivemind and its libraries raise, assertions included
        raise Lost(f"{blocker}: {error}", code="dht_down") from error


def _calls_to(p2p: P2P, protocol: DHTProtocol, authorizer: MemberAuthorizer) -> Callable[[PeerID], Any]:
    """Replaces DHTProtocol.get_stub, which does not tell the authorizer whom a call is for."""

    def get_stub(peer: PeerID) -> AuthRPCWrapper:
        stub = super(DHTProtocol, protocol).get_stub(p2p, peer)
        return AuthRPCWrapper(stub, AuthRole.CLIENT, authorizer, service_public_key=peer)

    return get_stub


def _retrieve_failures(p2p: P2P) -> None:
    """When p2pd dies, hivemind's connection tasks fail unheard; asyncio would print that as our bug."""
    control = p2p._client.control
    tasks: Iterable[asyncio.Task[Any]] = (control._read_task, control._write_task)
    for task in tasks:
        task.add_done_callback(_retrieve)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of a failure, so that asyncio does not report it as unheard."""
    if not task.cancelled():
        task.exception()


async def _fail_at_once(*_: object, **__: object) -> NoReturn:
    raise P2PDaemonError("the DHT is closed")


def _signed_part(role: bytes, message: Any) -> bytes:
    """The message without its signature, as both sides serialise it."""
    bare = type(message)()
    bare.CopyFrom(message)
    bare.auth.signature = b""
    data: bytes = bare.SerializeToString(deterministic=True)
    return b"hexmesh-dht-" + role + b"-1\0" + data


def _clock_ahead_s(theirs_unix_s: float, asked_unix_s: float, answered_unix_s: float) -> float:
    """How far their clock is ahead, given that they looked at it between question and answer."""
    if theirs_unix_s < asked_unix_s:
        return theirs_unix_s - asked_unix_s
    return max(0.0, theirs_unix_s - answered_unix_s)
