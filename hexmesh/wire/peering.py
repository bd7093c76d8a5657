"""Messages of a connection itself: the greeting of members, and the dialogue by which a stranger joins.

A stranger (no certificate) may say only WantRoot and JoinRequest, in frames of JOIN_LIMITS.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from hexmesh.wire.frames import FrameLimits

PROTOCOL_VERSION = 3
"""Raised when members of two versions could misread each other."""

MAX_CLOCK_DIFFERENCE_S = 3.0
"""The DHT refuses records of peers whose clocks differ by more."""

JOIN_LIMITS = FrameLimits(header_bytes=64 * 1024, payload_bytes=0)
JOIN_REPLY_LIMITS = FrameLimits(header_bytes=1024 * 1024, payload_bytes=0)

Channel = Literal["control", "data", "probe", "bulk"]
"""On "bulk" the dialling side asks and the accepting side answers (`hexmesh.wire.weights`); nothing else goes there.
Where the accepting side had to ask for the connection (`CallMe`), it is the other way round.
"""

MAX_TEXT = 256
_PRINTABLE = r"\A[^\x00-\x1f\x7f-\x9f]*\Z"

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT, pattern=_PRINTABLE)]
"""Names and addresses from others end up in logs and terminals: no line breaks, no escape sequences."""

Sentence = Annotated[str, msgspec.Meta(max_length=2000, pattern=_PRINTABLE)]


class PeerHello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First frame in both directions of every connection between members."""

    protocol_version: int
    hexmesh_version: Text
    node_id: Text
    boot: int
    name: Text
    clock_unix_s: float
    channel: Channel = "control"
    """What the dialling side will send here; the accepting side repeats it."""
    address: Text = ""
    """Where the speaker can be dialled, host:port; empty if it cannot."""
    is_call_back: bool = False
    """With "bulk": the accepting side asked for this connection and asks its questions on it."""


class PeerRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Instead of a PeerHello: why this connection is about to be closed."""

    code: Text
    message: Sentence
    next_step: Sentence = ""
    proof: Annotated[bytes, msgspec.Meta(max_length=48 * 1024)] = b""
    """The signed revocation that is the reason. Without it, this is the sender's word alone."""


class WantRoot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a stranger that does not verify yet: show me the mesh's root certificate."""


class MeshRoot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The root certificate, DER. Worth nothing until its SHA-256 is that of a token."""

    root: bytes
    clock_unix_s: float = 0.0
    """The member's clock, so that a joiner whose clock is off hears of both; 0 when it is not told."""


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From a stranger that has verified the mesh: admit me. Never sent before that, it holds the secret."""

    protocol_version: int
    hexmesh_version: Text
    issuer: Text
    """Node id of the token's issuer, the only one that can redeem it."""
    secret: bytes
    """Empty towards any other node than the issuer."""
    csr: bytes
    """PKCS #10 request, DER: the node's public key and the proof that it holds the private key."""
    dht_peer_id: Text
    name: Text
    clock_unix_s: float
    model_id: Text | None = None
    """Set when the operator named a model; must be the mesh's."""
    address: Text = ""
    """Where the new node will be dialled, host:port."""

    def __repr__(self) -> str:
        """Without the secret, for logs."""
        return f"JoinRequest(name={self.name!r}, address={self.address!r}, issuer={self.issuer!r})"


class ModelReference(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh's model, and where its files may be found."""

    name: Text
    model_id: str
    root: str
    """A folder or a hub id, as the founder named it."""


class MemberAddress(msgspec.Struct, frozen=True, kw_only=True):
    """A member and where it is dialled."""

    node_id: Text
    name: Text
    address: Text
    dht_maddrs: list[str] = []


class JoinAccepted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Everything a new node needs to be a member. `certificates`: its own first, then issuers; DER."""

    certificates: list[bytes]
    root: bytes
    mesh_id: str
    model: ModelReference
    dtype: str
    members: list[MemberAddress]
    dht_initial_peers: list[str]


class JoinRefused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why not, and what to do next."""

    code: Text
    message: Sentence
    next_step: Sentence = ""
    issuer_address: Text = ""
    """With code other_issuer: where the token's issuer is dialled, host:port."""


PEERING_MESSAGE = PeerHello | PeerRefused | WantRoot | MeshRoot | JoinRequest | JoinAccepted | JoinRefused
