"""Small random groups of devices, and the best layout of each by trying every one.

All orders of all subsets of pools, all TP degrees in all orders and all cuts are listed, and judged by `Capacities`
itself, the most promising first: a bound on each layout's rate says when no other can be better.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise, permutations

from msgspec.structs import replace

from hexmesh.cluster import Cluster, Device, Fabric, Link, Node, Role
from hexmesh.cost import CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.planner.layouts import Layouts
from hexmesh.planner.pools import Part, Pool, Team, pools_of
from hexmesh.score import Capacities
from hexmesh.score.capacity import BATCH_CAP
from hexmesh.score.pipeline import NOWHERE, Pipeline, Seat, group_like, hop_between
from hexmesh.workload import LognormalLengths, Slo, Workload

_CONFIGS: dict[str, dict[str, object]] = {
    "dense": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
    },
    "tied": {
        "model_type": "gemma2",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "vocab_size": 16000,
        "sliding_window": 256,
    },
    "experts": {
        "model_type": "gpt_oss",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 16,
        "num_local_experts": 8,
        "vocab_size": 4000,
    },
    "latents": {
        "model_type": "deepseek_v3",
        "hidden_size": 512,
        "intermediate_size": 4096,
        "moe_intermediate_size": 256,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 8,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 128,
        "q_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "vocab_size": 4000,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A group and what it is to serve."""

    cluster: Cluster
    spec: ModelSpec
    workload: Workload

    @property
    def capacities(self) -> Capacities:
        limits = StepLimits(step_tokens=64, logits_rows=8, context_tokens=256)
        return Capacities(CostModel(self.spec, "float16", 16, limits), self.workload)

    @property
    def pools(self) -> tuple[Pool, ...]:
        return pools_of(self.cluster, self.spec)

    def layouts(self) -> Layouts:
        """A fresh search."""
        return Layouts(self.cluster, self.pools, self.capacities)


def whole(pools: tuple[Pool, ...]) -> Team:
    """All devices of the pools."""
    return tuple((at, pool.size) for at, pool in enumerate(pools))


def random_scene(seed: int, most_devices: int = 5, most_layers: int = 7) -> Scene:
    """2 to 5 devices in 1 to 3 hosts, 4 to 7 layers; in some, limits that bind."""
    rng = random.Random(seed)
    spec = _random_spec(rng, rng.randint(4, most_layers))
    cluster = _random_cluster(rng, spec, rng.randint(2, most_devices))
    scene = Scene(cluster=cluster, spec=spec, workload=_random_workload(rng))
    return replace_slo(scene, _random_limits(rng, scene)) if rng.random() < 0.6 else scene


def replace_slo(scene: Scene, slo: Slo) -> Scene:
    """The scene under other limits."""
    return Scene(cluster=scene.cluster, spec=scene.spec, workload=replace(scene.workload, slo=slo))


def _random_spec(rng: random.Random, n_layers: int) -> ModelSpec:
    config = dict(rng.choice(list(_CONFIGS.values())), num_hidden_layers=n_layers)
    if "kv_lora_rank" not in config:
        config["num_key_value_heads"] = rng.choice([2, 4, 8])
    return model_spec_from_config(config)


def _random_workload(rng: random.Random) -> Workload:
    prompt, output = rng.choice([32, 128, 512, 2048]), rng.choice([8, 64, 256, 1024])
    if rng.random() < 0.5:
        return Workload(prompt_tokens=prompt, output_tokens=output)
    return Workload.of(LognormalLengths(prompt=prompt, output=output, output_cv=rng.uniform(0, 1.5)))


def _random_limits(rng: random.Random, scene: Scene) -> Slo:
    """Some way above or below what the quickest single layouts take."""
    layouts, team = scene.layouts(), whole(scene.pools)
    prefill, mixed = layouts.best(team, "prefill"), layouts.best(team, "mixed")
    ttft_s = tpot_s = None
    if prefill is not None and rng.random() < 0.6:
        ttft_s = prefill.prefill_latency_s * rng.uniform(0.4, 1.3)
    if mixed is not None and rng.random() < 0.6:
        tpot_s = mixed.tpot_s * rng.uniform(0.2, 1.1)
    return Slo(ttft_s=ttft_s, tpot_s=tpot_s)


