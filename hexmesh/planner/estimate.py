"""What a team may come to, before its layout is solved: good enough to say which teams are worth solving.

A device's density as in `hexmesh.score.bound`, but with the batch that the whole team's memory leaves after one copy of
the weights, shared by the micro-batches that keep its stages busy. Neither a bound nor a rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hexmesh.cluster import Role
from hexmesh.planner.pools import Pool, Team
from hexmesh.planner.problem import Problem
from hexmesh.roofline import Group
from hexmesh.score.capacity import BATCH_CAP
from hexmesh.score.pipeline import group_like


@dataclass(frozen=True)
class Estimates:
    """Of teams of one problem."""

    problem: Problem

    def worth(self, team: Team, role: Role, prompt: float, output: float) -> float:
        """What the team may bring in the role, when a prompt and an output a second are worth so much."""
        prefill = 0.0 if role == "decode" else self._prefill(team)
        decode = 0.0 if role == "prefill" else self._decode(team)
        both = prefill * decode / (prefill + decode) if prefill > 0 and decode > 0 else 0.0
        return (prompt + output) * both if role == "mixed" else prompt * prefill + output * decode

    def _prefill(self, team: Team) -> float:
        return sum(n * self._by_pool[pool] for pool, n in team)

    @cached_property
    def _by_pool(self) -> list[float]:
        """Prompts a second of one device, whatever the team."""
        known = dict[object, float]()
        return [
            known.setdefault(_kind(pool), self._device_prefill(pool))
            if _kind(pool) not in known
            else known[_kind(pool)]
            for pool in self.problem.pools
        ]

    def _device_prefill(self, pool: Pool) -> float:
        capacities = self.problem.capacities
        layer, n_layers = capacities.costs.spec.layers[-1], capacities.costs.spec.n_layers
        prompt = capacities.workload.prompt_tokens
        return max(
            1 / (group.tp * n_layers * capacities.model.prefill_layer_s(group, layer, prompt))
            for group in _groups(pool)
        )

    def _decode(self, team: Team) -> float:
        capacities, pools = self.problem.capacities, self.problem.pools
        costs, workload = capacities.costs, capacities.workload
        spare = sum(n * pools[pool].device.budget_bytes for pool, n in team)
        spare -= costs.weight_bytes(0, costs.spec.n_layers)
        resident = spare / capacities.model.kv_bytes(workload.mean_context)
        n_stages = sum(-(-n // pools[pool].degrees[-1]) for pool, n in team)
        batch = min(resident / n_stages, float(BATCH_CAP))
        return sum(n * self._device_decode(pools[pool], batch) for pool, n in team) if batch > 0 else 0.0

    def _device_decode(self, pool: Pool, batch: float) -> float:
        capacities = self.problem.capacities
        spec, workload = capacities.costs.spec, capacities.workload
        layer, context = spec.layers[-1], workload.mean_context
        return max(
            batch
            / (group.tp * workload.output_tokens * spec.n_layers)
            / capacities.model.decode_layer_s(group, layer, batch, context)
            for group in _groups(pool)
        )


def _groups(pool: Pool) -> list[Group]:
    """The smallest and the largest of the pool."""
    return [group_like(pool.node, pool.device, tp) for tp in {pool.degrees[0], pool.degrees[-1]}]


def _kind(pool: Pool) -> object:
    return pool.device, pool.degrees, pool.node.fabric, pool.node.launch_s
