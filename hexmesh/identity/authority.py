"""Who certifies: the mesh's self-signed Ed25519 root, and the issuers that it certified, who admit and renew.

The root key is needed only to make issuers (and to overrule them), so it can lie offline. An issuer uses its
node's own key, and its certificate is good for as long as the root's: a mesh outlives the loss of its founder.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity import validity
from hexmesh.identity.certificates import (
    UNREADABLE,
    MemberIdentity,
    check_root,
    dht_uri,
    issuer_name,
    mesh_id_of,
    node_uri,
    read_issuer,
)
from hexmesh.identity.keys import NodeKey, node_id_of, private_key_from_pem, private_key_to_pem
from hexmesh.ids import MeshId, NodeId

ROOT_VALIDITY = timedelta(days=3650)

_MAX_DHT_PEER_ID = 128


class Issuer:
    """A key that may certify nodes, and the certificates that prove it."""

    def __init__(self, private: Ed25519PrivateKey, root_der: bytes, certificate_der: bytes) -> None:
        """Raises Refused or InvalidInput when the certificate is not this key's under the root."""
        root = x509.load_der_x509_certificate(root_der)
        certificate = root
        self.chain: tuple[bytes, ...] = ()
        """What stands between a certificate made here and the root, DER."""
        if certificate_der != root_der:
            read_issuer(certificate_der, root_der)
            certificate = x509.load_der_x509_certificate(certificate_der)
            self.chain = (certificate_der,)
        if certificate.public_key() != private.public_key():
            which = "issuer" if self.chain else "root"
            raise InvalidInput(f"the key does not belong to the {which} certificate", code="bad_key")
        self._private = private
        self._subject = certificate.subject
        self._not_after = root.not_valid_after_utc
        self.mesh_id: MeshId = mesh_id_of(root_der)

    def issue(self, csr_der: bytes, dht_peer_id: str, now: datetime) -> bytes:
        """A node certificate (DER) for the key that a request proves. Raises Refused or InvalidInput."""
        public = _proven_key(csr_der)
        _check_dht_peer_id(dht_peer_id)
        return self._certify_node(public, dht_peer_id, now)

    def renew(self, identity: MemberIdentity, now: datetime) -> bytes:
        """A new certificate (DER) for a member that has proven to be one: same key, same names."""
        public = Ed25519PublicKey.from_public_bytes(identity.public_bytes)
        return self._certify_node(public, identity.dht_peer_id, now)

    def sign(self, payload: bytes) -> bytes:
        """64 bytes that prove the issuer's word."""
        return self._private.sign(payload)

    def _certify_node(self, public: Ed25519PublicKey, dht_peer_id: str, now: datetime) -> bytes:
        node_id = node_id_of(public.public_bytes_raw())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)])
        uris = [node_uri(self.mesh_id, node_id), dht_uri(self.mesh_id, dht_peer_id)]
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        not_after = min(now + validity.NODE_VALIDITY + validity.GRACE, self._not_after)
        builder = _builder(name, self._subject, public, now, not_after)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        builder = builder.add_extension(usages, critical=False)
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(_authority_key(self._private), critical=False)
        return builder.sign(self._private, algorithm=None).public_bytes(Encoding.DER)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mesh_id})"


class MeshAuthority(Issuer):
    """A mesh's root certificate with its key: whoever holds this decides who is an issuer."""

    def __init__(self, private: Ed25519PrivateKey, root_der: bytes) -> None:
        """Raises InvalidInput when key and certificate do not belong together."""
        check_root(root_der)
        super().__init__(private, root_der, root_der)
        self.root_der = root_der

    @classmethod
    def found(cls, now: datetime) -> MeshAuthority:
        """A new mesh's authority."""
        private = Ed25519PrivateKey.generate()
        own_fingerprint = node_id_of(private.public_key().public_bytes_raw())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hexmesh"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"hexmesh root {own_fingerprint[:16]}"),
            ]
        )
        builder = _builder(name, name, private.public_key(), now, now + ROOT_VALIDITY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        root = builder.sign(private, algorithm=None)
        return cls(private, root.public_bytes(Encoding.DER))

    @classmethod
    def from_pem(cls, key_pem: bytes, root_der: bytes) -> MeshAuthority:
        return cls(private_key_from_pem(key_pem), root_der)

    def key_to_pem(self) -> bytes:
        """The root key, unencrypted: for a file that only its owner can read."""
        return private_key_to_pem(self._private)

    def appoint(self, public_bytes: bytes, now: datetime) -> bytes:
        """An issuer certificate (DER) for a member's raw public key, good for as long as the root's.

        The caller has seen the member prove that it holds the key, as every TLS handshake does.
        """
        public = Ed25519PublicKey.from_public_bytes(public_bytes)
        name = issuer_name(node_id_of(public_bytes))
        builder = _builder(name, self._subject, public, now, self._not_after)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        builder = builder.add_extension(_authority_key(self._private), critical=False)
        return builder.sign(self._private, algorithm=None).public_bytes(Encoding.DER)


def request_certificate(key: NodeKey) -> bytes:
    """A PKCS #10 request (DER): the node's public key, signed by its private key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, key.node_id)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key.private, algorithm=None)
    return request.public_bytes(Encoding.DER)


def requesting_node(csr_der: bytes) -> NodeId:
    """Node id of the key that a request proves to hold. Raises Refused."""
    return node_id_of(_proven_key(csr_der).public_bytes_raw())


def _proven_key(csr_der: bytes) -> Ed25519PublicKey:
    try:
        request = x509.load_der_x509_csr(csr_der)
        public = request.public_key()
        is_proven = request.is_signature_valid
    except UNREADABLE as error:
        raise Refused("the certificate request cannot be read", code="bad_request") from error
    if not isinstance(public, Ed25519PublicKey) or not is_proven:
        raise Refused("the certificate request does not prove an Ed25519 key", code="bad_request")
    return public


def _check_dht_peer_id(dht_peer_id: str) -> None:
    if not (0 < len(dht_peer_id) <= _MAX_DHT_PEER_ID and dht_peer_id.isascii() and dht_peer_id.isalnum()):
        raise InvalidInput(f"{dht_peer_id[:40]!r} is not a libp2p peer id", code="bad_dht_peer_id")


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Ed25519PublicKey, now: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - validity.CLOCK_SLACK).not_valid_after(not_after)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _authority_key(private: Ed25519PrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