def _random_cluster(rng: random.Random, spec: ModelSpec, n_devices: int) -> Cluster:
    weights = 2 * spec.n_params
    kinds = [
        Device(
            index=0,
            kind="cuda",
            name="",
            budget_bytes=int(weights * rng.choice([0.3, 0.5, 0.8, 1.2, 2.0]) + 2**26 * rng.uniform(0.2, 2)),
            flops_per_s=rng.choice([1e12, 5e12, 2e13]) * rng.uniform(0.8, 1.2),
            bytes_per_s=rng.choice([2e10, 1e11, 5e11]) * rng.uniform(0.8, 1.2),
        )
        for _ in range(rng.randint(1, 3))
    ]
    kinds = [replace(kind, row_s=(0.0, 1e-6, 2e-5)[kind.budget_bytes % 3]) for kind in kinds]
    n_hosts = min(n_devices, rng.randint(1, 3))
    hosts = [[rng.choice(kinds)] for _ in range(n_hosts)]
    for _ in range(n_devices - n_hosts):
        host = rng.choice(hosts)
        host.append(host[0] if rng.random() < 0.8 else rng.choice(kinds))
    fabric = Fabric(kind="", bytes_per_s=10 ** rng.uniform(9, 11.5), step_s=rng.choice([0.0, 5e-6, 5e-5]))
    nodes = tuple(
        Node(
            id=f"n{at}",
            name=f"n{at}",
            site=f"s{at % 2}",
            devices=tuple(replace(device, index=index) for index, device in enumerate(devices)),
            fabric=fabric if rng.random() < 0.8 else None,
            launch_s=rng.choice([None, 1e-5, 1e-4]),
            step_s=rng.choice([None, 0.0, 1e-3]),
            tp_degrees=rng.choice([None, None, (1, 2)]),
        )
        for at, devices in enumerate(hosts)
    )
    return Cluster(nodes=nodes, links=tuple(_random_links(rng, nodes)))


def _random_links(rng: random.Random, nodes: tuple[Node, ...]) -> Iterator[Link]:
    """Alike everywhere, or each its own; some slow one way, some missing."""
    is_regular = rng.random() < 0.4
    rtt_s, rate = 10 ** rng.uniform(-4, -1.5), 10 ** rng.uniform(6, 10)
    for src, dst in permutations(nodes, 2):
        if not is_regular:
            rtt_s, rate = 10 ** rng.uniform(-4, -1.5), 10 ** rng.uniform(6, 10)
            if rng.random() < 0.15:
                continue
        yield Link(
            src=src.id, dst=dst.id, rtt_p50_s=rtt_s, rtt_p95_s=rtt_s, bytes_per_s=rate, lower_bound=False
        )


def brute_rate(scene: Scene, role: Role) -> float:
    """Requests per second of the best of all layouts of all devices; 0 if there is none."""
    capacities, unlimited = (
        scene.capacities,
        replace_slo(scene, Slo()).capacities,
    )  # limits are slow to search
    pools, best = scene.pools, 0.0

    @cache
    def part_bound(part: Part) -> float:
        group = group_like(pools[part.pool].node, pools[part.pool].device, part.tp)
        seat = Seat(group=group, start=part.start, stop=part.stop)
        return _bound(capacities, Pipeline(seats=(seat,), hops=(), back=NOWHERE), role)

    bounded = [(min(map(part_bound, parts)), parts) for parts in _all_parts(scene, pools)]
    for bound, parts in sorted(bounded, key=lambda pair: -pair[0]):
        if bound <= best * (1 - 1e-9):
            break
        pipeline = _pipeline(scene, pools, parts)
        if pipeline is not None and _rate(unlimited, pipeline, role) > best * (1 - 1e-9):
            best = max(best, _rate(capacities, pipeline, role))
    return best


