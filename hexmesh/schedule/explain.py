"""A plan in words: what every device holds and what decided its time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits, StepTime
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import Plan, Replica, Stage
from hexmesh.units import show_bytes, show_duration
from hexmesh.workload import Workload


def explain(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload) -> tuple[str, ...]:
    """One line for several replicas together, one a replica, one a stage, one a device that is left out."""
    return tuple(_lines(plan, cluster, spec, workload))


def _lines(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload) -> Iterator[str]:
    if len(plan.replicas) > 1:
        total = sum(replica.predicted_tokens_per_s for replica in plan.replicas)
        yield (
            f"{len(plan.replicas)} replicas share the requests, {total:.1f} tokens/s together; "
            f"what runs in one that breaks goes on in another"
        )
    for replica in plan.replicas:
        costs = CostModel(spec, plan.dtype, replica.block_tokens, StepLimits())
        context = min(workload.mean_context_tokens, plan.max_model_tokens)
        yield _summary(replica, cluster, costs, plan.max_model_tokens)
        for stage in replica.stages:
            device = next(one for one in cluster.node(stage.node).devices if one.index == stage.devices[0])
            time = costs.step_time(device, stage.start, stage.stop, replica.predicted_batch, context)
            yield _share(stage, cluster, costs, time)
    for unused in plan.unused:
        yield f"{device_name(cluster, unused.node, unused.device)} unused: {unused.reason}"


def _summary(replica: Replica, cluster: Cluster, costs: CostModel, max_model_tokens: int) -> str:
    links, batch = cluster.link_table(), replica.predicted_batch
    nodes = [stage.node for stage in replica.stages]
    hops_s = [
        costs.hop_s(None, batch) if a == b else costs.hop_s(links[a, b], batch) for a, b in pairwise(nodes)
    ]
    if len(nodes) > 1:
        back = None if nodes[-1] == nodes[0] else links[nodes[-1], nodes[0]]
        hops_s.append(costs.return_s(back))
    stages_s = sum(stage.predicted_step_s for stage in replica.stages)
    kv_tokens = replica.kv_blocks * replica.block_tokens
    longest = (
        "every sequence" if kv_tokens >= max_model_tokens else f"sequences of at most {kv_tokens} tokens"
    )
    n_stages = f"{len(nodes)} stage{'s' if len(nodes) > 1 else ''}"
    return (
        f"{replica.id}: {n_stages}, {replica.predicted_tokens_per_s:.1f} tokens/s with {batch} sequences "
        f"at once: a step is {show_duration(stages_s)} of stages, {show_duration(sum(hops_s))} of network; "
        f"KV for {kv_tokens} tokens in {replica.kv_blocks} blocks, room for {longest} of the model's "
        f"{max_model_tokens} tokens"
    )


def _share(stage: Stage, cluster: Cluster, costs: CostModel, time: StepTime) -> str:
    weights = costs.weight_bytes(stage.start, stage.stop)
    kv = stage.kv_blocks * costs.kv_block_bytes(stage.n_layers)
    span = f"layer {stage.start}" if stage.n_layers == 1 else f"layers {stage.start}-{stage.stop - 1}"
    name = device_name(cluster, stage.node, stage.devices[0])
    return (
        f"{name} {span} ({stage.n_layers} of {costs.spec.n_layers}): "
        f"{show_bytes(weights)} weights + {show_bytes(kv)} KV + "
        f"{show_bytes(stage.needed_bytes - weights - kv)} workspace of {show_bytes(stage.room_bytes)}; "
        f"step {show_duration(stage.predicted_step_s)}, bound by {time.bound}"
    )


def device_name(cluster: Cluster, node_id: str, device_index: int) -> str:
    """A device as people know it, such as "gpu-a cuda:0"."""
    node = cluster.node(node_id)
    kinds = [device.kind for device in node.devices if device.index == device_index]
    return f"{node.name} {kinds[0] if kinds else 'device'}:{device_index}"
