"""The certificate of a plan: everything that must hold before a host may be asked to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.schedule.check_flows import flow_violations
from hexmesh.workload import Workload


def check_plan(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload | None = None) -> list[str]:
    """What is wrong with the plan, in words; empty for a sound one.

    With a workload each replica must also have KV for one of its sequences, else for one block; and NICs, links and
    lines must carry the KV that is handed over at the predicted rate. That prefill and decode of a mixed replica have
    one layout needs no check: a replica has one list of stages, and no device is used twice.
    """
    return list(_violations(plan, cluster, spec, workload))


def _violations(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload | None) -> Iterator[str]:
    if plan.n_layers != spec.n_layers:
        yield f"the plan is for {plan.n_layers} layers, the model has {spec.n_layers}"
    if not plan.replicas:
        yield "no replica"
    used = Counter(
        (stage.node, device)
        for replica in plan.replicas
        for stage in replica.stages
        for device in stage.devices
    )
    yield from (f"device {index} of {node} is used {n} times" for (node, index), n in used.items() if n > 1)
    yield from (
        f"device {one.device} of {one.node} is both used and unused"
        for one in plan.unused
        if (one.node, one.device) in used
    )
    for replica in plan.replicas:
        yield from _replica_violations(plan, replica, cluster, spec, workload)
    yield from flow_violations(plan, cluster, spec, workload)


def _replica_violations(
    plan: Plan, replica: Replica, cluster: Cluster, spec: ModelSpec, workload: Workload | None
) -> Iterator[str]:
    if not replica.stages:
        yield f"{replica.id}: no stage"
        return
    expected = 0
    for stage in replica.stages:
        if stage.start != expected or stage.stop <= stage.start:
            yield f"{replica.id}: layers [{stage.start}, {stage.stop}) follow layer {expected}"
        expected = stage.stop
    if expected != spec.n_layers:
        yield f"{replica.id}: stages end at layer {expected} of {spec.n_layers}"
    n_tokens = 1
    if workload is not None:
        n_tokens = min(plan.max_model_tokens, workload.prompt_tokens + workload.output_tokens)
    if replica.kv_blocks * replica.block_tokens < n_tokens:
        yield f"{replica.id}: {replica.kv_blocks} KV blocks do not hold a sequence of {n_tokens} tokens"
    costs = CostModel(spec, plan.dtype, replica.block_tokens, StepLimits())
    for stage in replica.stages:
        yield from _stage_violations(plan, stage, cluster, costs)
        yield from _capability_violations(replica, stage, cluster, spec)
    yield from _link_violations(replica, cluster)


def _stage_violations(plan: Plan, stage: Stage, cluster: Cluster, costs: CostModel) -> Iterator[str]:
    where = f"layers [{stage.start}, {stage.stop}) on {stage.node}"
    if stage.node not in plan.hosts:
        yield f"{where}: the node is not among the plan's hosts"
    node = next((node for node in cluster.nodes if node.id == stage.node), None)
    if node is None:
        yield f"{where}: no such node"
        return
    devices = {device.index: device for device in node.devices}
    if not stage.devices:
        yield f"{where}: no device"
    for index in stage.devices:
        if index not in devices:
            yield f"{where}: no device {index}"
        elif stage.needed_bytes > devices[index].budget_bytes:
            yield (
                f"{where}: needs {stage.needed_bytes} bytes, device {index} has {devices[index].budget_bytes}"
            )
    if 0 <= stage.start < stage.stop <= costs.spec.n_layers and stage.devices:
        tp = len(stage.devices)
        least = -(-costs.weight_bytes(stage.start, stage.stop) // tp)
        least += stage.kv_blocks * costs.kv_block_bytes(stage.n_layers, tp)
        if stage.needed_bytes < least:
            yield f"{where}: says {stage.needed_bytes} bytes, weights and KV alone are {least}"


def _capability_violations(
    replica: Replica, stage: Stage, cluster: Cluster, spec: ModelSpec
) -> Iterator[str]:
    """What the host does not do, by its own word, or cannot."""
    node = next((node for node in cluster.nodes if node.id == stage.node), None)
    if node is None:
        return
    where, tp = f"layers [{stage.start}, {stage.stop}) on {stage.node}", len(stage.devices)
    if node.roles is not None and replica.role not in node.roles:
        yield f"{where}: for {replica.role}, the node does {' and '.join(node.roles) or 'nothing'}"
    if tp < 2:
        return
    if node.fabric is None:
        yield f"{where}: on {tp} devices, and no way between them is known"
    if node.tp_degrees is not None and tp not in node.tp_degrees:
        offered = ", ".join(map(str, node.tp_degrees))
        yield f"{where}: on {tp} devices, the node offers groups of {offered}"
    if not spec.splits_into(tp):
        yield f"{where}: on {tp} devices, the model's {spec.n_heads} heads do not split so"


def _link_violations(replica: Replica, cluster: Cluster) -> Iterator[str]:
    links = cluster.link_table()
    nodes = [stage.node for stage in replica.stages]
    for src, dst in (*pairwise(nodes), (nodes[-1], nodes[0])):
        if src != dst and (src, dst) not in links:
            yield f"{replica.id}: no measured link from {src} to {dst}"
