"""Records of nodes as tests need them: only what a test names matters."""

from __future__ import annotations

from typing import Any

from hexmesh.membership.records import NodeRecord


def node_record(node: str, **facts: Any) -> NodeRecord:
    """What `node` says of itself, with these facts."""
    plain: dict[str, Any] = {
        "mesh_id": "m",
        "node": node,
        "boot": 1,
        "sequence": 1,
        "made_at_unix_s": 0.0,
        "name": "n",
        "site": "s",
        "peer_address": "127.0.0.1:1",
        "dht_maddrs": (),
        "hexmesh_version": "0",
        "protocol_version": 1,
        "model_id": "m",
    }
    return NodeRecord(**(plain | facts))
