"""Signed node records: what passes, what is refused, and what a directory makes of them."""

from __future__ import annotations

import hashlib
import hmac
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.errors import Refused
from hexmesh.membership.records import (
    LIFETIME_S,
    MAX_LIFETIME_S,
    MAX_RECORD_BYTES,
    Chain,
    DeviceFacts,
    Directory,
    KnownRecord,
    LinkFacts,
    NodeRecord,
    SignedRecord,
    open_record,
    record_head,
    sign_record,
)

MESH = "ab" * 20
NOW_S = 1.8e9


def key_of(node: str) -> bytes:
    return hashlib.sha256(node.encode()).digest()


def chain_of(node: str) -> Chain:
    """Stands for a certificate: it names its node."""
    return (node.encode(),)


def sign_as(node: str, payload: bytes) -> bytes:
    return hmac.digest(key_of(node), payload, "sha256")


def verify(chain: Chain, payload: bytes, signature: bytes) -> str:
    node = chain[0].decode()
    if not hmac.compare_digest(sign_as(node, payload), signature):
        raise Refused("bad signature", code="bad_signature")
    return node


def device(index: int = 0, **changes: Any) -> DeviceFacts:
    figures: dict[str, Any] = {"flops_per_s": 1e11, "bytes_per_s": 1e10, "budget_bytes": 2**30} | changes
    return DeviceFacts(
        device=Device(index=index, kind="cpu", name="CPU", **figures),
        n_threads=1,
        flops_spread=0.02,
        bytes_spread=0.03,
        measured_at_unix_s=NOW_S - 100,
    )


def link(src: str, dst: str, **changes: Any) -> LinkFacts:
    figures: dict[str, Any] = {"rtt_p50_s": 0.01, "rtt_p95_s": 0.02, "bytes_per_s": 1e8} | changes
    return LinkFacts(link=Link(src=src, dst=dst, lower_bound=False, **figures), measured_at_unix_s=NOW_S)


def record(node: str = "a", **changes: Any) -> NodeRecord:
    facts: dict[str, Any] = {
        "mesh_id": MESH,
        "node": node,
        "boot": 7,
        "sequence": 1,
        "made_at_unix_s": NOW_S,
        "name": f"host-{node}",
        "site": "here",
        "peer_address": "10.0.0.1:7701",
        "dht_maddrs": ("/ip4/10.0.0.1/tcp/7702/p2p/12D3KooW",),
        "hexmesh_version": "0.1.0",
        "protocol_version": 1,
        "model_id": "cd" * 32,
        "devices": (device(),),
    }
    return NodeRecord(**(facts | changes))


def signed(
    facts: NodeRecord, *, by: str | None = None, chain: Chain | None = None, life_s: float = LIFETIME_S
) -> bytes:
    signer = by or facts.node
    return sign_record(
        facts,
        expires_at_unix_s=NOW_S + life_s,
        chain=chain or chain_of(signer),
        sign=lambda payload: sign_as(signer, payload),
    )


def with_body(facts: NodeRecord) -> bytes:
    """A well-signed record of facts that `sign_record` itself refuses."""
    with pytest.raises(Refused):
        signed(facts)
    return resigned(signed(record(facts.node)), body=msgspec.msgpack.encode(facts))


def opened(data: bytes, now_s: float = NOW_S) -> KnownRecord:
    return open_record(data, mesh_id=MESH, verify=verify, now_unix_s=now_s)


def known(facts: NodeRecord, life_s: float = LIFETIME_S) -> KnownRecord:
    return opened(signed(facts, life_s=life_s))


def resigned(data: bytes, **changes: Any) -> bytes:
    """The record with other fields, signed anew by the same node."""
    changed = msgspec.structs.replace(msgspec.msgpack.decode(data, type=SignedRecord), **changes)
    node = changed.chain[0].decode()
    return msgspec.msgpack.encode(
        msgspec.structs.replace(changed, signature=sign_as(node, changed.payload()))
    )


