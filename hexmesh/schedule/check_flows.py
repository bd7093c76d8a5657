"""What must hold of a plan's flows: every replica has its part, nothing gets lost, and shared ways carry the KV."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from hexmesh.cluster import Cluster, Role
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DTYPE_BYTES, Flow, Plan, Replica
from hexmesh.score import handoff_bytes
from hexmesh.workload import Workload

_SAME = 1e-6
"""Shares and rates nearer than this differ by rounding alone."""


def flow_violations(
    plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload | None
) -> Iterator[str]:
    """In words. Without a workload, what a handoff sends is not known, and no way is looked at."""
    roles = {replica.id: replica.role for replica in plan.replicas}
    if len(roles) != len(plan.replicas):
        yield "two replicas have the same id"
    unknown = [flow for flow in plan.flows if not _joins(flow, roles)]
    yield from (
        f"flow from {flow.src} to {flow.dst}: no such prefill and decode replicas" for flow in unknown
    )
    yield from (
        f"flow from {flow.src} to {flow.dst} has share {flow.share}"
        for flow in plan.flows
        if not 0.0 <= flow.share <= 1.0
    )
    total = sum(flow.share for flow in plan.flows)
    if plan.flows and abs(total - 1.0) > _SAME:
        yield f"the flows' shares sum to {total}"
    yield from _idle_replicas(plan)
    yield from _unable(plan, cluster)
    if not plan.flows or unknown:
        return
    yield from _lost_outputs(plan)
    if workload is not None:
        yield from _overfull_ways(plan, cluster, spec, workload)


def _joins(flow: Flow, roles: Mapping[str, Role]) -> bool:
    if flow.src == flow.dst:
        return roles.get(flow.src) == "mixed"
    return roles.get(flow.src) in ("mixed", "prefill") and roles.get(flow.dst) in ("mixed", "decode")


def _unable(plan: Plan, cluster: Cluster) -> Iterator[str]:
    """Handing KV over is prefilling, taking it over is decoding, and not all hosts do that."""
    roles = {node.id: node.roles for node in cluster.nodes}
    held_by = {replica.id: [stage.node for stage in replica.stages] for replica in plan.replicas}
    ends: tuple[tuple[Role, str], ...] = ("prefill", "src"), ("decode", "dst")
    for flow in plan.flows:
        for role, end in ends if flow.src != flow.dst else ():
            for node in held_by.get(getattr(flow, end), ()):
                does = roles.get(node)
                if does is not None and role not in does:
                    yield f"flow from {flow.src} to {flow.dst}: {node} does no {role}"


def _idle_replicas(plan: Plan) -> Iterator[str]:
    """Replicas that no request goes through. Mixed ones alone need no flows: then each serves its own prompts."""
    entered = {flow.dst for flow in plan.flows if flow.share > 0}
    left = {flow.src for flow in plan.flows if flow.share > 0}
    for replica in plan.replicas:
        if replica.role == "prefill" and replica.id not in left:
            yield f"{replica.id}: prompts are computed there and go to no decode replica"
        elif replica.role == "decode" and replica.id not in entered:
            yield f"{replica.id}: decodes, and no prefill replica sends it anything"
        elif replica.role == "mixed" and plan.flows and replica.id not in entered | left:
            yield f"{replica.id}: no request goes through it"


def _inflows(flows: Iterable[Flow]) -> defaultdict[str, float]:
    enters = defaultdict[str, float](float)
    for flow in flows:
        enters[flow.dst] += flow.share
    return enters


def _lost_outputs(plan: Plan) -> Iterator[str]:
    """Where the share of the prompts that come in is not the share of the tokens that go out."""
    enters, total = _inflows(plan.flows), _tokens_per_s(plan.replicas)
    for replica in plan.replicas:
        if replica.role == "prefill":
            continue
        share = replica.predicted_tokens_per_s / total if total > 0 else 0.0
        if abs(share - enters[replica.id]) > _SAME:
            yield (
                f"{replica.id}: {enters[replica.id]:.4f} of the requests come in, {share:.4f} of the tokens "
                f"go out"
            )


def _tokens_per_s(replicas: Iterable[Replica]) -> float:
    return sum(replica.predicted_tokens_per_s for replica in replicas if replica.role != "prefill")


def _overfull_ways(plan: Plan, cluster: Cluster, spec: ModelSpec, workload: Workload) -> Iterator[str]:
    """Ways that KV is handed over, at the rate that the plan promises."""
    requests_per_s = _tokens_per_s(plan.replicas) / workload.output_tokens
    layer_bytes = workload.prompt_tokens * spec.kv_values_per_token * DTYPE_BYTES[plan.dtype]
    stages = {replica.id: replica.stages for replica in plan.replicas}
    sites = {node.id: node.site for node in cluster.nodes}
    sent = defaultdict[tuple[str, str], float](float)
    for flow in plan.flows:
        for way, n_bytes in handoff_bytes(stages[flow.src], stages[flow.dst], layer_bytes).items():
            sent[way] += flow.share * requests_per_s * n_bytes
    links = cluster.link_table()
    for (src, dst), rate in sent.items():
        if (src, dst) not in links:
            yield f"KV goes from {src} to {dst}, which no measured link joins"
        else:
            yield from _over(f"the link from {src} to {dst}", rate, links[src, dst].bytes_per_s)
    for node in cluster.nodes:
        if node.nic is not None:
            out = sum(rate for (src, _), rate in sent.items() if src == node.id)
            into = sum(rate for (_, dst), rate in sent.items() if dst == node.id)
            yield from _over(f"what {node.id} sends", out, node.nic.out_bytes_per_s)
            yield from _over(f"what {node.id} receives", into, node.nic.in_bytes_per_s)
    for line in cluster.site_links:
        ends = (line.src, line.dst)
        rate = sum(rate for (src, dst), rate in sent.items() if (sites.get(src), sites.get(dst)) == ends)
        yield from _over(f"the line from {line.src} to {line.dst}", rate, line.bytes_per_s)


def _over(what: str, rate: float, limit: float) -> Iterator[str]:
    if rate > limit * (1 + _SAME):
        yield f"{what}: {rate:.4g} bytes/s of KV, it carries {limit:.4g}"
