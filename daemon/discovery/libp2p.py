"""The libp2p identity of a node's DHT process: its key file, and the peer id that follows from it.

The peer id is known without starting p2pd: a node certificate binds it before the node is admitted.
"""

from __future__ import annotations

import os
from ipaddress import IPv6Address, ip_address
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hexmesh.errors import InvalidInput

# Protocol buffers of libp2p's crypto.proto: field 1 is the key type (1: Ed25519), field 2 the key's bytes.
_PRIVATE_PREFIX = b"\x08\x01\x12\x40"
_PUBLIC_PREFIX = b"\x08\x01\x12\x20"
_IDENTITY_MULTIHASH = b"\x00\x24"
_KEY_BYTES = 32
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def ensure_identity(path: Path) -> str:
    """The peer id of the key in `path`, which is made first if there is none. Raises InvalidInput."""
    try:
        return peer_id_of(path.read_bytes())
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    data = new_identity()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    draft.replace(path)
    return peer_id_of(data)


def new_identity() -> bytes:
    """A fresh key as p2pd reads it."""
    private = Ed25519PrivateKey.generate()
    return _PRIVATE_PREFIX + private.private_bytes_raw() + private.public_key().public_bytes_raw()


def peer_id_of(identity: bytes) -> str:
    """The peer id of a key file's content, in base 58. Raises InvalidInput."""
    private, public = identity[4 : 4 + _KEY_BYTES], identity[4 + _KEY_BYTES :]
    is_key = identity.startswith(_PRIVATE_PREFIX) and len(public) == _KEY_BYTES
    if not is_key or Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() != public:
        raise InvalidInput(
            "the DHT identity is not an Ed25519 libp2p key",
            code="bad_key",
            next_step="restore the state folder, or leave --forget and join again",
        )
    return _base58(_IDENTITY_MULTIHASH + _PUBLIC_PREFIX + public)


def multiaddr(host: str, port: int, peer_id: str | None = None) -> str:
    """A TCP address as libp2p writes it, such as "/ip4/10.0.0.1/tcp/7702/p2p/12D3Koo..."."""
    suffix = f"/p2p/{peer_id}" if peer_id is not None else ""
    return f"/{_protocol(host)}/{host}/tcp/{port}{suffix}"


def split_multiaddr(maddr: str) -> tuple[str, str]:
    """(address, peer id) of a multiaddr that ends in /p2p/ID. Raises InvalidInput."""
    address, found, peer_id = maddr.rpartition("/p2p/")
    if not (found and address.startswith("/") and peer_id and set(peer_id) <= set(_BASE58)):
        raise InvalidInput(f"{maddr[:100]!r} is not a multiaddr with a peer id")
    return address, peer_id


def _protocol(host: str) -> str:
    try:
        return "ip6" if isinstance(ip_address(host), IPv6Address) else "ip4"
    except ValueError:
        return "dns"


def _base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58[digit] + digits
    n_leading_zeros = len(data) - len(data.lstrip(b"\0"))
    return _BASE58[0] * n_leading_zeros + digits
