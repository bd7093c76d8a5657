"""Fleets for tests of the planner: tiny, and laid out in no time."""

from __future__ import annotations

from collections.abc import Sequence

from hexmesh.cluster import Device, Node
from hexmesh.planner.pools import ROLES, Pool


def pools_like(sizes: Sequence[int], *, n_hosts: int = 3) -> tuple[Pool, ...]:
    """Pools of so many devices, dealt out to hosts at two sites."""
    device = Device(index=0, kind="cuda", name="", budget_bytes=2**30, flops_per_s=1e12, bytes_per_s=1e11)
    return tuple(
        Pool(
            node=Node(
                id=f"n{at % n_hosts}", name=f"n{at % n_hosts}", site=f"s{at % n_hosts % 2}", devices=()
            ),
            device=device,
            devices=tuple(range(size)),
            degrees=(1,),
            roles=frozenset(ROLES),
        )
        for at, size in enumerate(sizes)
    )
