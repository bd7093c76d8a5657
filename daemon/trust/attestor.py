"""This node's proof of membership, and its judgement of others' proofs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from hexmesh.errors import Refused
from hexmesh.identity.certificates import MemberIdentity, verify_member
from hexmesh.identity.keys import NodeKey
from hexmesh.ids import short
from hexmesh.membership.records import Chain

_MAX_CACHED = 1024
_RECHECK = timedelta(minutes=5)


class Attestor:
    """Signs as this node, and says which member signed something. Owns a cache of judged chains."""

    def __init__(
        self,
        key: NodeKey,
        chain: Chain,
        root_der: bytes,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        is_refused: Callable[[MemberIdentity], bool] = lambda _: False,
    ) -> None:
        """Raises Refused when the chain is not this key's or not under the root."""
        self._key = key
        self._root_der = root_der
        self._now = now
        self._is_refused = is_refused
        self._judged: OrderedDict[Chain, tuple[datetime, MemberIdentity]] = OrderedDict()
        self.renew(chain)

    def renew(self, chain: Chain) -> None:
        """Prove with this chain from now on. Raises Refused as the constructor does."""
        identity = self.identify(chain)
        if identity.node_id != self._key.node_id:
            raise Refused("the certificate belongs to another key", code="bad_certificate")
        self.chain, self.identity = chain, identity

    @property
    def node_id(self) -> str:
        return self.identity.node_id

    @property
    def mesh_id(self) -> str:
        return self.identity.mesh_id

    @property
    def dht_peer_id(self) -> str:
        return self.identity.dht_peer_id

    def sign(self, payload: bytes) -> bytes:
        return self._key.sign(payload)

    def verify(self, chain: Chain, payload: bytes, signature: bytes) -> str:
        """Node id of the member that signed. Raises Refused: no member, revoked, or another signature."""
        identity = self.identify(chain)
        if self._is_refused(identity):
            raise Refused(f"{short(identity.node_id)} was removed from the mesh", code="revoked")
        return _signer(identity, payload, signature)

    def verify_origin(self, chain: Chain, payload: bytes, signature: bytes) -> str:
        """As `verify`, for members that have been removed too: who wrote this, not whether to heed it."""
        return _signer(self.identify(chain), payload, signature)

    def identify(self, chain: Chain) -> MemberIdentity:
        """Whom the chain names, judged anew every few minutes. Raises Refused."""
        now = self._now()
        judged = self._judged.get(chain)
        if judged is not None and judged[0] <= now < min(judged[0] + _RECHECK, judged[1].not_after):
            return judged[1]
        identity = verify_member(chain, self._root_der, now)
        self._judged[chain] = (now, identity)
        self._judged.move_to_end(chain)
        if len(self._judged) > _MAX_CACHED:
            self._judged.popitem(last=False)
        return identity


def _signer(identity: MemberIdentity, payload: bytes, signature: bytes) -> str:
    if not identity.has_signed(payload, signature):
        raise Refused(f"the signature is not {short(identity.node_id)}'s", code="bad_signature")
    return identity.node_id
