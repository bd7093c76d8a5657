"""What `hexmesh requests` says of a request while plans change under it."""

from __future__ import annotations

import asyncio

from daemon.mesh_views import _request_state
from hexmesh.wire.control import Ballot, Epoch
from hexmesh.wire.data import StepResult
from tests.unit.daemon.fake_mesh import FakeMesh, answer_to, fake_mesh
from tests.unit.daemon.test_recovery_with_fake_stages import PROMPT, until


def state_at(mesh: FakeMesh, node: str) -> str:
    (flight,) = mesh.nodes[node].gateway.flights()
    held = mesh.nodes[node].epochs.committed
    assert held is not None
    return _request_state(flight, held.epoch)


async def test_a_request_in_a_replica_that_stays_does_not_drain() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        asked = asyncio.ensure_future(mesh.ask("b", PROMPT, 200))
        await until(lambda: mesh.nodes["b"].worker.n_steps == 3)
        assert state_at(mesh, "b") == "running"
        await mesh.commit("ab")
        assert state_at(mesh, "b") == "running"
        assert await asked == answer_to(PROMPT, 200)


async def test_a_request_drains_then_is_replayed_then_runs() -> None:
    async with fake_mesh("ab") as mesh:
        await mesh.commit("ab")
        lost = {1}
        mesh.lose = lambda message: isinstance(message, StepResult) and message.epoch.n in lost
        asked = asyncio.ensure_future(mesh.ask("b", PROMPT, 30))
        await until(lambda: mesh.nodes["b"].worker.n_steps == 1)
        assert state_at(mesh, "b") == "waiting"

        await mesh.commit("ba")
        assert state_at(mesh, "b") == "draining"

        lost.add(2)
        mesh.nodes["a"].epochs.release(Epoch(ballot=FIRST, n=1), "its time is up")
        await until(lambda: state_at(mesh, "b") == "replaying")

        lost.clear()
        for node in mesh.nodes.values():
            for driver in node.epochs.drivers():
                driver.link_reset("a")
        await until(lambda: state_at(mesh, "b") == "running")
        assert await asked == answer_to(PROMPT, 30)


FIRST = Ballot(term=1, rank=0, node="a", boot=1)
"""Of the plans that a fake mesh commits."""
