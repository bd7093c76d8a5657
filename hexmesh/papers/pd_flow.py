"""HexGen-2's flow network: requests from a source through a prefill replica and a decode replica to a sink.

Capacities are requests in a period: of replicas, and of handing KV over between two of them. Solved by preflow-push, as
in the paper (arXiv 2502.07903); a replica's own capacity is that of its edge to source or sink.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx
from networkx.algorithms.flow import preflow_push

_SOURCE, _SINK = ("source", ""), ("sink", "")


@dataclass(frozen=True, slots=True)
class PdFlow:
    """How many requests go in all, and how many from which prefill to which decode replica."""

    value: float
    flows: Mapping[tuple[str, str], float]

    def of_prefill(self, name: str) -> float:
        """Requests through that prefill replica."""
        return sum(flow for (prefill, _), flow in self.flows.items() if prefill == name)

    def of_decode(self, name: str) -> float:
        """Requests through that decode replica."""
        return sum(flow for (_, decode), flow in self.flows.items() if decode == name)


def max_flow(
    prefill: Mapping[str, float], decode: Mapping[str, float], handoff: Mapping[tuple[str, str], float]
) -> PdFlow:
    """The largest flow for these capacities; `handoff` is by (prefill, decode)."""
    graph = nx.DiGraph()
    graph.add_nodes_from([_SOURCE, _SINK])
    for name, capacity in prefill.items():
        graph.add_edge(_SOURCE, ("prefill", name), capacity=capacity)
    for name, capacity in decode.items():
        graph.add_edge(("decode", name), _SINK, capacity=capacity)
    for (source, target), capacity in handoff.items():
        graph.add_edge(("prefill", source), ("decode", target), capacity=capacity)
    residual = preflow_push(graph, _SOURCE, _SINK)
    flows = {
        (source, target): max(0.0, float(residual["prefill", source]["decode", target]["flow"]))
        for (source, target), capacity in handoff.items()
        if capacity > 0
    }
    return PdFlow(float(residual.graph["flow_value"]), flows)
