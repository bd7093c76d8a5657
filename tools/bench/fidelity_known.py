"""What a mesh plans from, and what the score and the simulator predict from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from daemon.terminal.local_mesh import LocalMesh
from daemon.views import PlanningView
from hexmesh.cluster import Cluster
from hexmesh.cost import CostModel, StepLimits
from hexmesh.plan import Flow, Plan, Replica, Stage
from hexmesh.score import Capacities, Pipeline, Residency, pipeline_of
from hexmesh.sim import SimResult, simulate
from hexmesh.workload import TraceArrivals, Workload
from tools.bench.fidelity_asked import N_STREAMS

BLOCK_TOKENS = 16
N_SIMULATED = 600
_SEED = 1
_FAR_APART_S = 1000.0


@dataclass(frozen=True, slots=True)
class Known:
    """Of a mesh whose plan is one replica."""

    view: PlanningView
    plan: Plan
    plan_id: str

    @property
    def cluster(self) -> Cluster:
        return self.view.cluster

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.plan.replicas[0].stages

    @property
    def spans(self) -> str:
        """How the plan cuts the layers."""
        return "layers " + ", ".join(f"{stage.start}-{stage.stop - 1}" for stage in self.stages)

    def by_figures_of(self, other: Known) -> Known:
        """This plan, over what was known of the hosts then."""
        return Known(other.view, self.plan, self.plan_id)

    @property
    def pipeline(self) -> Pipeline:
        return pipeline_of(self.stages, self.cluster)

    def capacities(self, workload: Workload) -> Capacities:
        """The score of N_STREAMS at once."""
        costs = CostModel(self.view.spec, self.plan.dtype, BLOCK_TOKENS, StepLimits())
        return Capacities(costs, workload, Residency(most_sequences=N_STREAMS, prompts=1))

    def simulated_alone(self, workload: Workload) -> SimResult:
        """Nothing waits."""
        return self._simulated(workload, [0.0, _FAR_APART_S, 2 * _FAR_APART_S])

    def simulated_at(self, workload: Workload, sent_s: Sequence[float]) -> SimResult:
        """Requests that come at these times."""
        return self._simulated(workload, sent_s)

    def simulated_full(self, workload: Workload) -> SimResult:
        """N_STREAMS at once."""
        return simulate(
            self.plan,
            self.cluster,
            self.view.spec,
            workload,
            n_requests=N_SIMULATED,
            seed=_SEED,
            n_at_once=N_STREAMS,
        )

    def _simulated(self, workload: Workload, sent_s: Sequence[float]) -> SimResult:
        asked = msgspec.structs.replace(workload, arrivals=TraceArrivals(times=tuple(sent_s)))
        return simulate(
            self.plan,
            self.cluster,
            self.view.spec,
            asked,
            n_requests=len(sent_s),
            seed=_SEED,
            warm_up=0.0,
        )


def known_of(mesh: LocalMesh) -> Known:
    """Asked of the mesh, in the words that it plans with."""
    view = msgspec.convert(mesh.daemons[0].get("/admin/planning"), PlanningView)
    topology = mesh.daemons[0].get("/admin/topology")
    (replica,) = topology["replicas"]
    stages = tuple(
        Stage(
            node=stage["node"],
            devices=tuple(stage["devices"]),
            start=stage["layers"][0],
            stop=stage["layers"][1],
            kv_blocks=stage["kv_blocks"],
            needed_bytes=0,
            room_bytes=0,
            predicted_step_s=0.01,
        )
        for stage in replica["stages"]
    )
    made = Replica(
        id="r0",
        role="mixed",
        stages=stages,
        block_tokens=BLOCK_TOKENS,
        predicted_tokens_per_s=replica["predicted_tokens_per_s"],
        predicted_batch=N_STREAMS,
    )
    plan = Plan(
        model_id=view.model_id,
        model_name=view.model_name,
        n_layers=view.spec.n_layers,
        dtype=view.dtype,
        max_model_tokens=view.max_model_tokens,
        hosts=view.hosts,
        replicas=(made,),
        flows=(Flow(src="r0", dst="r0", share=1.0),),
    )
    return Known(view, plan, topology["plan_id"])
