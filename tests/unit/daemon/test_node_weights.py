"""What a node says and plans while weights are on their way: pure parts of the daemon's side."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from daemon.mesh_state import MeshState
from daemon.models.inspection import layers_of
from daemon.models.node_weights import HeldModel, NodeWeights
from daemon.models.weight_cache import DEFAULT_SHARE, WeightCache
from daemon.models.weight_fetch import FetchProgress
from daemon.models.weight_peers import weight_peers
from hexmesh.cluster import Device, Link
from hexmesh.membership.records import DeviceFacts, LinkFacts, NodeRecord
from hexmesh.weights.manifest import TensorEntry, make_manifest
from tests.node_records import node_record

MIB = 2**20


def record(node: str, *, rate_to_me: float | None = None, has_all: bool = True) -> NodeRecord:
    links = () if rate_to_me is None else (LinkFacts(link=link(node, rate_to_me), measured_at_unix_s=0.0),)
    return node_record(node, name=f"name of {node}", has_all_weights=has_all, links=links)


def link(src: str, rate: float) -> Link:
    return Link(src=src, dst="me", rtt_p50_s=0.01, rtt_p95_s=0.01, bytes_per_s=rate, lower_bound=False)


def device(index: int, budget_bytes: int) -> DeviceFacts:
    return DeviceFacts(
        device=Device(
            index=index, kind="cpu", name="cpu", budget_bytes=budget_bytes, flops_per_s=1e9, bytes_per_s=1e9
        ),
        n_threads=1,
        flops_spread=0.0,
        bytes_spread=0.0,
        measured_at_unix_s=0.0,
    )


def weights_of(cached: object) -> NodeWeights:
    held = HeldModel(local=cast(Any, LOCAL), folder=Path(), tensors=cast(Any, None), cached=cast(Any, cached))
    return NodeWeights(
        held,
        WeightCache(Path("/nowhere")),
        peers=list,
        dial=cast(Any, None),
        is_busy=lambda: False,
        on_progress=lambda _: None,
    )


class LOCAL:
    id = "m"
    manifest = make_manifest([], [])
    encoded = b""


def test_peers_are_asked_by_the_rate_of_their_link_to_this_node() -> None:
    records = [
        record("slow", rate_to_me=1e6),
        record("unknown-some", has_all=False),
        record("me"),
        record("quick-some", rate_to_me=1e9, has_all=False),
        record("unknown-all"),
    ]
    assert [peer.node_id for peer in weight_peers(records, "me")] == [
        "quick-some",
        "slow",
        "unknown-all",
        "unknown-some",
    ]


def test_devices_are_bounded_by_the_cache_only_once_it_was_too_small() -> None:
    weights = weights_of(cached=object())
    devices = (device(0, 64 * MIB), device(1, 4 * MIB))
    weights.room_bytes = 16 * MIB
    assert weights.bound_devices(devices) == devices
    weights._was_short = True
    assert [facts.device.budget_bytes for facts in weights.bound_devices(devices)] == [8 * MIB, 4 * MIB]
    weights.room_bytes = 0
    assert [facts.device.budget_bytes for facts in weights.bound_devices(devices)] == [1, 1]


def test_layers_are_those_whose_tensors_are_all_there() -> None:
    names = ["embed", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "h.2.a", "h.10.experts.3.w", "norm"]
    tensors = [TensorEntry(name, "U8", (0,), 0, b"") for name in names]
    manifest = make_manifest([], tensors)
    place = {tensor.name: at for at, tensor in enumerate(manifest.tensors)}
    held = {place[name] for name in ("h.0.a", "h.0.b", "h.1.a", "h.2.a", "h.10.experts.3.w")}
    assert layers_of(manifest, held) == [(0, 1), (2, 3), (10, 11)]
    assert layers_of(manifest, held | {place["h.1.b"]}) == [(0, 3), (10, 11)]


def test_a_cache_without_a_cap_leaves_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightCache, "_free_bytes", lambda self: 1000)
    assert WeightCache(tmp_path).room_bytes() == int(1000 * DEFAULT_SHARE)
    assert WeightCache(tmp_path, cap_bytes=400).room_bytes() == 400
    assert WeightCache(tmp_path, cap_bytes=4000).room_bytes() == 1000


def test_a_node_that_fetches_says_how_far_it_is() -> None:
    weights = weights_of(cached=object())
    weights.room_bytes = 8 * MIB
    weights.progress = FetchProgress(
        done_bytes=MIB, total_bytes=3 * MIB, bytes_per_s=MIB / 2, peers=("tokyo",), trouble=None
    )
    state = MeshState.__new__(MeshState)
    state.weights = weights
    blocker = state._fetching(weights.progress).blocker
    assert blocker is not None
    assert (blocker.code, blocker.needed_bytes, blocker.room_bytes) == ("fetching_weights", 3 * MIB, 8 * MIB)
    assert blocker.message.endswith("1.0 MiB of 3.0 MiB, 512.0 KiB/s, 4.0 s left from tokyo")
