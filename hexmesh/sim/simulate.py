"""A plan at work in virtual time: the daemon's batcher, block tables, router and pacing, stage times by the roofline.

With a rate, requests come until there were `n_requests`, and all of them end. The measured window begins when the
warm-up's share of them has ended and is over with the last arrival: latencies are of the requests that came in it,
rates of what happened in it.

Without a rate as many are served as can be: whoever ends makes room for the next. Replicas begin with the sequences
that they should hold by the plan's prediction, each somewhere in its output, so that no sequence's whole life must go
by first; the window begins when half of `n_requests` have ended, and ends when all have, and latencies are of those
that ended in it and began in the run. Queues are kept full; with `n_at_once` so many requests are in the mesh instead,
as when so many clients each ask again when they are answered.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from msgspec import structs

from hexmesh.cluster import Cluster
from hexmesh.errors import InvalidInput
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DTYPE_BYTES, Plan, Replica
from hexmesh.serving.batcher import BatchLimits
from hexmesh.serving.micro_batch import MAX_RUNNING
from hexmesh.sim.events import Events
from hexmesh.sim.gateway import Flight, Gateway, Listener
from hexmesh.sim.mesh import Mesh
from hexmesh.sim.network import Network
from hexmesh.sim.record import Record
from hexmesh.sim.replica import SimulatedReplica
from hexmesh.sim.residents import residents
from hexmesh.sim.result import SimResult
from hexmesh.sim.routes import Routes
from hexmesh.workload import Request, Workload, requests

TELL_S = 1.0
"""How often drivers tell what their replicas do."""
NOTICED_S = 1.0
"""After a host's death, until the mesh knows of it."""
TIMEOUT_S = 600.0
"""The daemon's deadline for a request."""
WARM_UP, SATURATED_WARM_UP = 0.1, 0.5
RESIDENCES = 3
MORE_THAN_PLANNED = 1.25
QUEUED = 32
"""Requests in the queue of each replica that takes prompts, where as many are served as can be; and as many as let
replicas hold MORE_THAN_PLANNED."""
_N_TOLD = 100


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A host dies (and returns)."""

    at_s: float
    node: str
    back_s: float | None = None


def simulate(
    plan: Plan,
    cluster: Cluster,
    spec: ModelSpec,
    workload: Workload,
    *,
    n_requests: int,
    seed: int,
    warm_up: float | None = None,
    n_at_once: int | None = None,
    failures: Sequence[Failure] = (),
    progress: Callable[[int, int], None] | None = None,
) -> SimResult:
    """What so many requests of the workload meet. The same for the same seed.

    `warm_up` is the share of them before the window opens: a tenth with a rate, half without.

    Raises InvalidInput for a plan that the cluster has no links for, and for fewer than two requests.
    """
    if warm_up is None:
        warm_up = SATURATED_WARM_UP if workload.arrivals is None else WARM_UP
    if n_requests < 2 or not 0 <= warm_up < 1:
        raise InvalidInput(
            f"{n_requests} requests, of which {warm_up:.0%} warm up: nothing to measure",
            next_step="simulate some hundreds",
        )
    scenario = Scenario(
        plan=as_daemons_run_it(plan),
        cluster=cluster,
        spec=spec,
        workload=workload,
        n_requests=n_requests,
        warm_up=warm_up,
        n_at_once=n_at_once,
    )
    return Simulation(scenario, random.Random(seed), failures, progress).run()


def n_to_settle(plan: Plan) -> int:
    """Requests after which a saturated run's rate is the plan's, to about 2 %: those held at a time, some times over.

    Replicas begin in the middle of outputs and with no prompts half done, and it takes them a residence to forget that.
    """
    return RESIDENCES * sum(one.predicted_batch for one in as_daemons_run_it(plan).replicas)


def as_daemons_run_it(plan: Plan) -> Plan:
    """The plan, its replicas holding no more sequences than a batcher runs."""
    replicas = tuple(
        structs.replace(one, predicted_batch=min(MAX_RUNNING, one.predicted_batch)) for one in plan.replicas
    )
    return structs.replace(plan, replicas=replicas)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated."""

    plan: Plan
    cluster: Cluster
    spec: ModelSpec
    workload: Workload
    n_requests: int
    warm_up: float
    n_at_once: int | None = None
    """Without a rate: clients that each wait for an answer. None: as many as keep the queues full."""

    @property
    def is_saturated(self) -> bool:
        return self.workload.arrivals is None

    @property
    def prompt_replicas(self) -> list[Replica]:
        """Those that take requests in."""
        sources = {flow.src for flow in self.plan.flows}
        return [one for one in self.plan.replicas if one.id in sources or not sources]

    @property
    def n_queued(self) -> int:
        """Requests that there are beside those that outputs are drawn for, where as many are served as can be."""
        n_more = sum(
            max(0, self.limits(replica).max_running - replica.predicted_batch)
            for replica in self.output_replicas
        )
        return QUEUED * len(self.prompt_replicas) + n_more

    @property
    def output_replicas(self) -> list[Replica]:
        """Those that requests end in."""
        targets = {flow.dst for flow in self.plan.flows}
        return [one for one in self.plan.replicas if one.id in targets or not targets]

    def limits(self, replica: Replica) -> BatchLimits:
        """The daemon's, but a replica runs as many sequences as were planned for it, and some more."""
        n_planned = round(MORE_THAN_PLANNED * replica.predicted_batch)
        limits = BatchLimits(max_running=min(MAX_RUNNING, max(BatchLimits().max_running, n_planned)))
        return replace(limits, max_waiting=sys.maxsize) if self.is_saturated else limits


