"""What stays the same for all searches of one planning of a running mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from msgspec.structs import replace

from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName
from hexmesh.planner.objective import Objective
from hexmesh.planner.problem import Problem
from hexmesh.schedule.room import Place
from hexmesh.score import Residency
from hexmesh.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A model to be served by some hosts of a mesh."""

    everywhere: Cluster
    hosts: Mapping[str, int]
    spec: ModelSpec
    dtype: DtypeName
    workload: Workload
    objective: Objective
    max_model_tokens: int
    block_tokens: int
    step_tokens: int

    def __post_init__(self) -> None:
        n_sequences = self.workload.max_concurrent_sequences
        if min(self.max_model_tokens, self.block_tokens, n_sequences, self.workload.mean_context_tokens) < 1:
            raise InvalidInput("token counts and concurrency of a workload must be positive")

    @cached_property
    def cluster(self) -> Cluster:
        """The hosts' devices of measured speed, in the order of names: what comes first shall not depend on chance."""
        nodes = [
            replace(
                node,
                devices=tuple(
                    sorted(
                        (one for one in node.devices if one.flops_per_s > 0 and one.bytes_per_s > 0),
                        key=lambda one: one.index,
                    )
                ),
            )
            for node in sorted(self.everywhere.nodes, key=lambda node: node.id)
            if node.id in self.hosts
        ]
        kept = {node.id for node in nodes if node.devices}
        return replace(
            self.everywhere,
            nodes=tuple(node for node in nodes if node.id in kept),
            links=tuple(
                sorted(
                    (link for link in self.everywhere.links if {link.src, link.dst} <= kept),
                    key=lambda link: (link.src, link.dst),
                )
            ),
        )

    @property
    def places(self) -> tuple[Place, ...]:
        """The devices of `cluster`."""
        return tuple(Place(node, device) for node in self.cluster.nodes for device in node.devices)

    @cached_property
    def asked(self) -> Workload:
        """The workload, its requests no longer than the model takes."""
        prompt, output = self.workload.prompt_tokens, self.workload.output_tokens
        if prompt + output <= self.max_model_tokens:
            return self.workload
        prompt = max(1, prompt * self.max_model_tokens // (prompt + output))
        return replace(
            self.workload,
            prompt_tokens=prompt,
            output_tokens=max(1, self.max_model_tokens - prompt),
            lengths=None,
        )

    @cached_property
    def limits(self) -> StepLimits:
        """The largest step that stages make room for."""
        n_sequences = self.workload.max_concurrent_sequences
        return StepLimits(
            step_tokens=min(self.step_tokens, n_sequences * self.max_model_tokens),
            logits_rows=n_sequences,
            context_tokens=self.floors[0],
        )

    @cached_property
    def costs(self) -> CostModel:
        return CostModel(self.spec, self.dtype, self.block_tokens, self.limits)

    @cached_property
    def floors(self) -> tuple[int, ...]:
        """Sequence lengths to make room for, ascending: the first one is a must, the last one most wanted."""
        must = min(self.max_model_tokens, self.workload.prompt_tokens + self.workload.output_tokens)
        return tuple(sorted({must, *_halves(self.max_model_tokens, must)}))

    @property
    def max_blocks(self) -> int:
        """What all concurrent sequences need at full length: more is no use."""
        return self.workload.max_concurrent_sequences * self.costs.blocks_of(self.max_model_tokens)

    def problem(self, floor_tokens: int, cluster: Cluster | None = None) -> Problem:
        """The search for replicas whose stages all have room for a sequence of `floor_tokens`."""
        return Problem(
            cluster=self.cluster if cluster is None else cluster,
            spec=self.spec,
            dtype=self.dtype,
            workload=self.asked,
            objective=self.objective,
            block_tokens=self.block_tokens,
            limits=self.limits,
            residency=Residency(
                least_tokens=self.costs.blocks_of(floor_tokens) * self.block_tokens,
                most_sequences=self.workload.max_concurrent_sequences,
                prompts=1,
            ),
        )


def _halves(longest: int, shortest: int) -> Iterator[int]:
    """`longest`, its half, quarter and so on, while longer than `shortest`."""
    while longest > shortest:
        yield longest
        longest //= 2
