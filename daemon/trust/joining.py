"""Joining a mesh, the joiner's side.

    1. connect without verifying, fetch the root certificate, compare its SHA-256 with the token's
    2. connect again, verified under that root; only the token's issuer is told the secret
    3. send the request, get a certificate, check it

Someone in the middle can make step 1 or 2 fail, and learns nothing.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from daemon.peering.address import Address, parse_address
from daemon.peering.connection import FrameConnection, Loss, loss_of
from daemon.peering.greeting import check_name
from daemon.peering.outgoing import connect_tcp
from daemon.peering.tls import stranger_context, unverified_context
from daemon.trust.admission import check_clocks
from daemon.trust.state import Membership
from hexmesh import __version__
from hexmesh.errors import HexmeshError, Lost, Refused, TimedOut
from hexmesh.identity.authority import request_certificate
from hexmesh.identity.certificates import mesh_id_of, read_member, root_sha256, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import JoinToken
from hexmesh.wire import codec
from hexmesh.wire.frames import Frame
from hexmesh.wire.peering import (
    JOIN_LIMITS,
    JOIN_REPLY_LIMITS,
    PROTOCOL_VERSION,
    JoinAccepted,
    JoinRefused,
    JoinRequest,
    MeshRoot,
    PeerRefused,
    WantRoot,
)

TIMEOUT_S = 10.0
"""For each of the connections that joining takes."""

_WRONG_MESH_STEP = (
    "check that --peer is a node of the mesh that the token is for; if it is, someone may be in between: "
    "ask for a new token and compare"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joiner:
    """Who wants to join. `model_id` is set when the operator named a model."""

    key: NodeKey
    dht_peer_id: str
    name: str
    address: str
    """Where this node will be dialled, host:port."""
    model_id: str | None = None
    protocol_version: int = PROTOCOL_VERSION
    clock: Callable[[], float] = field(default=time.time)

    def __post_init__(self) -> None:
        check_name(self.name)


async def join_mesh(joiner: Joiner, token: JoinToken, peer: Address | None = None) -> Membership:
    """Become a member; nothing is written to disk. `peer` replaces the token's address.

    Raises Refused (token, mesh, model, version, clock), Lost (nobody there) or TimedOut.
    """
    address = peer or parse_address(token.address)
    root = await _fetch_root(joiner, token, address)
    reply = await _ask_to_join(joiner, token, root, address)
    if isinstance(reply, JoinRefused) and reply.code == "other_issuer" and reply.issuer_address:
        reply = await _ask_issuer(joiner, token, root, reply)
    if isinstance(reply, JoinRefused):
        raise Refused(reply.message, code=reply.code, next_step=reply.next_step)
    return _checked(joiner, root, reply)


async def _fetch_root(joiner: Joiner, token: JoinToken, address: Address) -> bytes:
    """The root certificate that the token pins. Raises Refused where another is shown."""
    async with _dialogue(address, unverified_context()) as dialogue:
        answer = await dialogue.ask(WantRoot())
    if not isinstance(answer, MeshRoot):
        raise _not_hexmesh(address)
    shown = root_sha256(answer.root)
    if shown != token.root_sha256:
        raise Refused(
            f"{address} is a node of another mesh: its root certificate is {shown.hex()[:16]}, "
            f"and the token is for {token.root_sha256.hex()[:16]}",
            code="wrong_mesh",
            next_step=_WRONG_MESH_STEP,
        )
    if answer.clock_unix_s:
        check_clocks("this host", joiner.clock(), str(address), answer.clock_unix_s)
    return answer.root


async def _ask_to_join(
    joiner: Joiner, token: JoinToken, root: bytes, address: Address
) -> JoinAccepted | JoinRefused:
    async with _dialogue(address, stranger_context(root)) as dialogue:
        found = dialogue.server_node_id()
        request = JoinRequest(
            protocol_version=joiner.protocol_version,
            hexmesh_version=__version__,
            issuer=token.issuer_id,
            secret=token.secret if found == token.issuer_id else b"",
            csr=request_certificate(joiner.key),
            dht_peer_id=joiner.dht_peer_id,
            name=joiner.name,
            clock_unix_s=joiner.clock(),
            model_id=joiner.model_id,
            address=joiner.address,
        )
        answer = await dialogue.ask(request)
    if not isinstance(answer, JoinAccepted | JoinRefused):
        raise _not_hexmesh(address)
    return answer


async def _ask_issuer(
    joiner: Joiner, token: JoinToken, root: bytes, referral: JoinRefused
) -> JoinAccepted | JoinRefused:
    """The answer of the token's issuer; where it is not reached, the referral with that."""
    try:
        return await _ask_to_join(joiner, token, root, parse_address(referral.issuer_address))
    except Lost as error:
        raise Refused(
            f"{referral.message}, and that node is not reached: {error.message}",
            code="issuer_unreachable",
            next_step=referral.next_step,
        ) from error


