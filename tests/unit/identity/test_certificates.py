"""Certificates: what the authority issues holds under its root; forgeries are refused for their reasons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hexmesh.errors import InvalidInput, Refused
from hexmesh.identity.authority import MeshAuthority, request_certificate, requesting_node
from hexmesh.identity.certificates import (
    MemberIdentity,
    check_root,
    dht_uri,
    issuer_name,
    mesh_id_of,
    node_uri,
    read_member,
    verify_member,
)
from hexmesh.identity.keys import NodeKey, node_id_of
from hexmesh.identity.validity import CLOCK_SLACK, GRACE, NODE_VALIDITY
from hexmesh.ids import fingerprint

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MESH = MeshAuthority.found(NOW)
KEY = NodeKey.generate()
PEER_ID = "12D3KooWQ1"
CERTIFICATE = MESH.issue(request_certificate(KEY), PEER_ID, NOW)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


ROOT_NAME = x509.load_der_x509_certificate(MESH.root_der).subject
BOTH = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]


def forge(
    *,
    signer: Ed25519PrivateKey | None = None,
    uris: list[str] | None = None,
    usages: list[x509.ObjectIdentifier] | None = None,
    is_authority: bool = False,
    path_length: int | None = None,
    signs: bool = False,
    issuer: x509.Name = ROOT_NAME,
    subject: x509.Name | None = None,
    key: Ed25519PrivateKey | None = None,
) -> bytes:
    """A certificate as MESH would make it, but for what is given."""
    private = key or KEY.private
    if uris is None:
        uris = [node_uri(MESH.mesh_id, KEY.node_id), dht_uri(MESH.mesh_id, PEER_ID)]
    builder = x509.CertificateBuilder().subject_name(subject or name(KEY.node_id)).issuer_name(issuer)
    builder = builder.public_key(private.public_key()).serial_number(1)
    builder = builder.not_valid_before(NOW - CLOCK_SLACK).not_valid_after(NOW + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(is_authority, path_length), critical=True)
    builder = builder.add_extension(
        x509.KeyUsage(not signs, False, False, False, False, signs, False, False, False), critical=True
    )
    if not is_authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage(BOTH if usages is None else usages), False)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]), False
        )
    return builder.sign(signer or MESH._private, algorithm=None).public_bytes(Encoding.DER)


def test_an_issued_certificate_names_the_member() -> None:
    expected = MemberIdentity(
        mesh_id=MESH.mesh_id,
        node_id=KEY.node_id,
        dht_peer_id=PEER_ID,
        public_bytes=KEY.public_bytes,
        not_before=NOW - CLOCK_SLACK,
        not_after=NOW + NODE_VALIDITY + GRACE,
    )

    assert verify_member([CERTIFICATE], MESH.root_der, NOW) == expected
    assert read_member(CERTIFICATE) == expected
    assert expected.has_signed(b"x", KEY.sign(b"x"))
    assert not expected.has_signed(b"y", KEY.sign(b"x"))


def test_the_mesh_id_is_the_fingerprint_of_the_root() -> None:
    check_root(MESH.root_der)

    assert MESH.mesh_id == mesh_id_of(MESH.root_der) == fingerprint(MESH.root_der)
    assert MeshAuthority.found(NOW).mesh_id != MESH.mesh_id


def test_the_authority_survives_its_file() -> None:
    again = MeshAuthority.from_pem(MESH.key_to_pem(), MESH.root_der)
    certificate = again.issue(request_certificate(KEY), PEER_ID, NOW)

    assert verify_member([certificate], MESH.root_der, NOW).node_id == KEY.node_id
    with pytest.raises(InvalidInput, match="does not belong to the root"):
        MeshAuthority.from_pem(KEY.to_pem(), MESH.root_der)


def test_forge_makes_a_good_certificate_when_nothing_is_changed() -> None:
    assert verify_member([forge()], MESH.root_der, NOW).node_id == KEY.node_id


@pytest.mark.parametrize(
    ("forgery", "reason"),
    [
        (forge(signer=Ed25519PrivateKey.generate()), "not issued under this mesh's root"),
        (forge(issuer=name("other")), "not issued under this mesh's root"),
        (forge(uris=[node_uri(MESH.mesh_id, "f" * 40), dht_uri(MESH.mesh_id, PEER_ID)]), "the fingerprint"),
        (forge(uris=[node_uri("0" * 40, KEY.node_id), dht_uri("0" * 40, PEER_ID)]), "names another mesh"),
        (forge(uris=[node_uri("0" * 40, KEY.node_id), dht_uri(MESH.mesh_id, PEER_ID)]), "of one mesh"),
        (forge(uris=[node_uri(MESH.mesh_id, KEY.node_id)]), "one node and one DHT peer"),
        (forge(uris=[node_uri(MESH.mesh_id, KEY.node_id)] * 2), "unexpected name"),
        (forge(uris=["https://example.org/node/x"]), "unexpected name"),
        (forge(usages=[ExtendedKeyUsageOID.SERVER_AUTH]), "both ends"),
        (forge(is_authority=True, signs=True), "authority's certificate is not a node's"),
        (b"", "not a DER certificate"),
        (b"nonsense", "not a DER certificate"),
        (MESH.root_der, "authority's certificate is not a node's"),
    ],
    ids=[
        *("signer", "issuer", "node-id", "mesh", "two-meshes", "no-dht", "twice", "scheme", "usage"),
        *("authority", "empty", "garbage", "root-itself"),
    ],
)
def test_forgeries(forgery: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        verify_member([forgery], MESH.root_der, NOW)


def test_another_mesh_is_refused() -> None:
    with pytest.raises(Refused, match="not issued under this mesh's root") as refusal:
        verify_member([CERTIFICATE], MeshAuthority.found(NOW).root_der, NOW)

    assert refusal.value.code == "other_mesh"


@pytest.mark.parametrize(
    ("at", "code"),
    [
        (NOW - CLOCK_SLACK - timedelta(seconds=1), "certificate_not_yet_valid"),
        (NOW - CLOCK_SLACK, None),
        (NOW + NODE_VALIDITY + GRACE, None),
        (NOW + NODE_VALIDITY + GRACE + timedelta(seconds=1), "certificate_expired"),
    ],
)
def test_validity(at: datetime, code: str | None) -> None:
    if code is None:
        assert verify_member([CERTIFICATE], MESH.root_der, at).node_id == KEY.node_id
        return
    with pytest.raises(Refused) as refusal:
        verify_member([CERTIFICATE], MESH.root_der, at)
    assert refusal.value.code == code


def issuers(path_length: int | None = 0, *, signs: bool = True, is_authority: bool = True) -> list[bytes]:
    """A chain of a node's certificate and an intermediate issuer's."""
    key = Ed25519PrivateKey.generate()
    subject = issuer_of(key)
    issuer = forge(is_authority=is_authority, path_length=path_length, signs=signs, subject=subject, key=key)
    return [forge(signer=key, issuer=subject), issuer]


def issuer_of(key: Ed25519PrivateKey) -> x509.Name:
    return issuer_name(node_id_of(key.public_key().public_bytes_raw()))


def test_a_chain_through_an_issuer() -> None:
    assert verify_member(issuers(), MESH.root_der, NOW).node_id == KEY.node_id


def test_an_issuer_under_another_name() -> None:
    """TLS knows an issuer by its name alone, so the name has to be that of its key."""
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    issuer = forge(is_authority=True, path_length=0, signs=True, subject=issuer_of(other), key=key)

    with pytest.raises(Refused, match="not the fingerprint"):
        verify_member([forge(signer=key, issuer=issuer_of(other)), issuer], MESH.root_der, NOW)


@pytest.mark.parametrize("chain", [issuers(signs=False), issuers(None, is_authority=False)])
def test_an_issuer_without_the_right(chain: list[bytes]) -> None:
    with pytest.raises(Refused, match="may not issue"):
        verify_member(chain, MESH.root_der, NOW)


def test_an_issuer_may_not_make_issuers() -> None:
    first_key, second_key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    first_name, second_name = issuer_of(first_key), issuer_of(second_key)
    first = forge(is_authority=True, path_length=0, signs=True, subject=first_name, key=first_key)
    second = forge(
        is_authority=True,
        signs=True,
        subject=second_name,
        key=second_key,
        signer=first_key,
        issuer=first_name,
    )
    leaf = forge(signer=second_key, issuer=second_name)

    with pytest.raises(Refused, match="longer than its authority allows"):
        verify_member([leaf, second, first], MESH.root_der, NOW)


@pytest.mark.parametrize("n", [0, 5])
def test_chain_length(n: int) -> None:
    with pytest.raises(Refused, match="1 to 4 certificates"):
        verify_member([CERTIFICATE] * n, MESH.root_der, NOW)


def test_an_issuer_that_is_no_authority_cannot_sign_for_others() -> None:
    other = NodeKey.generate()
    fake = forge(signer=KEY.private, issuer=name(KEY.node_id), key=other.private)

    with pytest.raises(Refused):
        verify_member([fake, CERTIFICATE], MESH.root_der, NOW)


def damaged(data: bytes) -> Iterator[bytes]:
    """`data` with one byte changed: each byte in each bit, and to some other values."""
    for at, byte in enumerate(data):
        for value in {byte ^ (1 << bit) for bit in range(8)} | {0, 1, 0x30, 0xFF} - {byte}:
            yield data[:at] + bytes([value]) + data[at + 1 :]


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_damaged_certificate_is_refused_and_nothing_else_happens() -> None:
    accepted = []
    for certificate in damaged(CERTIFICATE):
        with contextlib.suppress(Refused):
            accepted.append(verify_member([certificate], MESH.root_der, NOW))

    assert accepted == []


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_a_damaged_issuer_is_refused_and_nothing_else_happens() -> None:
    leaf, issuer = issuers()
    accepted = []
    for certificate in damaged(issuer):
        with contextlib.suppress(Refused):
            accepted.append(verify_member([leaf, certificate], MESH.root_der, NOW))

    assert accepted == []


def test_a_request_proves_its_key() -> None:
    request = request_certificate(KEY)
    middle = len(request) - 30
    forged = request[:middle] + bytes([request[middle] ^ 1]) + request[middle + 1 :]
    elliptic = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name("x"))
        .sign(ec.generate_private_key(ec.SECP256R1()), SHA256())
        .public_bytes(Encoding.DER)
    )

    assert requesting_node(request) == KEY.node_id
    for bad in (forged, elliptic, b"", b"nonsense"):
        with pytest.raises(Refused):
            MESH.issue(bad, PEER_ID, NOW)


def test_a_damaged_request_is_refused_and_nothing_else_happens() -> None:
    accepted = set()
    for request in damaged(request_certificate(KEY)):
        with contextlib.suppress(Refused):
            accepted.add(requesting_node(request))

    assert accepted <= {KEY.node_id}


@pytest.mark.parametrize("peer_id", ["", "a/b", "a b", "é", "x" * 129, "a\nb"])
def test_dht_peer_ids_are_checked(peer_id: str) -> None:
    with pytest.raises(InvalidInput, match="not a libp2p peer id"):
        MESH.issue(request_certificate(KEY), peer_id, NOW)


def test_names_show_no_secret() -> None:
    assert repr(MESH) == f"MeshAuthority({MESH.mesh_id})"
