"""Admission to the mesh, an issuer's side: founding, join tokens, and the answer to one who asks to join.

A token is redeemed only by the node that minted it, which writes that down before the certificate leaves.
Refusals say what is wrong and what to do, and nothing about a mesh to someone without its token: the secret
is judged first.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from daemon.trust.removals import REMOVED_STEP
from daemon.trust.state import Membership, StateFolder
from daemon.views import Issued, TokenView
from hexmesh import __version__
from hexmesh.errors import HexmeshError, NotReady, Refused
from hexmesh.identity.authority import Issuer, MeshAuthority, request_certificate, requesting_node
from hexmesh.identity.certificates import root_sha256
from hexmesh.identity.keys import NodeKey
from hexmesh.identity.tokens import SECRET_BYTES, format_token, make_token
from hexmesh.ids import NodeId, short
from hexmesh.wire.peering import (
    MAX_CLOCK_DIFFERENCE_S,
    PROTOCOL_VERSION,
    JoinAccepted,
    JoinRefused,
    JoinRequest,
    MemberAddress,
    ModelReference,
)

_log = logging.getLogger("hexmesh.admission")

_MAX_INITIAL_PEERS = 16
_MAX_NAMED = 3

Clock = Callable[[], float]


def found_mesh(
    state: StateFolder, key: NodeKey, dht_peer_id: str, model: ModelReference, dtype: str, now: datetime
) -> Membership:
    """A new mesh with this node as its first member and issuer, on the disk when this returns. Blocks."""
    authority = MeshAuthority.found(now)
    issuer = Issuer(key.private, authority.root_der, authority.appoint(key.public_bytes, now))
    membership = Membership(
        mesh_id=authority.mesh_id,
        root_der=authority.root_der,
        certificates=[issuer.issue(request_certificate(key), dht_peer_id, now), *issuer.chain],
        model=model,
        dtype=dtype,
        issuer_der=issuer.chain[0],
    )
    state.save_authority(authority)
    state.save_appointed([key.node_id])
    state.save_membership(membership)
    return membership


class Admission:
    """Owner of the token ledger while the daemon runs. Where this node did not mint a token it says who did.

    `members` tells who is in the mesh now, `issuers` which of them can mint tokens now, both with this node
    where it belongs to them. Usable from the loop and from threads.
    """

    def __init__(
        self,
        state: StateFolder,
        membership: Membership,
        node_id: NodeId,
        address: str,
        members: Callable[[], list[MemberAddress]],
        *,
        issuers: Callable[[], list[MemberAddress]] = list,
        is_removed: Callable[[NodeId], bool] = lambda node: False,
        clock: Clock = time.time,
    ) -> None:
        """`address` is where others dial this node. Raises InvalidInput for a damaged state folder."""
        self._state = state
        self._membership = membership
        self._node_id = node_id
        self._address = address
        self._members = members
        self._issuers = issuers
        self._is_removed = is_removed
        self._clock = clock
        self.issuer = state.issuer()
        """This node's right to admit; its owner sets it when the node is appointed."""
        self._ledger = state.ledger()
        self._changes = threading.Lock()

    @property
    def may_admit(self) -> bool:
        """Whether this node can mint tokens and issue certificates."""
        return self.issuer is not None

    def create_token(self, *, ttl_s: float, uses: int) -> Issued:
        """Mint a token. Raises InvalidInput for bad numbers, NotReady where this node may not admit."""
        if self.issuer is None:
            raise NotReady(
                "this node may not admit others: it is no issuer",
                code="not_an_issuer",
                next_step=f"run `hexmesh token create` on {self._who_can_mint()}",
            )
        secret = secrets.token_bytes(SECRET_BYTES)
        token = make_token(self._address, root_sha256(self._membership.root_der), self._node_id, secret)
        with self._changes:
            ledger = self._ledger.mint(secret, now_unix_s=self._clock(), ttl_s=ttl_s, uses=uses)
            self._state.save_ledger(ledger)
            self._ledger = ledger
        text = format_token(token)
        command = f"hexmesh join --peer {self._address} --token {text}"
        return Issued(token=text, join_command=command, expires_s=ttl_s, uses=uses)

    def tokens(self) -> list[TokenView]:
        """The tokens minted here that still admit somebody."""
        now_unix_s = self._clock()
        return [
            TokenView(
                id=record.token_id,
                uses=record.uses,
                uses_left=record.uses_left,
                expires_s=record.expires_unix_s - now_unix_s,
                issuer=self._node_id,
                redeemed_by=list(record.redeemed_by),
            )
            for record in self._ledger.live(now_unix_s)
        ]

    def revoke_token(self, token_id: str) -> None:
        """Let this token admit nobody any more; on the disk when this returns. Raises InvalidInput."""
        with self._changes:
            ledger = self._ledger.revoke(token_id)
            self._state.save_ledger(ledger)
            self._ledger = ledger

    async def admit(self, request: JoinRequest) -> JoinAccepted | JoinRefused:
        """The answer to one who asks to join. Every refusal is logged, without the secret."""
        if self.issuer is None or request.issuer != self._node_id:
            return self._refer(request)
        try:
            accepted = await asyncio.to_thread(self._admit, self.issuer, request)
        except HexmeshError as error:
            _log.warning("join refused name=%s code=%s reason=%s", request.name, error.code, error.message)
            return JoinRefused(code=error.code, message=error.message, next_step=error.next_step)
        _log.info("node admitted name=%s address=%s", request.name, request.address)
        return accepted

    def _admit(self, issuer: Issuer, request: JoinRequest) -> JoinAccepted:
        """Judge the token, then the rest, and only then spend a use of it."""
        node_id = requesting_node(request.csr)
        with self._changes:
            now_unix_s = self._clock()
            ledger = self._ledger.redeem(request.secret, node_id, now_unix_s=now_unix_s)
            self._check_standing(node_id)
            self._check_version(request)
            check_clocks(request.name, request.clock_unix_s, "the mesh", now_unix_s)
            self._check_model(request)
            now = datetime.fromtimestamp(now_unix_s, UTC)
            certificate = issuer.issue(request.csr, request.dht_peer_id, now)
            self._state.save_ledger(ledger)
            self._ledger = ledger
        return self._welcome([certificate, *issuer.chain])

    def _welcome(self, certificates: list[bytes]) -> JoinAccepted:
        members = self._members()
        maddrs = [maddr for member in members for maddr in member.dht_maddrs]
        return JoinAccepted(
            certificates=certificates,
            root=self._membership.root_der,
            mesh_id=self._membership.mesh_id,
            model=self._membership.model,
            dtype=self._membership.dtype,
            members=members,
            dht_initial_peers=maddrs[:_MAX_INITIAL_PEERS],
        )

    def _refer(self, request: JoinRequest) -> JoinRefused:
        """Only the issuer can redeem the token: say where it is, and who can mint another."""
        issuer = next((one for one in self._members() if one.node_id == request.issuer), None)
        name = f"{issuer.name} ({short(request.issuer)})" if issuer is not None else short(request.issuer)
        others = self._who_can_mint(besides=request.issuer)
        return JoinRefused(
            code="other_issuer",
            message=f"the token was made by node {name}, which alone can redeem it",
            next_step=f"join while that node is up, or ask for a new token: `hexmesh token create` on {others}",
            issuer_address=issuer.address if issuer is not None else "",
        )

    def _who_can_mint(self, besides: str = "") -> str:
        """Names for a sentence."""
        issuers = [one for one in self._issuers() if one.node_id != besides]
        named = [f"node {one.name} ({short(one.node_id)})" for one in issuers[:_MAX_NAMED]]
        return " or ".join(named) or "an issuer (`hexmesh members` shows who is)"

    def _check_standing(self, node_id: NodeId) -> None:
        if self._is_removed(node_id):
            raise Refused(
                f"node {short(node_id)} was removed from the mesh",
                code="removed",
                next_step=REMOVED_STEP,
            )

    def _check_version(self, request: JoinRequest) -> None:
        if request.protocol_version != PROTOCOL_VERSION:
            raise Refused(
                f"{request.name} speaks protocol {request.protocol_version} "
                f"(hexmesh {request.hexmesh_version}) and this mesh speaks protocol {PROTOCOL_VERSION} "
                f"(hexmesh {__version__})",
                code="protocol_mismatch",
                next_step=f"install hexmesh {__version__} on {request.name}",
            )

    def _check_model(self, request: JoinRequest) -> None:
        model = self._membership.model
        if request.model_id is not None and request.model_id != model.model_id:
            raise Refused(
                f"this mesh serves {model.name} ({short(model.model_id)}), "
                f"not the model given with --model ({short(request.model_id)})",
                code="model_mismatch",
                next_step="leave --model out to take the mesh's model, or found another mesh",
            )


def check_clocks(name: str, clock_unix_s: float, other_name: str, other_unix_s: float) -> None:
    """Raise Refused, naming both clocks, when they differ by more than the DHT accepts."""
    ahead_s = clock_unix_s - other_unix_s
    if abs(ahead_s) <= MAX_CLOCK_DIFFERENCE_S:
        return
    raise Refused(
        f"the clocks differ by {abs(ahead_s):.1f} s: {name} has {_show_clock(clock_unix_s)}, "
        f"{other_name} has {_show_clock(other_unix_s)}",
        code="clocks_differ",
        next_step=f"synchronise both with NTP: at most {MAX_CLOCK_DIFFERENCE_S:.0f} s may lie between them",
    )


def _show_clock(unix_s: float) -> str:
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{unix_s} s"
