"""Revocations: signed statements that a node is no member any more, and what follows from a set of them.

A revocation is good by itself, wherever it comes from: the root signed it, or an issuer whose certificate it
carries. Members pass on what they have heard, so all sets grow to the same one, and the verdict depends on the
set alone, never on the order in which it was heard:

- what the root says holds;
- then issuers are heard from the oldest to the youngest, and one that is revoked by then is not heard at all.
  So an issuer that was broken into cannot undo its removal by an older issuer or by the root;
- a removed issuer's certificates are void, save those of the members that its revocation upholds: whoever
  revokes it lists the members known then. Dates would not do, for the issuer itself writes them.

A revocation is for good: the host comes back with a new key, and so under a new node id.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from hexmesh.errors import Refused
from hexmesh.identity.authority import Issuer
from hexmesh.identity.certificates import MemberIdentity, mesh_id_of, read_issuer, root_public_bytes
from hexmesh.identity.keys import verify
from hexmesh.ids import NodeId, short

MAX_REVOCATION_BYTES = 48 * 1024
MAX_UPHELD = 2000
MAX_PER_SIGNER = 1000
"""A signer's later revocations are not kept: a broken-into issuer must not fill our disks."""

_RawNodeId = Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
_ROOT_SENIORITY = (datetime.min.replace(tzinfo=UTC), NodeId(""))