def _checked(joiner: Joiner, root: bytes, accepted: JoinAccepted) -> Membership:
    """What was sent, if it makes this very node a member of the very mesh that the token is for."""
    now = datetime.fromtimestamp(joiner.clock(), UTC)
    identity = verify_member(accepted.certificates, root, now)
    is_ours = identity.node_id == joiner.key.node_id and identity.dht_peer_id == joiner.dht_peer_id
    if not is_ours or accepted.root != root or accepted.mesh_id != mesh_id_of(root):
        raise Refused("the issuer sent a certificate that is not this node's", code="bad_certificate")
    return Membership(
        mesh_id=accepted.mesh_id,
        root_der=root,
        certificates=accepted.certificates,
        model=accepted.model,
        dtype=accepted.dtype,
        members=accepted.members,
        dht_initial_peers=accepted.dht_initial_peers,
    )


class _Dialogue:
    """Questions and answers over one connection; owner of its events."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard: asyncio.Queue[object] = asyncio.Queue()
        self._connection: FrameConnection | None = None

    async def opened(self) -> None:
        """Wait for the handshake. Raises Lost or Refused."""
        await self._opened

    def server_node_id(self) -> str:
        """Whom the verified certificate of the other side names. Raises Refused."""
        assert self._connection is not None
        certificate = self._connection.peer_certificate()
        assert certificate is not None  # a server always shows one
        return read_member(certificate).node_id

    async def ask(self, question: WantRoot | JoinRequest) -> object:
        """The other side's answer. Raises Lost or Refused."""
        assert self._connection is not None
        self._connection.write(codec.PEERING.frame(question, limits=JOIN_LIMITS))
        answer = await self._heard.get()
        if isinstance(answer, HexmeshError):
            raise answer
        return answer

    def on_open(self, connection: FrameConnection) -> None:
        self._connection = connection
        if not self._opened.done():
            self._opened.set_result(None)

    def on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        message = codec.PEERING.decode(frame.header)
        if isinstance(message, PeerRefused):
            self._heard.put_nowait(Refused(message.message, code=message.code, next_step=message.next_step))
        else:
            self._heard.put_nowait(message)

    def on_lost(self, connection: FrameConnection, loss: Loss) -> None:
        error = _failure(self._address, loss)
        self._heard.put_nowait(error)
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # looked at, whether or not somebody still waits


@asynccontextmanager
async def _dialogue(address: Address, context: ssl.SSLContext) -> AsyncIterator[_Dialogue]:
    """A dialogue with whoever listens at the address, within TIMEOUT_S."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            dialogue = _Dialogue(address)
            try:
                sock = await connect_tcp(address)
                connection = FrameConnection(sock, context, dialogue, JOIN_REPLY_LIMITS, is_server=False)
            except OSError as error:
                raise _unreachable(address, error) from error
            try:
                await dialogue.opened()
                yield dialogue
            finally:
                connection.close()
    except TimeoutError as error:
        raise TimedOut(
            f"{address} did not answer within {TIMEOUT_S:.0f} s",
            code="unreachable",
            next_step=_reach(address),
        ) from error


def _failure(address: Address, loss: Loss) -> HexmeshError:
    if loss.kind == "tls" and "certificate" in loss.message:
        return Refused(
            f"{address} shows the mesh's root certificate and cannot prove to belong there: {loss.message}",
            code="wrong_mesh",
            next_step=_WRONG_MESH_STEP,
        )
    if loss.kind in ("tls", "protocol", "eof"):
        return _not_hexmesh(address)
    return Lost(f"{address}: {loss.message}", code="unreachable", next_step=_reach(address))


def _not_hexmesh(address: Address) -> Lost:
    return Lost(
        f"what answers at {address} is not a hexmesh node's peer port",
        code="not_hexmesh",
        next_step="check the port: the peer port is 7701 by default, not that of HTTP or of the DHT",
    )


def _unreachable(address: Address, error: OSError) -> Lost:
    return Lost(
        f"nobody is reached at {address}: {loss_of(error).message}",
        code="unreachable",
        next_step=_reach(address),
    )


def _reach(address: Address) -> str:
    return (
        f"check that the node runs, that {address.host} is its address as seen from here (--peer HOST:PORT "
        f"gives another), and that no firewall closes TCP port {address.port}"
    )
