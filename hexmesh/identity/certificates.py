"""Reading and judging certificates: is this chain under the mesh's root, and whom does it name?

The web's path validation libraries refuse Ed25519, so the rules stand here: signatures, validity, CA flags
and path lengths, key usage, and two URIs in the subject's alternative names,
`hexmesh://<mesh id>/node/<node id>` and `hexmesh://<mesh id>/dht/<libp2p peer id>`. Between a node and the root
there may stand an issuer: a node whose own key the root certified under the name `hexmesh issuer <node id>`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.keys import node_id_of, verify
from hexmesh.identity.validity import Validity
from hexmesh.ids import MeshId, NodeId, fingerprint

_SCHEME = "hexmesh"
_ISSUER = "hexmesh issuer "
_ISSUER_NAME = re.compile(_ISSUER + r"([0-9a-f]{40})")
_MAX_CHAIN = 4

_WHOLE_64_BYTES = b"\x03\x41\x00"
"""A bit string's tag, length and count of unused bits. The count is not signed, and parsers take several."""

UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
"""What the cryptography library raises for strangers' bytes; it has no common class for them."""

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberIdentity:
    """Whom a node certificate names."""

    mesh_id: MeshId
    node_id: NodeId
    dht_peer_id: str
    public_bytes: bytes
    """Raw Ed25519 public key, 32 bytes; the node id is its fingerprint."""
    not_before: datetime
    not_after: datetime
    issuer_id: NodeId | None = None
    """The node that issued the certificate; None: the root itself."""

    @property
    def validity(self) -> Validity:
        return Validity.between(self.not_before, self.not_after)

    @property
    def is_issuer(self) -> bool:
        """Whether the certificate proves that its node is an issuer: issuers certify themselves."""
        return self.issuer_id == self.node_id

    def has_signed(self, payload: bytes, signature: bytes) -> bool:
        """Whether this member signed exactly this payload."""
        return verify(self.public_bytes, payload, signature)


def mesh_id_of(root_der: bytes) -> MeshId:
    """The mesh id that belongs to a root certificate."""
    return MeshId(fingerprint(root_der))


def root_sha256(root_der: bytes) -> bytes:
    """The 32 bytes that a join token pins."""
    return hashlib.sha256(root_der).digest()


def node_uri(mesh_id: str, node_id: str) -> str:
    return f"{_SCHEME}://{mesh_id}/node/{node_id}"


def dht_uri(mesh_id: str, dht_peer_id: str) -> str:
    return f"{_SCHEME}://{mesh_id}/dht/{dht_peer_id}"


def issuer_name(node_id: str) -> x509.Name:
    """The subject of a node's issuer certificate."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _ISSUER + node_id)])


def to_pem(chain: Sequence[bytes]) -> bytes:
    """DER certificates as one PEM file, in the same order."""
    return b"".join(_load(der).public_bytes(Encoding.PEM) for der in chain)


def check_root(root_der: bytes) -> None:
    """Raise Refused unless this is a self-signed Ed25519 authority."""
    root = _load_or_refuse(root_der)
    _check_signature(root, root)
    _check_authority(root, n_below=0)


def read_member(certificate_der: bytes) -> MemberIdentity:
    """Whom a certificate names. Who issued it is for TLS or `verify_member` to judge. Raises Refused."""
    certificate = _load_or_refuse(certificate_der)
    public_bytes = _public_key(certificate).public_bytes_raw()
    mesh_id, node_id, dht_peer_id = _names(certificate)
    if node_id != node_id_of(public_bytes):
        raise _refusal("the certificate's node id is not the fingerprint of its key")
    return MemberIdentity(
        mesh_id=mesh_id,
        node_id=node_id,
        dht_peer_id=dht_peer_id,
        public_bytes=public_bytes,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        issuer_id=_issuer_id(certificate.issuer),
    )


def verify_member(chain: Sequence[bytes], root_der: bytes, now: datetime) -> MemberIdentity:
    """Whom a chain (own certificate first, then issuers; DER) names under the root. Raises Refused."""
    if not 1 <= len(chain) <= _MAX_CHAIN:
        raise _refusal(f"a chain has 1 to {_MAX_CHAIN} certificates, not {len(chain)}")
    certificates = [_load_or_refuse(der) for der in (*chain, root_der)]
    for i, (certificate, issuer) in enumerate(itertools.pairwise(certificates)):
        _check_signature(certificate, issuer)
        _check_authority(issuer, n_below=i)
        _check_validity(certificate, now)
    for certificate in certificates[1:-1]:
        _check_issuer_name(certificate)
    _check_leaf(certificates[0])
    identity = read_member(chain[0])
    if identity.mesh_id != mesh_id_of(root_der):
        raise _refusal("the certificate names another mesh", code="other_mesh")
    return identity


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerIdentity:
    """Whom an issuer certificate names. The older of two issuers is the one certified earlier."""

    node_id: NodeId
    public_bytes: bytes
    certified_at: datetime

    @property
    def seniority(self) -> tuple[datetime, NodeId]:
        """Sorts the oldest first."""
        return (self.certified_at, self.node_id)


def read_issuer(certificate_der: bytes, root_der: bytes) -> IssuerIdentity:
    """Whom the root certified as an issuer, whether or not that is valid now. Raises Refused."""
    certificate, root = _load_or_refuse(certificate_der), _load_or_refuse(root_der)
    _check_signature(certificate, root)
    _check_authority(certificate, n_below=0)
    _check_issuer_name(certificate)
    public_bytes = _public_key(certificate).public_bytes_raw()
    return IssuerIdentity(
        node_id=node_id_of(public_bytes),
        public_bytes=public_bytes,
        certified_at=certificate.not_valid_before_utc,
    )


def root_public_bytes(root_der: bytes) -> bytes:
    """The root's raw Ed25519 public key. Raises Refused."""
    return _public_key(_load_or_refuse(root_der)).public_bytes_raw()