class Simulation:
    """Owns one run."""

    def __init__(
        self,
        scenario: Scenario,
        rng: random.Random,
        failures: Sequence[Failure],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        plan, spec = scenario.plan, scenario.spec
        self._scenario = scenario
        self._progress = progress
        self._n_wanted = scenario.n_requests
        self._events = Events()
        self.network = Network(scenario.cluster, self._events)
        self._routes = Routes(plan, random.Random(rng.getrandbits(64)))
        self.mesh = Mesh(plan, self._start)
        self._record = Record(self._events, self.mesh, self.network)
        self._gateway = Gateway(
            mesh=self.mesh,
            routes=self._routes,
            events=self._events,
            network=self.network,
            listener=Listener(
                on_tokens=self._record.tokens,
                on_prompt=self._record.prompt,
                on_served=self._served,
                on_refused=self._refused,
                on_lost=self._lost,
                on_replayed=self._record.replayed,
                on_handed_over=self._record.handed_over,
            ),
            max_model_tokens=plan.max_model_tokens,
            kv_token_bytes=spec.kv_values_per_token * DTYPE_BYTES[plan.dtype],
        )
        self._rng = rng
        self._requests = self._drawn_requests()
        self._n_arrived = 0
        self._n_entered = 0
        """Residents included."""
        self._n_ended = 0
        for failure in failures:
            self._events.at(failure.at_s, self._fail, failure.node)
            if failure.back_s is not None:
                self._events.at(failure.back_s, self._come_back, failure.node)

    def run(self) -> SimResult:
        """To the end."""
        if self._n_warm_up == 0:
            self._record.begin()
        if self._scenario.is_saturated:
            self._fill()
        else:
            self._plan_arrival()
        self._tell()
        self._events.watch(lambda: self._record.look(self._gateway.n_without_route))
        self._events.run_while(self._is_wanted)
        return self._record.result(self._n_wanted, self._scenario.workload)

    def _start(self, replica: Replica) -> SimulatedReplica:
        return SimulatedReplica(
            replica,
            self._scenario.plan,
            self._scenario.cluster,
            self._scenario.spec,
            limits=self._scenario.limits(replica),
            events=self._events,
            network=self.network,
            on_tokens=lambda *told: self._gateway.take(*told),
            on_room=lambda *told: self._gateway.send_kv(*told),
        )

    def _is_wanted(self) -> bool:
        if self._scenario.is_saturated:
            return not self._record.is_over
        return self._n_arrived < self._n_wanted or self._gateway.n_flights > 0

    # --- requests ---

    def _drawn_requests(self) -> Iterator[Request]:
        workload, n = self._scenario.workload, self._scenario.n_requests
        if not self._scenario.is_saturated:
            drawn = list(requests(workload, self._rng, n=n))
            self._n_wanted = len(drawn)
            return iter(drawn)
        of_lengths = random.Random(self._rng.getrandbits(64))
        return (Request(0.0, *workload.drawn_lengths.sample(of_lengths)) for _ in count())

    @property
    def _n_warm_up(self) -> int:
        return int(self._scenario.warm_up * self._n_wanted)

    def _plan_arrival(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._events.at(request.arrival_s, self._arrive, request)

    def _arrive(self, request: Request) -> None:
        self._n_arrived += 1
        self._enter(request)
        self._plan_arrival()
        if self._n_arrived == self._n_wanted:
            self._record.end()

    def _enter(self, request: Request) -> None:
        self._n_entered += 1
        now_s = self._events.now_s
        self._gateway.arrive(
            Flight(
                key=str(self._n_entered),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                arrival_s=now_s,
                deadline_s=math.inf if self._scenario.is_saturated else now_s + TIMEOUT_S,
            )
        )

    def _fill(self) -> None:
        """Replicas are at work, and their queues are full, or as many requests are there as shall be."""
        rng, n_at_once = random.Random(self._rng.getrandbits(64)), self._scenario.n_at_once
        for replica in self._scenario.output_replicas:
            for resident in residents(replica, self._scenario.workload.drawn_lengths, rng):
                if self._n_entered == n_at_once:
                    return
                self._n_entered += 1
                flight = Flight(
                    key=str(self._n_entered),
                    prompt_tokens=resident.prompt_tokens,
                    output_tokens=resident.output_tokens,
                    arrival_s=0.0,
                    deadline_s=math.inf,
                    is_resident=True,
                )
                self._gateway.place(flight, replica.id, resident.n_emitted)
        for _ in range(self._scenario.n_queued if n_at_once is None else n_at_once - self._n_entered):
            self._enter(next(self._requests))

    def _served(self, flight: Flight) -> None:
        self._record.served(flight)
        self._note_end()

    def _refused(self, flight: Flight) -> None:
        self._record.refused(flight)
        self._note_end()

    def _lost(self, flight: Flight) -> None:
        self._record.lost(flight)
        self._note_end()

    def _note_end(self) -> None:
        self._n_ended += 1
        n_wanted = self._n_wanted
        if self._progress is not None and self._n_ended % max(1, n_wanted // _N_TOLD) == 0:
            self._progress(self._n_ended, n_wanted)
        if self._n_ended == self._n_warm_up:
            self._record.begin()
        if not self._scenario.is_saturated:
            return
        if self._n_ended == n_wanted:
            self._record.end()
        self._events.at(self._events.now_s, self._replace_one)

    def _replace_one(self) -> None:
        self._enter(next(self._requests))

    # --- time ---

    def _tell(self) -> None:
        """What drivers tell once a second; what is past its deadline is let go."""
        self._gateway.expire()
        self._routes.told((replica.stats() for replica in self.mesh.whole()), self._events.now_s)
        self._events.at(self._events.now_s + TELL_S, self._tell)

    def _fail(self, node: str) -> None:
        self.mesh.kill(node)
        self._events.at(self._events.now_s + NOTICED_S, self._notice, node)

    def _notice(self, node: str) -> None:
        self.mesh.note_lost(node)
        self._gateway.nodes_lost()

    def _come_back(self, node: str) -> None:
        self._notice(node)
        self.mesh.revive(node)
        self._gateway.routes_changed()
