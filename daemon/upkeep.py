"""This node's availability: the operator's word, kept on disk, and what it holds still while it is moved away.

The word travels in the node's signed record, and the coordinator plans by it. So an order changes a level, here,
and everything else follows from the level: also after restarts of this node or of the coordinator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from daemon.mesh_state import MeshState
from daemon.planning import MeshPlanner
from hexmesh.cluster import Availability
from hexmesh.errors import NoRoom
from hexmesh.wire.orders import NodeStanding, OrderAction

log = logging.getLogger("hexmesh.upkeep")

_NOT_YET_S = 0.2
"""How soon to look again where the deadline passed before the new plan was there."""


class Upkeep:
    """Owner of the word. `leaving` and `left` are said while the process ends and never kept."""

    def __init__(
        self,
        *,
        kept: Availability,
        keep: Callable[[Availability], None],
        publish: Callable[[], Awaitable[object]],
        state: MeshState,
        planner: MeshPlanner,
    ) -> None:
        self.availability = kept
        self._keep = keep
        self._publish = publish
        self._state = state
        self._planner = planner
        self._hand_over: asyncio.TimerHandle | None = None

    async def obey(self, action: OrderAction, deadline_s: float) -> NodeStanding:
        """Carry out an operator's order. Raises NoRoom when nobody else could hold what is here."""
        match action:
            case "cordon":
                await self._set("cordoned")
            case "uncordon":
                await self._set("active")
            case "drain":
                await self._check_room()
                await self._set("drained")
                self._hand_over_after(deadline_s)
            case "show":
                pass
        return self.standing()

    async def say(self, availability: Availability) -> None:
        """Tell the mesh, without keeping it for the next start."""
        self.availability = availability
        await self._publish()

    def standing(self) -> NodeStanding:
        """What this node holds now."""
        state = self._state
        plan, draining = state.plan_now(), state.epochs.draining_here()
        blocked = state.coordination.blocked
        return NodeStanding(
            id=state.node_id,
            name=state.name,
            availability=self.availability,
            stages=len(plan.stages_of(state.node_id)) if plan is not None else 0,
            requests_left=draining.requests_left() if draining is not None else 0,
            drain_left_s=self._drain_left_s() if draining is not None else None,
            blocker=blocked.message if blocked is not None else None,
        )

    async def _set(self, availability: Availability) -> None:
        if self._hand_over is not None:
            self._hand_over.cancel()
        log.info("availability=%s", availability)
        await asyncio.to_thread(self._keep, availability)
        if self.availability not in ("leaving", "left"):
            await self.say(availability)

    async def _check_room(self) -> None:
        """A drain that the mesh cannot follow would stop nothing and help nobody: say so before."""
        plan = self._state.plan_now()
        if plan is None or not plan.stages_of(self._state.node_id):
            return
        lost = self._state.lost_nodes()
        hosts = {node: boot for node, boot in plan.hosts.items() if node not in lost}
        misfit = await self._planner.find_misfit(hosts, without=self._state.node_id)
        if misfit is not None:
            raise NoRoom(
                f"the mesh has no room for the stages of {self._state.name}: {misfit.message}",
                code="no_room",
                next_step=f"{misfit.next_step}, or stop it anyway with hexmesh leave",
                needed_bytes=misfit.needed_bytes,
                room_bytes=misfit.room_bytes,
            )

    def _hand_over_after(self, deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._hand_over = loop.call_later(deadline_s, self._hand_over_now)

    def _hand_over_now(self) -> None:
        """What still runs on this node's old stages goes on in the present plan, after a prefill there."""
        draining = self._state.epochs.draining_here()
        if draining is not None:
            self._state.coordination.drained(draining.epoch)
        elif self.standing().stages:
            self._hand_over_after(_NOT_YET_S)

    def _drain_left_s(self) -> float:
        now_s = self._state.loop_time()
        ends_s = [self._state.coordination.machine.draining_until_s or now_s]
        if self._hand_over is not None and not self._hand_over.cancelled():
            ends_s.append(self._hand_over.when())
        return max(0.0, min(ends_s) - now_s)