def test_a_record_comes_back_as_it_was() -> None:
    facts = record(links=(link("a", "b"),), roles=("issuer",), capabilities=("tp1",))
    data = signed(facts)
    got = opened(data)
    assert got.record == facts
    assert (got.expires_at_unix_s, got.signed) == (NOW_S + LIFETIME_S, data)
    assert record_head(data) == ("a", NOW_S + LIFETIME_S, 1)


def test_a_node_may_speak_for_itself_alone() -> None:
    with pytest.raises(Refused, match="signed a record of b"):
        opened(signed(record("b"), by="a"))


def test_a_record_under_anothers_subkey_is_refused() -> None:
    with pytest.raises(Refused, match="a signed a record of a under b"):
        opened(resigned(signed(record("a")), subkey="b"))


def test_another_signature_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        opened(signed(record("a"), by="b", chain=chain_of("a")))
    assert caught.value.code == "bad_signature"


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_at_unix_s": NOW_S + LIFETIME_S + 1},
        {"subkey": "b"},
        {"body": msgspec.msgpack.encode(record("a", name="other"))},
    ],
)
def test_every_part_is_under_the_signature(changes: dict[str, Any]) -> None:
    data = msgspec.msgpack.decode(signed(record("a")), type=SignedRecord)
    with pytest.raises(Refused) as caught:
        opened(msgspec.msgpack.encode(msgspec.structs.replace(data, **changes)))
    assert caught.value.code == "bad_signature"


@given(st.data())
def test_no_flipped_bit_passes(data: st.DataObject) -> None:
    good = bytearray(signed(record("a")))
    position = data.draw(st.integers(0, len(good) - 1))
    good[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Refused):
        opened(bytes(good))


@given(st.binary(max_size=300))
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(Refused):
        opened(data)


def test_a_record_of_another_mesh_is_refused() -> None:
    other = "ee" * 20
    with pytest.raises(Refused, match="of another mesh"):
        opened(signed(record("a", mesh_id=other)))
    moved = msgspec.msgpack.decode(signed(record("a", mesh_id=other)), type=SignedRecord)
    own = msgspec.msgpack.decode(signed(record("a")), type=SignedRecord)
    with pytest.raises(Refused, match="of another mesh"):
        opened(resigned(msgspec.msgpack.encode(moved), key_hash=own.key_hash))


def test_an_expired_record_is_refused() -> None:
    data = signed(record("a"))
    assert opened(data, now_s=NOW_S + LIFETIME_S - 0.1).record == record("a")
    with pytest.raises(Refused, match=r"expired 1\.0 s ago"):
        opened(data, now_s=NOW_S + LIFETIME_S + 1)


@pytest.mark.parametrize("life_s", [MAX_LIFETIME_S + 1, math.inf, math.nan])
def test_a_record_for_ever_is_refused(life_s: float) -> None:
    with pytest.raises(Refused):
        opened(signed(record("a"), life_s=life_s))


def test_sizes_are_bounded() -> None:
    with pytest.raises(Refused, match="over the limit"):
        opened(b"x" * (MAX_RECORD_BYTES + 1))
    with pytest.raises(Refused):
        opened(with_body(record("a", name="n" * 257)))
    with pytest.raises(Refused):
        opened(with_body(record("a", devices=tuple(device(i) for i in range(65)))))
    with pytest.raises(Refused):
        opened(resigned(signed(record("a")), chain=(b"a",) * 5))


