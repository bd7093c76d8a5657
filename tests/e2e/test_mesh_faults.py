"""What a mesh of real daemons does when processes die: SIGKILL, no warning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.errors import HexmeshError, NotReady
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

FLAGS = ("--device", "cpu", "--threads", "1", "--min-nodes", "3", "--memory")
QUESTION = "What is a KV cache?"
N_TOKENS = 300


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    """Three nodes of which any two hold the model; the plan may use two or all."""
    spec = model_spec_from_config(resolve_model().config)
    budget = str(memory_for_exactly(spec, 2))
    with LocalMesh(tmp_path / "mesh") as mesh:
        mesh.found("one", *FLAGS, budget)
        for name in ("two", "three"):
            mesh.join(name, *FLAGS, budget)
        mesh.await_ready()
        yield mesh


def by_id(mesh: LocalMesh, node_id: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


def topology(daemon: LocalDaemon) -> Any:
    return daemon.get("/admin/topology")


def is_at_rest(daemon: LocalDaemon) -> bool:
    status = daemon.get("/admin/status")
    return bool(status["requests_running"] == 0 and status["kv_blocks"]["used"] == 0)


def stage_nodes(mesh: LocalMesh, daemon: LocalDaemon) -> list[LocalDaemon]:
    (replica,) = topology(daemon)["replicas"]
    return [by_id(mesh, stage["node"]) for stage in replica["stages"]]


def layers_by_node(seen: Any) -> list[tuple[str, list[int]]]:
    """The stages of the only replica."""
    (replica,) = seen["replicas"]
    return [(stage["node"], stage["layers"]) for stage in replica["stages"]]


def ask_and_kill(mesh: LocalMesh, gateway: LocalDaemon, victim: LocalDaemon, at_token: int = 40) -> Stream:
    """Stream through `gateway`, and kill `victim`, host and all, in the middle."""
    stream = Stream(gateway.client, token_ids(QUESTION), N_TOKENS)

    def on_token(n_tokens: int) -> None:
        if n_tokens == at_token:
            victim.kill_group()

    stream.run(on_token)
    return stream


def test_a_stage_host_killed_in_mid_stream_costs_no_token(mesh: LocalMesh) -> None:
    stages = stage_nodes(mesh, mesh.daemons[0])
    victim = stages[-1]
    gateway = next(daemon for daemon in mesh.daemons if daemon is not victim)
    stream = ask_and_kill(mesh, gateway, victim)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    survivors = [daemon for daemon in mesh.daemons if daemon is not victim]
    mesh.await_ready(survivors, timeout_s=30)
    assert victim.node_id not in {stage.node_id for stage in stage_nodes(mesh, survivors[0])}
    assert "requests_recovered_total" in gateway.client.get("/metrics").decode()


def test_a_driver_killed_in_mid_stream_costs_no_token(mesh: LocalMesh) -> None:
    victim = stage_nodes(mesh, mesh.daemons[0])[0]
    gateway = next(daemon for daemon in mesh.daemons if daemon is not victim)
    stream = ask_and_kill(mesh, gateway, victim)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)


def test_the_coordinator_killed_in_mid_stream_costs_no_token_and_is_replaced(mesh: LocalMesh) -> None:
    before = topology(mesh.daemons[0])
    victim = by_id(mesh, before["coordinator"])
    survivors = [daemon for daemon in mesh.daemons if daemon is not victim]
    stream = ask_and_kill(mesh, survivors[0], victim)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    mesh.await_value(
        lambda: True if topology(survivors[0])["coordinator"] in {one.node_id for one in survivors} else None,
        timeout_s=10,
        what="another coordinator",
    )
    assert topology(survivors[0])["term"] > before["term"]


def test_a_coordinator_without_a_stage_is_killed_and_no_stream_notices_but_those_that_entered_there(
    tmp_path: Path,
) -> None:
    budget = str(memory_for_exactly(model_spec_from_config(resolve_model().config), 2))
    with LocalMesh(tmp_path / "mesh") as mesh:
        coordinator = mesh.found("one", *FLAGS, "1MiB")
        others = [mesh.join(name, *FLAGS, budget) for name in ("two", "three")]
        mesh.await_ready()
        before = topology(others[0])
        assert before["coordinator"] == coordinator.node_id
        assert coordinator not in stage_nodes(mesh, others[0])
        with ThreadPoolExecutor(1) as pool:
            n_tokens_of_room = 16 * others[0].get("/admin/status")["kv_blocks"]["free"]
            doomed = Stream(coordinator.client, token_ids(QUESTION), n_tokens_of_room // 2)
            doomed_run = pool.submit(doomed.run)
            mesh.await_value(lambda: doomed.token_ids or None, timeout_s=30, what="the other stream")
            stream = ask_and_kill(mesh, others[0], coordinator)
            with pytest.raises(HexmeshError):
                doomed_run.result(timeout=30)
        assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
        # What the dead node's client asked for is given up, and its blocks are free again.
        mesh.await_value(lambda: is_at_rest(others[0]) or None, timeout_s=3, what="all blocks to be free")
        mesh.await_value(
            lambda: topology(others[0])["coordinator"] in {one.node_id for one in others} or None,
            timeout_s=10,
            what="another coordinator",
        )
        assert layers_by_node(topology(others[0])) == layers_by_node(before)
        # Neither replayed nor started over: the plan stays, or the next one leaves the replica as it is, KV and all.
        assert Stream(others[1].client, token_ids(QUESTION), 20).run() == stream.token_ids[:20]
        assert not any("replayed" in daemon.log.read_text() for daemon in others)


def test_a_mesh_that_cannot_hold_the_model_says_what_it_needs_and_recovers(mesh: LocalMesh) -> None:
    for victim in (mesh.daemons[2], mesh.daemons[1]):
        victim.kill_group()
    left = mesh.daemons[0]

    def find_blocker() -> dict[str, Any] | None:
        blocker = left.client.get_json("/ready", also_ok=(503,))["blocker"]
        return blocker if blocker and blocker["code"] == "model_does_not_fit" else None

    blocker = mesh.await_value(find_blocker, timeout_s=30, what="the blocker to be named")
    assert blocker["needed_bytes"] > blocker["room_bytes"] > 0
    assert left.get("/admin/status")["blocker"] == blocker
    assert left.get("/v1/models")["data"] == []
    with pytest.raises(NotReady, match="needs"):
        Stream(left.client, token_ids(QUESTION), 5).run()
    shown = subprocess.run(
        [sys.executable, "-m", "daemon", "status", "--url", left.url],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert shown.returncode == 3
    assert "MiB" in shown.stdout

    # The same node comes back as itself, without a token.
    returned = mesh.start("two", *FLAGS, "9MiB")
    mesh.await_up(returned)
    mesh.await_ready([left, returned], timeout_s=90)
    assert Stream(returned.client, token_ids(QUESTION), 20).run() == expected(token_ids(QUESTION), 20)
    assert sorted(member["name"] for member in left.get("/admin/members")) == ["one", "three", "two"]


def test_p2pd_killed_everywhere_stops_nothing(mesh: LocalMesh) -> None:
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(mesh.daemons[1].client, token_ids(QUESTION), N_TOKENS)
        run = pool.submit(stream.run)
        for daemon in mesh.daemons:
            for process in p2pd_of(daemon):
                os.kill(process.pid, signal.SIGKILL)
        assert run.result(timeout=60) == expected(token_ids(QUESTION), N_TOKENS)
    assert all(daemon.is_running for daemon in mesh.daemons)
    mesh.await_ready(timeout_s=10)
    mesh.await_value(
        lambda: True if all(p2pd_of(daemon) for daemon in mesh.daemons) else None,
        timeout_s=20,
        what="p2pd to be started again",
    )


def p2pd_of(daemon: LocalDaemon) -> list[psutil.Process]:
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    return [child for child in children if child.name() == "p2pd" and child.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_killed_in_mid_stream_costs_no_token(mesh: LocalMesh) -> None:
    victim = stage_nodes(mesh, mesh.daemons[0])[-1]

    def kill_workers(n_tokens: int) -> None:
        if n_tokens == 40:
            for child in psutil.Process(victim.process.pid).children(recursive=True):
                if child.ppid() != victim.process.pid and child.name() != "p2pd":
                    child.kill()

    stream = Stream(mesh.daemons[0].client, token_ids(QUESTION), N_TOKENS)
    stream.run(kill_workers)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    assert victim.is_running


def test_daemons_leave_no_process_when_killed(mesh: LocalMesh) -> None:
    children = [
        child
        for daemon in mesh.daemons
        for child in psutil.Process(daemon.process.pid).children(recursive=True)
    ]
    assert len(children) >= 9  # workshop, worker and p2pd of each
    for daemon in mesh.daemons:
        daemon.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def test_a_node_that_leaves_is_planned_around_without_a_lost_token(mesh: LocalMesh) -> None:
    leaver = stage_nodes(mesh, mesh.daemons[0])[-1]
    gateway = next(daemon for daemon in mesh.daemons if daemon is not leaver)
    stream = Stream(gateway.client, token_ids(QUESTION), N_TOKENS)

    def on_token(n_tokens: int) -> None:
        if n_tokens == 40:
            leaver.terminate()

    stream.run(on_token)
    assert stream.token_ids == expected(token_ids(QUESTION), N_TOKENS)
    assert leaver.process.wait(timeout=30) == 0


def test_a_node_that_comes_back_alone_waits_for_the_others_and_says_so(mesh: LocalMesh) -> None:
    stored = mesh.daemons[1].state_dir / "membership.json"
    mesh.await_value(
        lambda: True if '"three"' in stored.read_text() else None,
        timeout_s=10,
        what="peers to be written down",
    )
    for daemon in mesh.daemons:
        daemon.kill_group()
    two = mesh.start("two", *FLAGS, "64MiB")
    mesh.await_up(two)

    def find_blocker() -> str | None:
        message: str = two.client.get_json("/ready", also_ok=(503,))["blocker"]["message"]
        return message if "other nodes" in message else None

    message = mesh.await_value(find_blocker, timeout_s=30, what="the node to say what it waits for")
    assert "one" in message
    assert "three" in message
