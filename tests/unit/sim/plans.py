"""Plans made by hand over fleets of the documentation, for simulations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Role
from hexmesh.cost import CostModel, StepLimits
from hexmesh.fleet import cluster_of, read_fleet
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import Flow, Plan, Replica, Stage
from hexmesh.score import Capacities, pipeline_of, score_replicas
from hexmesh.workload import Workload

FLEETS = Path(__file__).resolve().parents[3] / "docs" / "fleets"
BLOCK_TOKENS = 16
SMALL = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
)
LLAMA_2_70B = model_spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    }
)


def fleet(name: str) -> Cluster:
    return cluster_of(read_fleet((FLEETS / f"{name}.toml").read_text(encoding="utf-8")), "float16")


def capacities_of(spec: ModelSpec, workload: Workload) -> Capacities:
    return Capacities(CostModel(spec, "float16", BLOCK_TOKENS, StepLimits()), workload)


def replica(
    name: str,
    role: Role,
    seats: Iterable[tuple[str, tuple[int, ...], int, int]],
    cluster: Cluster,
    capacities: Capacities,
    kv_blocks: int | None = None,
) -> Replica:
    """A replica of (node, devices, start, stop), with all the KV blocks that fit."""
    costs = capacities.costs
    stages = []
    for node, devices, start, stop in seats:
        device = cluster.node(node).devices[devices[0]]
        room = costs.room_blocks(start, stop, device, len(devices))
        stages.append(
            Stage(
                node=node,
                devices=devices,
                start=start,
                stop=stop,
                kv_blocks=room if kv_blocks is None else kv_blocks,
                needed_bytes=0,
                room_bytes=device.budget_bytes,
                predicted_step_s=1e-3,
            )
        )
    pipeline = pipeline_of(stages, cluster)
    decode = capacities.decode(pipeline)
    return Replica(
        id=name,
        role=role,
        stages=tuple(stages),
        block_tokens=BLOCK_TOKENS,
        predicted_tokens_per_s=max(1.0, decode.tokens_per_s),
        predicted_batch=max(1, int(decode.batch * decode.micro_batches)),
    )


def at_rate(one: Replica, cluster: Cluster, capacities: Capacities, requests_per_s: float) -> Replica:
    """The replica as planned for so many outputs a second."""
    tokens_per_s = requests_per_s * capacities.workload.output_tokens
    pipeline = pipeline_of(one.stages, cluster)
    tpot_s = capacities.tpot_at(pipeline, requests_per_s, computes_prompts=one.role == "mixed")
    n_held = 1 if one.role == "prefill" else int(min(one.predicted_batch, tokens_per_s * tpot_s))
    return replace(one, predicted_tokens_per_s=tokens_per_s, predicted_batch=max(1, n_held))


def plan_of(
    replicas: Iterable[Replica], spec: ModelSpec, cluster: Cluster, capacities: Capacities | None = None
) -> Plan:
    """With the flows that the score finds; without `capacities`, each replica by itself."""
    replicas = tuple(replicas)
    flows: tuple[Flow, ...] = ()
    if capacities is not None:
        score = score_replicas(replicas, cluster, capacities)
        flows = tuple(
            Flow(src=p, dst=d, share=rate / score.requests_per_s) for (p, d), rate in score.flows.items()
        )
    return Plan(
        model_id="m",
        model_name="m",
        n_layers=spec.n_layers,
        dtype="float16",
        max_model_tokens=4096,
        hosts={node.id: 0 for node in cluster.nodes},
        replicas=replicas,
        flows=flows,
    )


def pipelines_by_host(
    cluster: Cluster, capacities: Capacities, roles: dict[str, Role] | None = None, tp: int = 1
) -> list[Replica]:
    """A replica a host, a stage for every `tp` devices, layers dealt out evenly."""
    n_layers, found = capacities.costs.spec.n_layers, []
    for node in cluster.nodes:
        n = len(node.devices) // tp
        seats = [
            (
                node.id,
                tuple(range(at * tp, (at + 1) * tp)),
                n_layers * at // n,
                n_layers * (at + 1) // n,
            )
            for at in range(n)
        ]
        found.append(replica(node.id, (roles or {}).get(node.id, "mixed"), seats, cluster, capacities))
    return found