def _load(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE as error:
        raise InvalidInput("not a DER certificate", code="bad_certificate") from error


def _load_or_refuse(der: bytes) -> x509.Certificate:
    try:
        certificate = _load(der)
    except InvalidInput as error:
        raise _refusal(error.message) from error
    if der[-67:-64] != _WHOLE_64_BYTES:
        raise _refusal("the certificate's signature is not an Ed25519 one, or not in DER")
    return certificate


def _check_signature(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    _public_key(issuer)
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE) as error:
        raise _refusal("the certificate was not issued under this mesh's root", code="other_mesh") from error


def _check_authority(issuer: x509.Certificate, n_below: int) -> None:
    """`n_below` counts the authorities between this one and the node."""
    constraints = _extension(issuer, x509.BasicConstraints)
    if not constraints.ca or not _extension(issuer, x509.KeyUsage).key_cert_sign:
        raise _refusal("the issuing certificate may not issue")
    if constraints.path_length is not None and constraints.path_length < n_below:
        raise _refusal("the chain is longer than its authority allows")


def _check_issuer_name(issuer: x509.Certificate) -> None:
    if _issuer_id(issuer.subject) != node_id_of(_public_key(issuer).public_bytes_raw()):
        raise _refusal("the issuing certificate's name is not the fingerprint of its key")


def _issuer_id(name: x509.Name) -> NodeId | None:
    found = _ISSUER_NAME.fullmatch(",".join(str(part.value) for part in name))
    return NodeId(found[1]) if found is not None else None


def _check_validity(certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise Refused(
            f"the certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC, "
            f"and this host's clock says {now:%Y-%m-%d %H:%M:%S} UTC",
            code="certificate_not_yet_valid",
            next_step="synchronise both hosts' clocks with NTP",
        )
    if now > certificate.not_valid_after_utc:
        raise Refused(
            f"the certificate expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC",
            code="certificate_expired",
            next_step="start it with a new token (`hexmesh token create` on a member), or set its clock",
        )


def _check_leaf(certificate: x509.Certificate) -> None:
    if _extension(certificate, x509.BasicConstraints).ca:
        raise _refusal("an authority's certificate is not a node's")
    usages = _extension(certificate, x509.ExtendedKeyUsage)
    if not {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH} <= set(usages):
        raise _refusal("the certificate is not for both ends of a connection")


def _names(certificate: x509.Certificate) -> tuple[MeshId, NodeId, str]:
    uris = _extension(certificate, x509.SubjectAlternativeName).get_values_for_type(
        x509.UniformResourceIdentifier
    )
    found: dict[str, tuple[str, str]] = {}
    for uri in uris:
        scheme, _, rest = uri.partition("://")
        parts = rest.split("/")
        if scheme != _SCHEME or len(parts) != 3 or parts[1] in found:
            raise _refusal(f"unexpected name {uri!r} in the certificate")
        found[parts[1]] = (parts[0], parts[2])
    if found.keys() != {"node", "dht"} or found["node"][0] != found["dht"][0]:
        raise _refusal("the certificate does not name one node and one DHT peer of one mesh")
    return MeshId(found["node"][0]), NodeId(found["node"][1]), found["dht"][1]


def _public_key(certificate: x509.Certificate) -> Ed25519PublicKey:
    try:
        public = certificate.public_key()
    except UNREADABLE as error:
        raise _refusal("the certificate's key cannot be read") from error
    if not isinstance(public, Ed25519PublicKey):
        raise _refusal("the certificate's key is not an Ed25519 key")
    return public


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except (x509.ExtensionNotFound, *UNREADABLE) as error:
        raise _refusal(f"the certificate lacks a valid {kind.__name__}") from error


def _refusal(message: str, code: str = "bad_certificate") -> Refused:
    return Refused(message, code=code, next_step="join this mesh with a token of its own")
