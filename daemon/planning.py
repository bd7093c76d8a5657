"""Makes a plan out of what is known: waits briefly for facts that are on their way, then searches off the loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

import msgspec

from daemon.plan_order import PlanOrder
from hexmesh.cluster import Availability, Cluster
from hexmesh.errors import Refused
from hexmesh.ids import short
from hexmesh.membership.outputs import PlanEnvelope, PlanWanted
from hexmesh.membership.records import Directory
from hexmesh.model_spec import ModelSpec
from hexmesh.plan import DtypeName, Plan, Replica, digest_of, encode_plan, plan_fault
from hexmesh.planner.objective import Objective, Throughput, objective_named
from hexmesh.schedule.availability import barred_hosts, kept_hosts, why_outdated, with_barred
from hexmesh.schedule.check import check_plan
from hexmesh.schedule.drift import Drift
from hexmesh.schedule.layout import KEEP_GAIN, KEEP_GAIN_AFTER_LOSS, lay_out
from hexmesh.schedule.loading import load_estimate_s
from hexmesh.schedule.misfit import NoFit
from hexmesh.schedule.moving import why_move
from hexmesh.units import show_bytes
from hexmesh.wire.notice import PlanBlocked
from hexmesh.workload import Workload

log = logging.getLogger("hexmesh.planning")

FACTS_PATIENCE_S = 3.0
"""How long a plan waits for a host's devices and links before it does without them."""
SEARCH_BUDGET_S = 6.0
"""For a plan's searches together; those of small meshes take a tenth of a second."""
MISFIT_RETRY_S = 30.0
"""A drain that found no room is tried again so often: a host in quarantine may have come back."""


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Nothing fits; `notice` says why, for everyone."""

    notice: PlanBlocked


@dataclass(frozen=True, slots=True)
class _Misfit:
    """The last search found nothing, with hosts that said this of themselves."""

    word: dict[str, Availability]
    found_s: float

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self.found_s > MISFIT_RETRY_S


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """What is planned for."""

    model_id: str
    name: str
    spec: ModelSpec
    dtype: DtypeName
    max_model_tokens: int
    workload: Workload


class MeshPlanner:
    """Plans over the directory's facts; remembers which facts the last plan could use."""

    def __init__(self, model: PlannedModel, directory: Directory) -> None:
        self._model = model
        self._directory = directory
        self._facts_changed = asyncio.Event()
        self._used_facts: set[tuple[str, str]] | None = None
        self._misfit: _Misfit | None = None
        self._drift = Drift()
        self._objective: Objective = Throughput()
        self._ordered: Plan | None = None
        self._follows_order = False
        """The present plan is an operator's: it stays until the hosts change."""

    def facts_changed(self) -> None:
        """The directory has news."""
        self._facts_changed.set()
        self._facts_changed = asyncio.Event()

    def has_more_facts(self, hosts: Iterable[str]) -> bool:
        """Whether a host or a link among `hosts` can be planned with now that the last plan had to ignore."""
        return self._used_facts is not None and bool(self._facts_of(hosts) - self._used_facts)

    def why_outdated(self, present: Plan | None, hosts: Mapping[str, int]) -> str | None:
        """Why what its hosts say of themselves now makes the present plan wrong, or one possible again."""
        word = self._directory.availability(hosts)
        if self._misfit is not None:
            if self._misfit.word == word and not self._misfit.is_old:
                return None
            freed = {node for node in barred_hosts(self._misfit.word) if word.get(node) == "active"}
            if freed:
                return "; ".join(f"node {node} uncordoned by the operator" for node in sorted(freed))
        if present is None:
            return None
        return why_outdated(
            present, {node: said for node, said in word.items() if present.hosts.get(node) == hosts[node]}
        )

    def has_drifted(self, hosts: Iterable[str]) -> bool:
        """Whether the figures of the last look have been off for long."""
        return self._drift.has_drifted(self._directory.cluster(hosts), time.monotonic())

    async def find_better(self, hosts: Mapping[str, int], present: Plan) -> str | None:
        """Why the present plan should give way to another over the same hosts; None while it may stay."""
        if self._follows_order:
            return None
        word = self._directory.availability(hosts)
        cluster = _without(self._directory.cluster(hosts), barred_hosts(word))
        self._drift.planned_with(self._directory.cluster(hosts))
        kept = await asyncio.to_thread(self._search, cluster, hosts, "", present, math.inf)
        best = await asyncio.to_thread(self._search, cluster, hosts, "", present, KEEP_GAIN)
        if isinstance(kept, NoFit) or isinstance(best, NoFit):
            return None
        return why_move(kept, best, load_s=self._load_s(best, cluster, hosts), least_gain=KEEP_GAIN)

    def _load_s(self, plan: Plan, cluster: Cluster, hosts: Iterable[str]) -> float:
        holders = {record.node for record in self._directory.records() if record.has_all_weights}
        return load_estimate_s(plan, cluster, holders & set(hosts))

    def obey(self, order: PlanOrder, hosts: Mapping[str, int]) -> None:
        """Plan for what an operator wants from now on, and with the plan given, if there is one, next.

        Raises InvalidInput for an objective that is none, Refused for a plan that does not suit the mesh.
        """
        workload = order.workload or self._model.workload
        objective = objective_named(order.objective, workload)
        if order.plan is not None:
            plan = self._as_ours(order.plan, hosts, order.reason)
            word = self._directory.availability(hosts)
            cluster = _without(self._directory.cluster(hosts), barred_hosts(word))
            faults = self._faults(plan, cluster, workload)
            if faults:
                raise Refused(
                    f"the plan does not suit the mesh: {faults[0]}",
                    code="plan_refused",
                    next_step="plan again over the running mesh: hexmesh plan without --cluster",
                )
        self._model = dataclasses.replace(self._model, workload=workload)
        self._objective, self._ordered, self._follows_order = objective, order.plan, order.plan is not None

    def _as_ours(self, plan: Plan, hosts: Mapping[str, int], reason: str) -> Plan:
        return msgspec.structs.replace(plan, hosts=dict(hosts), reason=reason)

    def _faults(self, plan: Plan, cluster: Cluster, workload: Workload) -> list[str]:
        model = self._model
        if (plan.model_id, plan.dtype) != (model.model_id, model.dtype):
            return [
                f"it is for {plan.model_name} in {plan.dtype}, the mesh serves {model.name} in {model.dtype}"
            ]
        if plan.max_model_tokens > model.max_model_tokens:
            return [f"it is for {plan.max_model_tokens} tokens, the model takes {model.max_model_tokens}"]
        fault = plan_fault(plan)
        return [fault] if fault is not None else check_plan(plan, cluster, model.spec, workload)

    def _take_ordered(self, cluster: Cluster, hosts: Mapping[str, int], reason: str) -> Plan | None:
        """The plan that an operator wants, once, if it still suits."""
        ordered, self._ordered = self._ordered, None
        if ordered is None:
            return None
        plan = self._as_ours(ordered, hosts, reason)
        faults = self._faults(plan, cluster, self._model.workload)
        if faults:
            log.warning("the operator's plan does not suit the mesh any more: %s", faults[0])
            return None
        return plan

    async def find_misfit(self, hosts: Mapping[str, int], without: str) -> NoFit | None:
        """Why the model would not fit `hosts` if `without` were drained; None if it would."""
        word = self._directory.availability(hosts)
        usable = hosts.keys() - barred_hosts(word) - {without}
        cluster = self._directory.cluster(usable)
        answer = await asyncio.to_thread(self._search, cluster, hosts, "", None)
        return answer if isinstance(answer, NoFit) else None

    async def plan(self, wanted: PlanWanted, current: Plan | None) -> PlanEnvelope | NoPlan:
        """The plan for exactly the hosts that are wanted, or why there is none.

        Facts on their way are waited for, but not while nothing serves and there is a plan without them.
        """
        usable = wanted.hosts.keys() - wanted.excluded.keys()
        word = self._directory.availability(usable)
        barred = barred_hosts(word)
        is_waiting = current is None or _serves(current, usable)
        if is_waiting:
            await self._wait_for_facts(usable - barred)
        started_s = time.monotonic()
        reason = self._with_names(wanted.reason)
        cluster = self._cluster_now(usable)
        answer, barred = await self._answer(cluster, wanted, reason, current, word)
        if isinstance(answer, NoFit) and not is_waiting:
            await self._wait_for_facts(usable - barred)
            cluster = self._cluster_now(usable)
            answer, barred = await self._answer(cluster, wanted, reason, current, word)
        search_s = time.monotonic() - started_s
        if isinstance(answer, NoFit):
            log.info("no plan fits search_s=%.3f %s", search_s, answer.message)
            self._misfit = _Misfit(word, time.monotonic())
            return NoPlan(_notice(answer, [self._directory.name_of(node) for node in sorted(barred)]))
        self._misfit = None
        log.info("planned search_s=%.3f reason=%s: %s", search_s, reason, _summary(answer, cluster))
        faults = check_plan(answer, cluster, self._model.spec, self._model.workload)
        assert not faults, faults
        plan = with_barred(answer, word, barred, cluster)
        data = encode_plan(plan)
        return PlanEnvelope(
            plan=data,
            digest=digest_of(data),
            hosts=wanted.hosts,
            idle=plan.idle_hosts(),
            load_estimate_s=self._load_s(plan, cluster, wanted.hosts),
        )

    def _cluster_now(self, hosts: Set[str]) -> Cluster:
        """What is known of `hosts` now; later facts are a reason to plan again."""
        self._used_facts = self._facts_of(hosts)
        cluster = self._directory.cluster(hosts)
        self._drift.planned_with(cluster)
        return cluster

    async def _answer(
        self,
        cluster: Cluster,
        wanted: PlanWanted,
        reason: str,
        current: Plan | None,
        word: Mapping[str, Availability],
    ) -> tuple[Plan | NoFit, frozenset[str]]:
        """The best plan over exactly this cluster, and who got nothing by an operator's word."""
        barred = barred_hosts(word)
        ordered = self._take_ordered(_without(cluster, barred), wanted.hosts, reason)
        if ordered is not None:
            return ordered, barred
        self._follows_order = False
        answer = await asyncio.to_thread(
            self._search, _without(cluster, barred), wanted.hosts, reason, current
        )
        kept = kept_hosts(word, current) & barred
        if isinstance(answer, NoFit) and kept:
            barred -= kept
            answer = await asyncio.to_thread(
                self._search, _without(cluster, barred), wanted.hosts, reason, current
            )
        return answer, barred

    def _with_names(self, reason: str) -> str:
        """Node ids in a reason as people know them."""
        for record in self._directory.records():
            reason = reason.replace(record.node, record.name)
        return reason

    def _search(
        self,
        cluster: Cluster,
        hosts: Mapping[str, int],
        reason: str,
        current: Plan | None,
        keep_gain: float | None = None,
    ) -> Plan | NoFit:
        model = self._model
        has_lost = current is not None and not current.hosts.keys() <= hosts.keys()
        usual_gain = KEEP_GAIN_AFTER_LOSS if has_lost else KEEP_GAIN
        return lay_out(
            cluster,
            model.spec,
            model.dtype,
            model.workload,
            model_id=model.model_id,
            model_name=model.name,
            hosts=hosts,
            max_model_tokens=model.max_model_tokens,
            reason=reason,
            current=current,
            objective=self._objective,
            keep_gain=usual_gain if keep_gain is None else keep_gain,
            budget_s=SEARCH_BUDGET_S,
            clock=time.monotonic,
        )

    async def _wait_for_facts(self, hosts: Iterable[str]) -> None:
        wanted = {(src, dst) for src in hosts for dst in hosts}
        deadline_s = time.monotonic() + FACTS_PATIENCE_S
        while (missing := wanted - self._facts_of(hosts)) and time.monotonic() < deadline_s:
            changed = self._facts_changed
            try:
                async with asyncio.timeout(deadline_s - time.monotonic()):
                    await changed.wait()
            except TimeoutError:
                break
        if missing:
            shown = ", ".join(_show_fact(*fact) for fact in sorted(missing)[:4])
            log.info("planning without %d facts: %s", len(missing), shown)

    def _facts_of(self, hosts: Iterable[str]) -> set[tuple[str, str]]:
        """(node, node) for measured devices, (source, destination) for measured links."""
        cluster = self._directory.cluster(hosts)
        return {(node.id, node.id) for node in cluster.nodes} | {
            (link.src, link.dst) for link in cluster.links
        }


