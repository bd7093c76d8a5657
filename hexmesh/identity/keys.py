"""A node's Ed25519 key. The node id is the fingerprint of its public half and lives as long as the key."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hexmesh.errors import InvalidInput
from hexmesh.ids import NodeId, fingerprint


class NodeKey:
    """A private key and the names derived from it. Its repr shows no secret."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_bytes = private.public_key().public_bytes_raw()
        self.node_id = node_id_of(self.public_bytes)

    @classmethod
    def generate(cls) -> NodeKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_pem(cls, pem: bytes) -> NodeKey:
        """The key in an unencrypted PKCS #8 file. Raises InvalidInput."""
        return cls(private_key_from_pem(pem))

    @property
    def private(self) -> Ed25519PrivateKey:
        """For signing certificates and requests."""
        return self._private

    def to_pem(self) -> bytes:
        """Unencrypted PKCS #8: for a file that only its owner can read."""
        return private_key_to_pem(self._private)

    def sign(self, payload: bytes) -> bytes:
        """64 bytes that `verify` accepts for this key alone."""
        return self._private.sign(payload)

    def __repr__(self) -> str:
        return f"NodeKey({self.node_id})"


def node_id_of(public_bytes: bytes) -> NodeId:
    """The node id that belongs to a raw public key, 32 bytes."""
    return NodeId(fingerprint(public_bytes))


def verify(public_bytes: bytes, payload: bytes, signature: bytes) -> bool:
    """Whether the holder of the key signed exactly this payload; False for any nonsense."""
    try:
        Ed25519PublicKey.from_public_bytes(public_bytes).verify(signature, payload)
    except (InvalidSignature, ValueError):
        return False
    return True


def private_key_to_pem(private: Ed25519PrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def private_key_from_pem(pem: bytes) -> Ed25519PrivateKey:
    """Raises InvalidInput for anything but an unencrypted Ed25519 key."""
    try:
        private = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidInput("not an unencrypted PEM private key", code="bad_key") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InvalidInput("the private key is not an Ed25519 key", code="bad_key")
    return private
