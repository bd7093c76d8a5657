"""Replicas that serve now and could go on as they are: what a new plan leaves alone unless moving pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from hexmesh.cluster import Cluster
from hexmesh.plan import Plan, Replica
from hexmesh.planner.layouts import Layout
from hexmesh.planner.pools import Part, Pool
from hexmesh.planner.problem import Problem
from hexmesh.schedule.wish import Wish


@dataclass(frozen=True, slots=True)
class Present:
    """A replica of the present plan and what it is to a search."""

    replica: Replica
    layout: Layout


def present_replicas(current: Plan | None, wish: Wish, problem: Problem, model_id: str) -> list[Present]:
    """Those whose hosts have not restarted, and that still keep all limits."""
    if current is None or (current.model_id, current.dtype) != (model_id, wish.dtype):
        return []
    found = []
    for replica in current.replicas:
        is_same_boot = all(
            current.hosts.get(stage.node) == wish.hosts.get(stage.node) for stage in replica.stages
        )
        is_whole = replica.stages[-1].stop == wish.spec.n_layers
        parts = _parts(replica, problem.pools)
        if not (is_same_boot and is_whole and replica.block_tokens == wish.block_tokens) or parts is None:
            continue
        layout = problem.layouts.rated(parts, replica.role)
        if layout is not None and layout.requests_per_s > 0:
            found.append(Present(replica, layout))
    return found


def without(cluster: Cluster, present: Sequence[Present]) -> Cluster:
    """The devices that those replicas leave."""
    taken = {
        (stage.node, index) for one in present for stage in one.replica.stages for index in stage.devices
    }
    nodes = [
        replace(
            node,
            devices=tuple(device for device in node.devices if (node.id, device.index) not in taken),
        )
        for node in cluster.nodes
    ]
    return replace(cluster, nodes=tuple(node for node in nodes if node.devices))


def carried(layouts: Sequence[Layout], found_in: Problem, problem: Problem) -> list[Layout]:
    """Layouts of a problem over fewer devices as layouts of the whole one."""
    pool_of = {at: _same(pool, problem.pools) for at, pool in enumerate(found_in.pools)}
    rated = (
        problem.layouts.rated(tuple(_moved(part, pool_of) for part in layout.parts), layout.role)
        for layout in layouts
    )
    return [layout for layout in rated if layout is not None]


def _moved(part: Part, pool_of: Mapping[int, int]) -> Part:
    return Part(pool=pool_of[part.pool], tp=part.tp, start=part.start, stop=part.stop)


def _same(pool: Pool, pools: Sequence[Pool]) -> int:
    return next(at for at, one in enumerate(pools) if _holds(one, pool.node.id, pool.devices))


def _holds(pool: Pool, node: str, devices: Sequence[int]) -> bool:
    return pool.node.id == node and set(devices) <= set(pool.devices)


def _parts(replica: Replica, pools: Sequence[Pool]) -> tuple[Part, ...] | None:
    """None where a stage's devices are not there any more, or are not alike."""
    parts = []
    for stage in replica.stages:
        at = next((at for at, pool in enumerate(pools) if _holds(pool, stage.node, stage.devices)), None)
        if at is None or len(stage.devices) not in pools[at].degrees or replica.role not in pools[at].roles:
            return None
        parts.append(Part(pool=at, tp=len(stage.devices), start=stage.start, stop=stage.stop))
    return tuple(parts)
