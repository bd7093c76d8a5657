"""What a mesh of real daemons does when something stops without ending (SIGSTOP), and when nodes come back.

All tests share one mesh, and each leaves it whole.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

QUESTION = "What is a KV cache?"
N_TOKENS = 300
AT_TOKEN = 40
NAMES = ("one", "two", "three")


def flags() -> tuple[str, ...]:
    """Three nodes of which any two hold the model."""
    budget = str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))
    return ("--device", "cpu", "--threads", "1", "--min-nodes", "3", "--memory", budget)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    with LocalMesh(tmp_path_factory.mktemp("hangs") / "mesh") as mesh:
        mesh.found("one", *flags())
        for name in NAMES[1:]:
            mesh.join(name, *flags())
        yield mesh


@pytest.fixture
def mesh(whole: LocalMesh) -> LocalMesh:
    """The mesh with all of its nodes in the plan."""
    await_whole(whole)
    return whole


def await_whole(mesh: LocalMesh, timeout_s: float = 60) -> None:
    """All daemons are ready in one plan, and see each other alive once each."""
    mesh.await_ready(timeout_s=timeout_s)

    def all_alive() -> bool | None:
        if any(mesh_view(daemon) != sorted((name, "alive") for name in NAMES) for daemon in mesh.daemons):
            return None
        # A node that was lost twice within a minute is left out of plans for some seconds.
        return (
            None
            if any(is_left_out(one) for one in mesh.daemons[0].get("/admin/topology")["unused"])
            else True
        )

    mesh.await_value(
        all_alive, timeout_s=timeout_s, what="every node to see every node once, and to be planned with"
    )


def is_left_out(unused: dict[str, Any]) -> bool:
    return "present plan" in unused["reason"] or "part of this plan" in unused["reason"]


def mesh_view(daemon: LocalDaemon) -> list[tuple[str, str]]:
    return sorted((member["name"], member["state"]) for member in daemon.get("/admin/members"))


def stages(mesh: LocalMesh) -> list[LocalDaemon]:
    (replica,) = mesh.daemons[0].get("/admin/topology")["replicas"]
    return [by_id(mesh, stage["node"]) for stage in replica["stages"]]


def by_id(mesh: LocalMesh, node_id: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


def workers_of(daemon: LocalDaemon) -> list[psutil.Process]:
    """What the daemon's workshop has forked."""
    return [
        child
        for child in psutil.Process(daemon.process.pid).children(recursive=True)
        if child.name() == "hexmesh-worker"
    ]


def stream_through(gateway: LocalDaemon, on_token: Any) -> Stream:
    stream = Stream(gateway.client, token_ids(QUESTION), N_TOKENS)
    stream.run(lambda n_tokens: on_token() if n_tokens == AT_TOKEN else None)
    return stream


def test_a_stopped_worker_is_named_killed_and_replaced_and_no_token_is_lost(mesh: LocalMesh) -> None:
    n_stages = len(stages(mesh))
    victim = stages(mesh)[-1]
    (worker,) = workers_of(victim)
    stream = stream_through(mesh.daemons[0], worker.suspend)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    log = victim.log.read_text()
    assert "worker hung" in log
    assert f"stage {n_stages - 1} of replica r0" in log
    await_whole(mesh)
    assert [one.pid for one in workers_of(victim)] != [worker.pid]
    reason = mesh.daemons[0].get("/admin/topology")["plan_reason"]
    assert victim.name in reason
    assert "hung" in reason


def coordinator(mesh: LocalMesh) -> LocalDaemon:
    return by_id(mesh, mesh.daemons[0].get("/admin/topology")["coordinator"])


VICTIMS: dict[str, Callable[[LocalMesh], LocalDaemon]] = {
    "driver": lambda mesh: stages(mesh)[0],
    "last stage": lambda mesh: stages(mesh)[-1],
    "coordinator": coordinator,
}


@pytest.mark.parametrize("which", VICTIMS)
def test_a_stopped_daemon_is_planned_around_and_comes_back_harmlessly(mesh: LocalMesh, which: str) -> None:
    victim = VICTIMS[which](mesh)
    n_hung = victim.log.read_text().count("worker hung")
    gateway = next(daemon for daemon in mesh.daemons if daemon is not victim)
    try:
        stream = stream_through(gateway, lambda: os.killpg(victim.process.pid, signal.SIGSTOP))
        assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
        topology = gateway.get("/admin/topology")
        assert victim.node_id not in {stage["node"] for stage in topology["replicas"][0]["stages"]}
        assert topology["coordinator"] not in (None, victim.node_id)
    finally:
        os.killpg(victim.process.pid, signal.SIGCONT)
    await_whole(mesh)
    assert Stream(victim.client, token_ids(QUESTION), 20).run() == stream.token_ids[:20]
    assert victim.log.read_text().count("worker hung") == n_hung, (
        "a daemon blamed its worker for its own pause"
    )


def same_nodes(before: list[LocalDaemon], after: list[LocalDaemon]) -> bool:
    """Ids and addresses are what they were, although every port was picked freely."""
    identities = [
        {daemon.name: (daemon.node_id, daemon.up["peer_addr"], daemon.url) for daemon in daemons}
        for daemons in (before, after)
    ]
    return identities[0] == identities[1]


def test_a_killed_node_that_is_back_within_its_lease_is_one_node_and_costs_no_token(mesh: LocalMesh) -> None:
    before = list(mesh.daemons)
    victim = stages(mesh)[-1]
    gateway = next(daemon for daemon in mesh.daemons if daemon is not victim)

    def kill_and_restart() -> None:
        victim.kill_group()
        mesh.restart(victim)

    stream = stream_through(gateway, kill_and_restart)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    back = next(daemon for daemon in mesh.daemons if daemon.name == victim.name)
    mesh.await_up(back)
    assert same_nodes(before, mesh.daemons)
    await_whole(mesh)
    topology = gateway.get("/admin/topology")
    planned = {stage["node"] for replica in topology["replicas"] for stage in replica["stages"]}
    unused = {one["node"] for one in topology["unused"]}
    assert planned | unused == {daemon.node_id for daemon in mesh.daemons}
    assert Stream(back.client, token_ids(QUESTION), 20).run() == stream.token_ids[:20]


def test_nodes_that_are_all_killed_find_each_other_again_and_are_who_they_were(mesh: LocalMesh) -> None:
    before = list(mesh.daemons)
    for daemon in before:
        daemon.kill_group()
    for daemon in before:
        mesh.restart(daemon)
    for daemon in mesh.daemons:
        mesh.await_up(daemon)
    assert same_nodes(before, mesh.daemons)
    await_whole(mesh, timeout_s=90)
    for daemon in mesh.daemons:
        assert Stream(daemon.client, token_ids(QUESTION), 20).run() == expected(token_ids(QUESTION), 20)
