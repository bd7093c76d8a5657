"""How little memory a demo's nodes get, so that the model needs all of them: asked of the planner itself."""

from __future__ import annotations

from daemon.models.model_source import resolve_model
from hexmesh.cluster import Cluster, Device, Link, Node
from hexmesh.cost import default_dtype
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec, model_spec_from_config
from hexmesh.plan import Plan
from hexmesh.schedule.layout import lay_out
from hexmesh.workload import Workload

_START_BYTES = 2**20
_MOST_BYTES = 2**40
_ACCURACY_BYTES = 2**14


def demo_memory_bytes(n_nodes: int) -> int:
    """A budget for each node with which `n_nodes` hold the shipped model and one fewer do not."""
    model = resolve_model()
    spec = model_spec_from_config(model.config, generation_config=model.generation_config)
    return memory_for_exactly(spec, n_nodes)


def memory_for_exactly(spec: ModelSpec, n_nodes: int) -> int:
    """Half way between the least budgets for `n_nodes` CPU nodes and for one fewer; one gets twice its least.

    Raises InvalidInput when one more node lets no smaller budget do.
    """
    least = least_memory_bytes(spec, n_nodes)
    if n_nodes == 1:
        return 2 * least
    fewer = least_memory_bytes(spec, n_nodes - 1)
    if fewer - least < 2 * _ACCURACY_BYTES:
        raise InvalidInput(
            f"the model gains nothing from a node number {n_nodes}", next_step="ask for fewer nodes"
        )
    return (least + fewer) // 2


def least_memory_bytes(spec: ModelSpec, n_nodes: int) -> int:
    """The least budget with which `n_nodes` equal CPU nodes hold the model, up to _ACCURACY_BYTES."""
    too_little, enough = 0, _START_BYTES
    while not _fits(spec, n_nodes, enough):
        too_little, enough = enough, 2 * enough
        if enough > _MOST_BYTES:
            raise InvalidInput(f"{n_nodes} nodes cannot share the model", next_step="ask for fewer nodes")
    while enough - too_little > _ACCURACY_BYTES:
        middle = (too_little + enough) // 2
        if _fits(spec, n_nodes, middle):
            enough = middle
        else:
            too_little = middle
    return enough


def _fits(spec: ModelSpec, n_nodes: int, budget_bytes: int) -> bool:
    device = Device(
        index=0, kind="cpu", name="cpu", budget_bytes=budget_bytes, flops_per_s=1e10, bytes_per_s=1e10
    )
    ids = [f"node-{index}" for index in range(n_nodes)]
    cluster = Cluster(
        nodes=tuple(
            Node(id=name, name=name, site="here", devices=(device,), tp_degrees=(1,), roles=("mixed",))
            for name in ids
        ),
        links=tuple(
            Link(src=src, dst=dst, rtt_p50_s=1e-4, rtt_p95_s=1e-4, bytes_per_s=1e9, lower_bound=False)
            for src in ids
            for dst in ids
            if src != dst
        ),
    )
    answer = lay_out(
        cluster,
        spec,
        default_dtype(["cpu"]),
        Workload(),
        model_id="demo",
        model_name="demo",
        hosts=dict.fromkeys(ids, 0),
        max_model_tokens=spec.max_position_tokens,
        algorithm="greedy",
    )
    return isinstance(answer, Plan)