class Revocation(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A revocation as it travels. `issuer` is the signer's issuer certificate, DER; empty: the root signed."""

    mesh_id: Annotated[str, msgspec.Meta(max_length=64)]
    node: _RawNodeId
    revoked_at_unix_s: float
    sequence: int
    """Grows from one revocation of a signer to its next: of two for one node the later one counts."""
    upholds: Annotated[tuple[_RawNodeId, ...], msgspec.Meta(max_length=MAX_UPHELD)]
    """Members whose certificates stay good although the revoked node issued them."""
    issuer: Annotated[bytes, msgspec.Meta(max_length=4096)]
    signature: Annotated[bytes, msgspec.Meta(max_length=64)]

    @property
    def node_id(self) -> NodeId:
        return NodeId(self.node.hex())

    def payload(self) -> bytes:
        """What the signature is over."""
        said = (self.mesh_id, self.node, self.revoked_at_unix_s, self.sequence, self.upholds, self.issuer)
        return b"hexmesh-revocation-1\0" + msgspec.msgpack.encode(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRevocation:
    """A verified revocation, who signed it, and the bytes to pass on."""

    revocation: Revocation
    signer: NodeId | None
    """None: the root."""
    seniority: tuple[datetime, NodeId]
    signed: bytes


def sign_revocation(
    issuer: Issuer, node: NodeId, *, now_unix_s: float, sequence: int, upholds: Iterable[NodeId] = ()
) -> bytes:
    """A revocation as bytes that any member can verify and pass on."""
    unsigned = Revocation(
        mesh_id=issuer.mesh_id,
        node=bytes.fromhex(node),
        revoked_at_unix_s=now_unix_s,
        sequence=sequence,
        upholds=tuple(bytes.fromhex(one) for one in sorted(upholds))[:MAX_UPHELD],
        issuer=issuer.chain[0] if issuer.chain else b"",
        signature=b"",
    )
    return msgspec.msgpack.encode(
        msgspec.structs.replace(unsigned, signature=issuer.sign(unsigned.payload()))
    )


def open_revocation(data: bytes, root_der: bytes) -> KnownRevocation:
    """The revocation in `data`. Raises Refused unless the root or an issuer of this mesh signed it."""
    if len(data) > MAX_REVOCATION_BYTES:
        raise _bad(f"it has {len(data)} bytes, over {MAX_REVOCATION_BYTES}")
    try:
        revocation = _REVOCATION.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad(f"it cannot be read: {error}") from error
    if revocation.mesh_id != mesh_id_of(root_der):
        raise _bad("it is of another mesh")
    signer, seniority, public_bytes = None, _ROOT_SENIORITY, b""
    if revocation.issuer:
        identity = read_issuer(revocation.issuer, root_der)
        signer, seniority, public_bytes = identity.node_id, identity.seniority, identity.public_bytes
    if not verify(public_bytes or root_public_bytes(root_der), revocation.payload(), revocation.signature):
        raise _bad("its signature is not its signer's")
    if signer == revocation.node_id:
        raise _bad(f"{short(signer)} revokes itself")
    return KnownRevocation(revocation=revocation, signer=signer, seniority=seniority, signed=data)


class Revocations:
    """All revocations that this node has heard of, and what they amount to. Pure; bounded by signer."""

    def __init__(self, root_der: bytes, stored: Iterable[bytes] = ()) -> None:
        """Raises Refused when one of `stored` is not good."""
        self._root_der = root_der
        self._known: dict[tuple[NodeId | None, NodeId], KnownRevocation] = {}
        self._revoked: dict[NodeId, dict[NodeId, KnownRevocation]] = {}
        for data in stored:
            self.learn(data)

    def learn(self, data: bytes) -> bool:
        """Take in a revocation; True when it was news. Raises Refused."""
        known = open_revocation(data, self._root_der)
        place = (known.signer, known.revocation.node_id)
        mine = self._known.get(place)
        if mine is not None and known.revocation.sequence <= mine.revocation.sequence:
            return False
        if mine is None and sum(signer == known.signer for signer, _ in self._known) >= MAX_PER_SIGNER:
            raise _bad(f"{short(known.signer or 'the root')} signed more than {MAX_PER_SIGNER} of them")
        self._known[place] = known
        self._revoked = _verdict(self._known.values())
        return True

    @property
    def revoked(self) -> frozenset[NodeId]:
        """Every node that is no member any more."""
        return frozenset(self._revoked)

    def is_revoked(self, node: str) -> bool:
        return node in self._revoked

    def grounds(self, identity: MemberIdentity) -> bytes | None:
        """The revocation because of which a certificate is refused, as it travels; None if it is not."""
        by = self._revoked.get(identity.node_id)
        if by is None and identity.issuer_id is not None:
            by = self._revoked.get(identity.issuer_id)
            raw = bytes.fromhex(identity.node_id)
            if by is not None and any(raw in one.revocation.upholds for one in by.values()):
                return None
        return next(iter(by.values())).signed if by is not None else None

    def signed(self) -> tuple[bytes, ...]:
        """Everything to tell a peer: void ones too, for the verdict is the listener's own."""
        return tuple(known.signed for known in self._known.values())

    def revoked_by(self, signer: NodeId) -> tuple[NodeId, ...]:
        """Nodes that were revoked on this issuer's word."""
        return tuple(node for node, by in self._revoked.items() if signer in by)

    def next_sequence(self, now_unix_s: float) -> int:
        """A sequence number above every known one."""
        highest = max((known.revocation.sequence for known in self._known.values()), default=0)
        return max(int(now_unix_s * 1000), highest + 1)


def _verdict(known: Iterable[KnownRevocation]) -> dict[NodeId, dict[NodeId, KnownRevocation]]:
    """The revoked nodes, each with the revocations that count, by signer ("" is the root)."""
    revoked: dict[NodeId, dict[NodeId, KnownRevocation]] = {}
    for (_, signer), said in itertools.groupby(sorted(known, key=_rank), key=_rank):
        if signer not in revoked:
            for one in said:
                revoked.setdefault(one.revocation.node_id, {})[signer] = one
    return revoked


def _rank(known: KnownRevocation) -> tuple[datetime, NodeId]:
    """Sorts the oldest signer first, the root before all."""
    return known.seniority


_REVOCATION = msgspec.msgpack.Decoder(Revocation)


def _bad(why: str) -> Refused:
    return Refused(f"a revocation is refused: {why}", code="bad_revocation")