def _rate(capacities: Capacities, pipeline: Pipeline, role: Role) -> float:
    if role == "prefill":
        return capacities.prefill(pipeline).requests_per_s
    if role == "decode":
        return capacities.decode(pipeline).requests_per_s
    prompts = capacities.prefill(pipeline).requests_per_s
    return capacities.mixed(pipeline).requests_per_s if prompts > 0 else 0.0


def _bound(capacities: Capacities, pipeline: Pipeline, role: Role) -> float:
    """A rate that no pipeline with these seats exceeds: the slowest's, with all of the room for one batch."""
    if role == "prefill":
        return capacities.prefill(pipeline).requests_per_s
    batch = min(capacities.resident(pipeline), BATCH_CAP)
    if batch < 1:
        return 0.0
    slowest_s = max(capacities.step_s(seat, batch) for seat in pipeline.seats)
    return batch / slowest_s / capacities.workload.output_tokens * (1 + 1e-9)


def brute_alone_s(scene: Scene, role: Role) -> float:
    """Seconds of one request alone on the layout where that is least, limits of time left out."""
    unlimited = replace_slo(scene, Slo())
    capacities, pools, workload = unlimited.capacities, unlimited.pools, unlimited.workload
    found = [float("inf")]
    for parts in _all_parts(unlimited, pools):
        pipeline = _pipeline(unlimited, pools, parts)
        if pipeline is None or _rate(capacities, pipeline, role) == 0:
            continue
        token_s = capacities.tpot_at(pipeline, 0.0, computes_prompts=False)
        prompt_s = 0.0 if role == "decode" else capacities.prefill(pipeline).latency_s
        found.append(prompt_s + (0.0 if role == "prefill" else (workload.output_tokens - 1) * token_s))
    return min(found)


def _all_parts(scene: Scene, pools: tuple[Pool, ...]) -> Iterator[tuple[Part, ...]]:
    n_layers = scene.spec.n_layers
    for groups in _all_groups(pools):
        if len(groups) <= n_layers:
            for cuts in combinations(range(1, n_layers), len(groups) - 1):
                spans = pairwise((0, *cuts, n_layers))
                yield tuple(
                    Part(pool=pool, tp=tp, start=start, stop=stop)
                    for (pool, tp), (start, stop) in zip(groups, spans, strict=True)
                )


def _all_groups(pools: tuple[Pool, ...]) -> Iterator[list[tuple[int, int]]]:
    """(pool, TP degree) by stage: all orders of all subsets of pools, each visited once."""
    for n_pools in range(1, len(pools) + 1):
        for order in permutations(range(len(pools)), n_pools):
            yield from _in_order(pools, order)


def _in_order(pools: tuple[Pool, ...], order: tuple[int, ...]) -> Iterator[list[tuple[int, int]]]:
    if not order:
        yield []
        return
    pool = order[0]
    for degrees in _sequences(pools[pool].degrees, pools[pool].size):
        for rest in _in_order(pools, order[1:]):
            yield [*((pool, tp) for tp in degrees), *rest]


def _sequences(degrees: tuple[int, ...], n_devices: int) -> Iterator[tuple[int, ...]]:
    """All sequences of TP degrees of at most so many devices, but the empty one."""
    for tp in degrees:
        if tp <= n_devices:
            yield (tp,)
            for rest in _sequences(degrees, n_devices - tp):
                yield (tp, *rest)


def pipeline_of_parts(scene: Scene, parts: tuple[Part, ...]) -> Pipeline | None:
    """What the score rates; None where a way is missing."""
    return _pipeline(scene, scene.pools, parts)


def _pipeline(scene: Scene, pools: tuple[Pool, ...], parts: tuple[Part, ...]) -> Pipeline | None:
    links, nodes = scene.cluster.link_table(), [pools[part.pool].node for part in parts]
    try:
        return Pipeline(
            seats=tuple(
                Seat(
                    group=group_like(pools[part.pool].node, pools[part.pool].device, part.tp),
                    start=part.start,
                    stop=part.stop,
                )
                for part in parts
            ),
            hops=tuple(hop_between(a, b, links) for a, b in pairwise(nodes)),
            back=NOWHERE if len(nodes) == 1 else hop_between(nodes[-1], nodes[0], links),
        )
    except InvalidInput:
        return None
