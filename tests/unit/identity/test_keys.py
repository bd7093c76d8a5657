"""Node keys: the id follows from the key, signatures are for one key and one payload."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.errors import InvalidInput
from hexmesh.identity.keys import NodeKey, verify
from hexmesh.ids import fingerprint

KEY = NodeKey.generate()
OTHER = NodeKey.generate()


def test_the_id_is_the_fingerprint_of_the_public_key_and_survives_the_file() -> None:
    again = NodeKey.from_pem(KEY.to_pem())

    assert KEY.node_id == fingerprint(KEY.public_bytes)
    assert (again.node_id, again.public_bytes) == (KEY.node_id, KEY.public_bytes)
    assert len(KEY.public_bytes) == 32


@given(st.binary(max_size=100))
def test_a_signature_holds_for_its_key_and_payload(payload: bytes) -> None:
    signature = KEY.sign(payload)

    assert verify(KEY.public_bytes, payload, signature)
    assert not verify(OTHER.public_bytes, payload, signature)
    assert not verify(KEY.public_bytes, payload + b"x", signature)


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_nonsense_is_no_signature(public_bytes: bytes, signature: bytes) -> None:
    assert not verify(public_bytes, b"payload", signature)
    assert not verify(KEY.public_bytes, b"payload", signature)


def test_a_key_shows_no_secret() -> None:
    assert repr(KEY) == f"NodeKey({KEY.node_id})"


def test_other_files_are_refused() -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    locked = KEY.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )

    for pem in (b"", b"nonsense", elliptic, locked):
        with pytest.raises(InvalidInput):
            NodeKey.from_pem(pem)