def test_a_record_of_a_large_mesh_fits() -> None:
    links = tuple(link("a" * 40, f"{i:040x}") for i in range(1, 1000))
    assert opened(signed(record("a" * 40, links=links))).record.links == links


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": (device(flops_per_s=0.0),)},
        {"devices": (device(row_s=-1e-6),)},
        {"devices": (device(row_s=math.inf),)},
        {"devices": (device(flops_per_s=math.nan),)},
        {"devices": (device(bytes_per_s=math.inf),)},
        {"devices": (device(budget_bytes=-1),)},
        {"devices": (device(0), device(0))},
        {"links": (link("b", "a"),)},
        {"links": (link("a", "a"),)},
        {"links": (link("a", "b", bytes_per_s=-1.0),)},
        {"links": (link("a", "b", rtt_p50_s=math.nan),)},
        {"links": (link("a", "b", rtt_p50_s=0.3, rtt_p95_s=0.2),)},
        {"links": (link("a", "b", rtt_p95_s=math.inf),)},
    ],
)
def test_figures_that_no_measurement_gives_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        opened(with_body(record("a", **wrong)))


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "x" * 257, "\x9b1m"])
def test_texts_that_would_do_something_to_a_terminal_are_refused(text: str) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        opened(with_body(record(name=text)))
    with pytest.raises(Refused, match="a name that nobody can show"):
        opened(with_body(record(devices=(with_name(text),))))


def with_name(text: str) -> DeviceFacts:
    facts = device()
    return msgspec.structs.replace(facts, device=msgspec.structs.replace(facts.device, name=text))


def test_the_directory_keeps_the_newest() -> None:
    directory = Directory()
    first, second = known(record("a", sequence=1)), known(record("a", sequence=2, boot=8))
    assert directory.record("a") is None
    assert [directory.merge(one) for one in (first, first, second, first)] == [True, False, True, False]
    assert directory.record("a") == second.record
    assert directory.signed() == (second.signed,)


def test_order_of_arrival_does_not_matter() -> None:
    news = [known(record(node, sequence=n)) for node in "ab" for n in (1, 2, 3)]
    there, back = Directory(), Directory()
    for one in news:
        there.merge(one)
    for one in reversed(news):
        back.merge(one)
    assert there.records() == back.records()
    assert [(one.node, one.sequence) for one in there.records()] == [("a", 3), ("b", 3)]


def test_a_cluster_holds_what_was_measured_among_those_asked_for() -> None:
    directory = Directory()
    directory.merge(known(record("a", links=(link("a", "b"), link("a", "c"), link("a", "z")))))
    directory.merge(known(record("b", site="there", links=(link("b", "a"),))))
    directory.merge(known(record("c", devices=(), links=(link("c", "a"),))))
    directory.merge(known(record("d")))
    expected = Cluster(
        nodes=(
            Node(
                id="a",
                name="host-a",
                site="here",
                devices=(device().device,),
                tp_degrees=(1,),
                roles=("mixed",),
            ),
            Node(
                id="b",
                name="host-b",
                site="there",
                devices=(device().device,),
                tp_degrees=(1,),
                roles=("mixed",),
            ),
        ),
        links=(link("a", "b").link, link("b", "a").link),
    )
    assert directory.cluster(["b", "a", "c", "missing", "a"]) == expected


def test_links_of_a_cluster_are_as_long_as_drivers_tell() -> None:
    directory = Directory()
    directory.merge(known(record("a", links=(link("a", "b"),), way_s=0.003)))
    directory.merge(known(record("b")))
    (found,) = directory.cluster(["a", "b"]).links
    assert found.rtt_p50_s == pytest.approx(0.01 + 2 * 0.003)
    assert directory.measured_links() == {("a", "b"): link("a", "b").link}


@pytest.mark.parametrize("way_s", [-1e-9, 1.0, math.nan, math.inf])
def test_an_overhead_that_no_way_has_is_refused(way_s: float) -> None:
    with pytest.raises(Refused):
        opened(resigned(signed(record("a")), body=msgspec.msgpack.encode(record("a", way_s=way_s))))


def test_a_forgotten_node_is_gone() -> None:
    directory = Directory()
    directory.merge(known(record("a")))
    directory.forget("a")
    directory.forget("a")
    assert directory.records() == ()
