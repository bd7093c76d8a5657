"""Once a second: what this node's replicas do, told to the other hosts and to /metrics; and hosts that fell silent."""

from __future__ import annotations

import asyncio
import time
from typing import NoReturn

from daemon.courier import Courier
from daemon.dispatch import Dispatcher
from daemon.mesh_state import MeshState
from daemon.mesh_views import MeshViews
from daemon.web.telemetry import Telemetry
from hexmesh.serving.carry_over import carried_over

REPORT_S = 1.0

_REASON_LABELS = {
    "first plan": "first",
    "joined": "join",
    "refused": "failure",
    "gone": "failure",
    "failed": "failure",
    "lost": "failure",
    "silent": "failure",
    "restarted": "failure",
    "died": "failure",
    "hung": "failure",
    "not heard": "failure",
    "answered": "failure",
    "leaving": "leave",
    "left": "leave",
    "facts": "facts",
    "operator": "operator",
}


class Reporter:
    """Holds no state but which hosts were lost when; everything it tells it reads."""

    def __init__(
        self,
        *,
        courier: Courier,
        state: MeshState,
        views: MeshViews,
        telemetry: Telemetry,
        dispatcher: Dispatcher,
    ) -> None:
        self._courier = courier
        self._state = state
        self._views = views
        self._telemetry = telemetry
        self._dispatcher = dispatcher

    async def run(self) -> NoReturn:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._tell_stats()
            self._set_metrics()

    def plan_committed(self, reason: str) -> None:
        """A new plan is in force: what ran over hosts that it leaves behind, dead, must run elsewhere."""
        state = self._state
        state.stats.clear()
        if state.coordination.machine.is_coordinator:
            self._telemetry.count_replan(label_of(reason))
        draining, committed = state.epochs.draining, state.epochs.committed
        if draining is None or committed is None:
            return
        plan = committed.plan
        carried = carried_over(draining.plan, plan)
        state.gateway.carried_over(draining.epoch, committed.epoch, carried)
        members = state.coordination.machine.members(state.loop_time())
        for node in draining.plan.hosts.keys() - plan.hosts.keys():
            if node not in members or not members[node].two_way:
                self.node_lost(node, "it does not answer")

    def node_lost(self, node: str, reason: str) -> None:
        """A host is gone: replicas over it break, requests over it are replayed."""
        self._state.epochs.node_lost(node, f"{self._state.directory.name_of(node)}: {reason}")
        self._state.gateway.node_lost(node, f"{self._state.directory.name_of(node)}: {reason}")

    def _tell_stats(self) -> None:
        plan = self._state.plan_now()
        held = self._state.epochs.committed
        if plan is None or held is None:
            return
        for driver in list(self._state.epochs.drivers()):
            stats = driver.stats(time.monotonic())
            self._dispatcher.on_stats(stats)
            for node in plan.hosts.keys() - {self._courier.node_id}:
                self._courier.send(node, stats, channel="control")

    def _set_metrics(self) -> None:
        state, views, telemetry = self._state, self._views, self._telemetry
        held = state.epochs.committed
        driven = held.drivers.values() if held is not None else ()
        stats = [driver.stats(time.monotonic()) for driver in driven]
        telemetry.requests_running.set(sum(one.requests_running for one in stats))
        telemetry.requests_waiting.set(sum(one.requests_waiting for one in stats))
        telemetry.plan_epoch.set(held.epoch.n if held is not None else 0)
        telemetry.coordinator_term.set(state.coordination.machine.term)
        telemetry.set_steps_in_flight({one.replica: one.steps_in_flight for one in stats})
        telemetry.set_kv_blocks(views.status().kv_blocks)
        telemetry.set_members(views.members())
        telemetry.set_links(views.link_views(), node=state.node_id)
        telemetry.set_stage_busy(self._busy())

    def _busy(self) -> dict[tuple[str, int], float]:
        plan = self._state.plan_now()
        busy = {}
        for replica, index in plan.stages_of(self._state.node_id) if plan is not None else ():
            stats = self._state.stats.get(replica.id)
            if stats is not None and index < len(stats.stage_busy):
                busy[(replica.id, index)] = stats.stage_busy[index]
        return busy


def label_of(reason: str) -> str:
    """The word of a small set that a plan's reason, which is free text, is counted under."""
    found = (label for word, label in _REASON_LABELS.items() if word in reason)
    return next(found, "other")
