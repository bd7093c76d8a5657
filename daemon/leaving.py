"""A clean leave: no new requests, the mesh plans without this node, what runs here ends, then silence."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from daemon.snapshot import MeshState
from daemon.stages import StageHost

progress = logging.getLogger("hexmesh.progress")

REPLAN_PATIENCE_S = 5.0
"""How long the mesh gets to plan without this node."""
DRAIN_PATIENCE_S = 20.0
"""How long requests that entered or run here get to end."""
QUIET_S = 0.5
_POLL_S = 0.02


async def drain(state: MeshState, stages: StageHost) -> None:
    """Leave the mesh's plan and let requests end; returns when nothing needs this node, or patience ends."""
    state.is_leaving = True
    progress.info("leaving: the mesh plans without this node")
    state.coordination.leave()
    is_gone = await _until(lambda: _needs_no_more(state), REPLAN_PATIENCE_S)
    if not is_gone:
        progress.info("leaving although the mesh has no plan without this node")
        return
    if not await _until(lambda: _has_drained(state, stages), DRAIN_PATIENCE_S):
        progress.info("leaving with %d requests under way", len(state.gateway.flights()))


def _has_drained(state: MeshState, stages: StageHost) -> bool:
    """Nothing that entered here runs, and no step has come by for a while.

    The plan without this node is not committed here, so its stages serve the one before until they are quiet.
    """
    is_quiet = time.monotonic() - stages.last_step_s > QUIET_S
    return is_quiet and not state.gateway.flights() and state.epochs.draining is None


def _needs_no_more(state: MeshState) -> bool:
    """The mesh has planned without this node, cannot, or has no other node that stays."""
    coordination = state.coordination
    members = coordination.machine.members(state.loop_time()).values()
    stay = any(member.two_way and member.state not in ("self", "leaving") for member in members)
    return coordination.has_left.is_set() or coordination.blocked is not None or not stay


async def _until(holds: Callable[[], bool], patience_s: float) -> bool:
    deadline_s = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True
