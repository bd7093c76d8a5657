"""Cordon, drain, leave and restart of nodes of a real mesh, while clients go on asking."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import memory_for_exactly
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.errors import NotReady
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

FLAGS = ("--device", "cpu", "--threads", "1", "--memory")
QUESTION = "What is a KV cache?"
N_TOKENS = 300


def budget_for(n_nodes: int) -> str:
    """Memory of which that many nodes hold the model: a KV pool fills what is left, so two epochs never fit."""
    return str(memory_for_exactly(model_spec_from_config(resolve_model().config), n_nodes))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """Three nodes of which any two hold the model."""
    flags = (*FLAGS, budget_for(2), "--min-nodes", "3")
    with LocalMesh(tmp_path_factory.mktemp("mesh")) as mesh:
        mesh.found("one", *flags)
        for name in ("two", "three"):
            mesh.join(name, *flags)
        mesh.await_ready()
        yield mesh


def by_name(mesh: LocalMesh, name: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.name == name)


def stage_names(daemon: LocalDaemon) -> list[str]:
    """Who holds the stages, in order, as that peer sees it."""
    topology = daemon.get("/admin/topology")
    names = {node["id"]: node["name"] for node in topology["nodes"]}
    return [names[stage["node"]] for replica in topology["replicas"] for stage in replica["stages"]]


def member(daemon: LocalDaemon, name: str) -> dict[str, Any]:
    (found,) = [one for one in daemon.get("/admin/members") if one["name"] == name]
    return dict(found)


def cli(daemon: LocalDaemon, *words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """A verb as a person runs it beside that daemon."""
    command = [
        sys.executable,
        "-m",
        "daemon",
        *words,
        "--url",
        daemon.url,
        "--state-dir",
        str(daemon.state_dir),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def await_stages(mesh: LocalMesh, daemon: LocalDaemon, is_so: Callable[[list[str]], bool]) -> list[str]:
    return mesh.await_value(
        lambda: names if is_so(names := stage_names(daemon)) else None,
        timeout_s=30,
        what="the stages to move",
    )


def await_reason(mesh: LocalMesh, daemon: LocalDaemon, reason: str) -> None:
    mesh.await_value(
        lambda: daemon.get("/admin/topology")["plan_reason"] == reason or None,
        timeout_s=30,
        what=f"a plan because {reason}",
    )


def streaming(pool: ThreadPoolExecutor, daemon: LocalDaemon) -> tuple[Stream, Future[list[int]]]:
    """A stream that has brought some tokens already."""
    stream, is_running = Stream(daemon.client, token_ids(QUESTION), N_TOKENS), threading.Event()
    run = pool.submit(stream.run, lambda n: is_running.set() if n == 20 else None)
    assert is_running.wait(timeout=30)
    return stream, run


def test_a_drained_node_holds_nothing_and_still_serves(mesh: LocalMesh) -> None:
    asked, drained = by_name(mesh, "one"), by_name(mesh, stage_names(mesh.daemons[0])[-1])
    with ThreadPoolExecutor() as pool:
        streams = [streaming(pool, daemon) for daemon in mesh.daemons]
        done = cli(asked, "node", "drain", drained.name, "--deadline", "40s")
        assert (done.returncode, done.stdout) == (
            0,
            f"{drained.name} is drained: it holds no stage and no request\n",
        ), done.stderr
        assert "moving 1 stage away" in done.stderr
        answers = [run.result(timeout=60) for _, run in streams]
    assert answers == [expected(token_ids(QUESTION), N_TOKENS)] * 3
    topology = asked.get("/admin/topology")
    assert topology["plan_reason"] == f"node {drained.name} drained by the operator"
    assert drained.name not in stage_names(asked)
    assert [(one["node"], one["reason"]) for one in topology["unused"]] == [
        (drained.node_id, "drained by the operator")
    ]
    assert (member(asked, drained.name)["state"], member(asked, drained.name)["availability"]) == (
        "alive",
        "drained",
    )
    assert Stream(drained.client, token_ids(QUESTION), 10).run() == expected(token_ids(QUESTION), 10)

    # With one node drained the other two hold all: no second one may go.
    for name in stage_names(asked):
        refused = cli(asked, "node", "drain", name)
        assert refused.returncode == 4
        assert "no room for the stages" in refused.stderr
        assert "MiB" in refused.stderr
    assert member(asked, stage_names(asked)[0])["availability"] == "active"
    mesh.await_ready(timeout_s=5)

    # The word outlives the process, and nobody plans with the node when it comes back.
    drained.terminate()
    assert drained.process.wait(timeout=30) == 0
    assert (
        member(mesh.daemons[0] if drained.name != "one" else mesh.daemons[1], drained.name)["state"] == "left"
    )
    back = mesh.start(drained.name, *FLAGS, budget_for(2))
    mesh.await_up(back)
    mesh.await_ready(timeout_s=60)
    witness = next(daemon for daemon in mesh.daemons if daemon is not back)
    assert back.name not in stage_names(witness)
    assert member(witness, back.name)["availability"] == "drained"
    assert sorted(one["name"] for one in witness.get("/admin/members")) == ["one", "three", "two"]

    assert cli(back, "node", "uncordon", back.name).returncode == 0
    await_reason(mesh, witness, f"node {back.name} uncordoned by the operator")
    assert member(witness, back.name)["availability"] == "active"


def test_a_cordoned_node_keeps_its_stages_until_the_next_plan(mesh: LocalMesh) -> None:
    asked = mesh.daemons[0]
    names = await_stages(mesh, asked, lambda names: len(names) >= 2)
    mesh.await_ready()
    cordoned = names[-1]
    before = asked.get("/admin/topology")["plan_id"]
    done = cli(asked, "node", "cordon", cordoned, "-o", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"stages": 1, "availability": "cordoned"} == json.loads(done.stdout)
    assert asked.get("/admin/topology")["plan_id"] == before
    assert cli(asked, "replan").returncode == 0
    await_stages(mesh, asked, lambda names: cordoned not in names)
    assert cli(asked, "node", "uncordon", cordoned).returncode == 0
    mesh.await_value(
        lambda: (
            asked.get("/admin/topology")["plan_reason"] == f"node {cordoned} uncordoned by the operator"
            or None
        ),
        timeout_s=20,
        what="a plan that may use the node again",
    )
    assert cli(asked, "node", "cordon", "nobody").returncode == 2


@pytest.mark.parametrize("role", ["last stage", "driver", "coordinator"])
def test_a_leaving_node_cuts_no_stream(mesh: LocalMesh, role: str) -> None:
    asked = mesh.daemons[0]
    mesh.await_ready()
    topology = asked.get("/admin/topology")
    holders = stage_names(asked)
    coordinator = next(daemon for daemon in mesh.daemons if daemon.node_id == topology["coordinator"])
    leaver = {"last stage": by_name(mesh, holders[-1]), "driver": by_name(mesh, holders[0])}.get(
        role, coordinator
    )
    others = [daemon for daemon in mesh.daemons if daemon is not leaver]
    with ThreadPoolExecutor() as pool:
        streams = [streaming(pool, daemon) for daemon in mesh.daemons]
        leaver.terminate()
        mesh.await_value(
            lambda: True if refuses_as_leaving(leaver) else None, timeout_s=5, what="the leaver to say so"
        )
        answers = [run.result(timeout=60) for _, run in streams]
    assert answers == [expected(token_ids(QUESTION), N_TOKENS)] * 3
    assert leaver.process.wait(timeout=30) == 0
    mesh.await_ready(others, timeout_s=10)
    assert member(others[0], leaver.name)["state"] == "left"
    back = mesh.start(leaver.name, *FLAGS, budget_for(2))
    mesh.await_up(back)
    mesh.await_ready(timeout_s=60)
    assert member(others[0], leaver.name)["state"] == "alive"


def refuses_as_leaving(daemon: LocalDaemon) -> bool:
    """New requests get 503 with Retry-After while streams under way go on; or it has gone already."""
    try:
        Stream(daemon.client, token_ids(QUESTION), 1).run()
    except NotReady as refusal:
        return refusal.code == "leaving"
    except Exception:
        return not daemon.is_running
    return False