def _serves(plan: Plan, hosts: Set[str]) -> bool:
    """Whether some replica of it has all its hosts yet."""
    return any(all(stage.node in hosts for stage in replica.stages) for replica in plan.replicas)


def _show_fact(src: str, dst: str) -> str:
    return f"devices of {short(src)}" if src == dst else f"link {short(src)} to {short(dst)}"


def _without(cluster: Cluster, barred: frozenset[str]) -> Cluster:
    """The cluster but for those nodes and their links."""
    return Cluster(
        nodes=tuple(node for node in cluster.nodes if node.id not in barred),
        links=tuple(link for link in cluster.links if not barred & {link.src, link.dst}),
    )


def _notice(answer: NoFit, barred: list[str]) -> PlanBlocked:
    freeing = f", or let plans use {', '.join(barred)} again: hexmesh node uncordon" if barred else ""
    return PlanBlocked(
        code="model_does_not_fit",
        message=answer.message,
        next_step=answer.next_step + freeing,
        needed_bytes=answer.needed_bytes,
        room_bytes=answer.room_bytes,
    )


def _summary(plan: Plan, cluster: Cluster) -> str:
    return "; ".join(f"{replica.id}: {_pipeline(replica, cluster)}" for replica in plan.replicas)


def _pipeline(replica: Replica, cluster: Cluster) -> str:
    stages = " -> ".join(
        f"{cluster.node(stage.node).name}[{stage.start}-{stage.stop - 1}] {show_bytes(stage.needed_bytes)}"
        for stage in replica.stages
    )
    return f"{stages}, {replica.predicted_tokens_per_s:.0f} tokens/s with {replica.predicted_batch} sequences"
