"""A clean leave: nothing new enters, the mesh plans without this node, what runs ends or moves on, then silence.

The node stays a host of the plan that does without its stages. So it commits that plan like the others, streams of its
own clients may move to it, and when it goes the plan stays as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from daemon.mesh_state import MeshState
from daemon.upkeep import Upkeep

progress = logging.getLogger("hexmesh.progress")

REPLAN_PATIENCE_S = 60.0
"""How long the mesh gets to plan without this node, and to load that plan."""
DRAIN_PATIENCE_S = 60.0
"""How long requests that run or entered here get to end; the epoch before lasts for 30 s of it."""
HAND_OVER_PATIENCE_S = 5.0
"""How long another coordinator gets to take over."""
_POLL_S = 0.02


async def drain(state: MeshState, upkeep: Upkeep) -> None:
    """Leave the mesh's plan and let requests end; returns when nothing needs this node, or patience ends."""
    state.is_leaving = True
    progress.info("leaving: the mesh plans without this node")
    await upkeep.say("leaving")
    await _until(lambda: _has_no_part(state) or _is_stuck(state), REPLAN_PATIENCE_S)
    if not _has_no_part(state) and _others_stay(state):
        progress.info("leaving although the mesh has no plan without this node")
    if not await _until(lambda: _is_quiet(state), DRAIN_PATIENCE_S):
        progress.info("leaving with %d requests under way", len(state.gateway.flights()))
    state.coordination.leave()
    await _until(
        lambda: state.coordination.has_left.is_set() or not _others_stay(state), HAND_OVER_PATIENCE_S
    )
    await upkeep.say("left")


def _has_no_part(state: MeshState) -> bool:
    plan = state.plan_now()
    return plan is None or not plan.stages_of(state.node_id)


def _is_stuck(state: MeshState) -> bool:
    """No plan without this node can come: nothing else fits, or nobody else stays."""
    return state.coordination.blocked is not None or not _others_stay(state)


def _others_stay(state: MeshState) -> bool:
    members = state.coordination.machine.members(state.loop_time())
    word = state.directory.availability(members)
    return any(
        member.two_way
        and member.state not in ("self", "leaving")
        and word.get(node) not in ("leaving", "left")
        for node, member in members.items()
    )


def _is_quiet(state: MeshState) -> bool:
    """No stream of a client here runs, and no stage here is needed by an older plan."""
    return not state.gateway.flights() and state.epochs.draining_here() is None


async def _until(holds: Callable[[], bool], patience_s: float) -> bool:
    deadline_s = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True
