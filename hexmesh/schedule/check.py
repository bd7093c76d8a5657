"""The certificate of a plan: everything that must hold before a host may be asked to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.workload import Workload


def check_plan(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload | None = None) -> list[str]:
    """What is wrong with the plan, in words; empty for a sound one.

    With a workload each replica must also have KV for one of its sequences; else for one block.
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
    yield from _flow_violations(plan)


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
        least = costs.weight_bytes(stage.start, stage.stop)
        least += stage.kv_blocks * costs.kv_block_bytes(stage.n_layers)
        if stage.needed_bytes < least // len(stage.devices):
            yield f"{where}: says {stage.needed_bytes} bytes, weights and KV alone are {least}"


def _link_violations(replica: Replica, cluster: Cluster) -> Iterator[str]:
    links = cluster.link_table()
    nodes = [stage.node for stage in replica.stages]
    for src, dst in (*pairwise(nodes), (nodes[-1], nodes[0])):
        if src != dst and (src, dst) not in links:
            yield f"{replica.id}: no measured link from {src} to {dst}"


def _flow_violations(plan: Plan) -> Iterator[str]:
    roles = {replica.id: replica.role for replica in plan.replicas}
    if len(roles) != len(plan.replicas):
        yield "two replicas have the same id"
    for flow in plan.flows:
        if roles.get(flow.src) not in ("mixed", "prefill") or roles.get(flow.dst) not in ("mixed", "decode"):
            yield f"flow from {flow.src} to {flow.dst}: no such prefill and decode replicas"
        if not 0.0 <= flow.share <= 1.0:
            yield f"flow from {flow.src} to {flow.dst} has share {flow.share}"
    total = sum(flow.share for flow in plan.flows)
    if plan.flows and abs(total - 1.0) > 1e-6:
        yield f"the flows' shares sum to {total}"
