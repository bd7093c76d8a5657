"""Blockers that name members which run and are not connected."""

from __future__ import annotations

from typing import Any

from daemon.peering.address import Address
from daemon.peering.peer_events import PeerInfo
from daemon.reachability import CODE, find_apart
from hexmesh.cluster import Device, Link
from hexmesh.ids import NodeId
from hexmesh.membership.records import DeviceFacts, Directory, KnownRecord, LinkFacts, NodeRecord
from tests.node_records import node_record

NOW_S = 1000.0


def record(node: str, *linked: str, made_at_unix_s: float = NOW_S, dialable: bool = True) -> NodeRecord:
    device = Device(index=0, kind="cpu", name="c", budget_bytes=1, flops_per_s=1.0, bytes_per_s=1.0)
    return node_record(
        node,
        made_at_unix_s=made_at_unix_s,
        name=f"host-{node}",
        peer_address=f"10.0.0.{ord(node[0])}:7701",
        devices=(
            DeviceFacts(device=device, n_threads=1, flops_spread=0, bytes_spread=0, measured_at_unix_s=0),
        ),
        links=tuple(
            LinkFacts(
                link=Link(
                    src=node, dst=other, rtt_p50_s=0.1, rtt_p95_s=0.1, bytes_per_s=1.0, lower_bound=False
                ),
                measured_at_unix_s=0.0,
            )
            for other in linked
        ),
        dialable=dialable,
    )


def directory_of(*records: NodeRecord) -> Directory:
    directory = Directory()
    for one in records:
        directory.merge(KnownRecord(record=one, key_hash=b"", expires_at_unix_s=NOW_S + 60, signed=b""))
    return directory


def peer(node: str, **changes: Any) -> PeerInfo:
    told: dict[str, Any] = {
        "address": Address("10.0.0.1", 7701),
        "is_up": False,
        "name": node,
        "boot": 1,
        "hexmesh_version": "0",
        "clock_difference_s": 0.0,
        "why_undialable": "timed out",
        "undialable_s": 30.0,
        "way": None,
    }
    return PeerInfo(node_id=NodeId(node), **{**told, **changes})


def apart(directory: Directory, *peers: PeerInfo, alive: set[str]) -> str | None:
    known = {info.node_id: info for info in peers}
    found = find_apart(
        directory, lambda node: known.get(NodeId(node)), own="a", alive=alive, now_unix_s=NOW_S
    )
    if found is None:
        return None
    assert found.code == CODE
    assert "hexmesh bootstrap" in found.next_step
    return found.message


def test_a_member_that_showed_life_after_dialling_it_failed_is_named_with_the_reason() -> None:
    directory = directory_of(record("a"), record("b", made_at_unix_s=NOW_S - 10))
    message = apart(directory, peer("b"), alive={"a"})
    assert message is not None
    assert message.startswith(
        "host-b has no connection with this node: dialling it at 10.0.0.98:7701 fails (timed out)"
    )


def test_a_member_that_fell_silent_before_is_not_said_to_be_apart() -> None:
    directory = directory_of(record("a"), record("b", made_at_unix_s=NOW_S - 40))
    assert apart(directory, peer("b"), alive={"a"}) is None


def test_a_member_that_is_connected_or_was_never_dialled_in_vain_is_fine() -> None:
    directory = directory_of(record("a"), record("b"))
    assert apart(directory, peer("b", is_up=True), alive={"a"}) is None
    assert apart(directory, peer("b", why_undialable=None, undialable_s=None), alive={"a"}) is None
    assert apart(directory, alive={"a"}) is None


def test_two_others_that_hide_from_each_other_are_named() -> None:
    up = (peer("b", is_up=True), peer("c", is_up=True))
    hidden = record("b", "a", dialable=False), record("c", "a", dialable=False)
    message = apart(directory_of(record("a", "b", "c"), *hidden), *up, alive={"a", "b", "c"})
    assert message is not None
    assert "host-b and host-c have no measured link" in message
    linked = record("b", "a", "c", dialable=False), record("c", "a", "b", dialable=False)
    assert apart(directory_of(record("a", "b", "c"), *linked), *up, alive={"a", "b", "c"}) is None
