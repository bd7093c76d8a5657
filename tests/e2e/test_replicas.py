"""Meshes that hold the model more than once: requests spread, and one replica's loss is the others' gain."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon.models.model_source import resolve_model
from daemon.terminal.demo_memory import least_memory_bytes
from daemon.terminal.local_mesh import LocalDaemon, LocalMesh
from hexmesh.model_spec import model_spec_from_config
from tests.e2e.asking import Stream, expected, token_ids

FLAGS = ("--device", "cpu", "--threads", "1")
QUESTION = "What is a KV cache?"
N_TOKENS, SEVERAL = 300, 6
LONG_TOKENS, FEW = 600, 3
"""Enough to outlast a fail-over, and no more than one replica has KV for."""


@pytest.fixture
def three(tmp_path: Path) -> Iterator[LocalMesh]:
    """Three nodes that each hold the model."""
    with LocalMesh(tmp_path / "mesh") as mesh:
        for start, name in ((mesh.found, "one"), (mesh.join, "two"), (mesh.join, "three")):
            start(name, *FLAGS, "--min-nodes", "3")
        mesh.await_ready()
        yield mesh


@pytest.fixture
def four(tmp_path: Path) -> Iterator[LocalMesh]:
    """Four nodes that hold almost the whole model each: any two make a replica with room for long sequences."""
    spec = model_spec_from_config(resolve_model().config)
    memory = least_memory_bytes(spec, 1) * 97 // 100
    flags = (*FLAGS, "--min-nodes", "4", "--memory", str(memory))
    with LocalMesh(tmp_path / "mesh") as mesh:
        mesh.found("one", *flags)
        for name in ("two", "three", "four"):
            mesh.join(name, *flags)
        mesh.await_ready()
        yield mesh


def replicas(daemon: LocalDaemon) -> dict[str, list[str]]:
    """The nodes of each replica's stages, by id."""
    topology = daemon.get("/admin/topology")
    return {one["id"]: [stage["node"] for stage in one["stages"]] for one in topology["replicas"]}


def by_id(mesh: LocalMesh, node_id: str) -> LocalDaemon:
    return next(daemon for daemon in mesh.daemons if daemon.node_id == node_id)


def ask_several(
    pool: ThreadPoolExecutor, gateway: LocalDaemon, n_tokens: int, n_requests: int
) -> list[Future[list[int]]]:
    prompt = token_ids(QUESTION)
    return [pool.submit(Stream(gateway.client, prompt, n_tokens).run) for _ in range(n_requests)]


def await_running(
    mesh: LocalMesh, gateway: LocalDaemon, least_tokens: int, n_requests: int
) -> list[dict[str, Any]]:
    """The requests that entered at the gateway, once each has so many tokens."""

    def find() -> list[dict[str, Any]] | None:
        requests: list[dict[str, Any]] = gateway.get("/admin/requests")
        is_running = all(request["output_tokens"] >= least_tokens for request in requests)
        return requests if len(requests) == n_requests and is_running else None

    return mesh.await_value(find, timeout_s=30, what="all requests to run")


def n_recovered(daemon: LocalDaemon) -> int:
    lines = daemon.client.get("/metrics").decode().splitlines()
    counts = [line for line in lines if line.startswith("hexmesh_requests_recovered_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in counts)


def test_nodes_that_each_hold_the_model_are_all_used(three: LocalMesh) -> None:
    gateway = three.daemons[2]
    assert sorted(replicas(gateway).values()) == sorted([daemon.node_id] for daemon in three.daemons)
    wanted = expected(token_ids(QUESTION), N_TOKENS)
    with ThreadPoolExecutor(SEVERAL) as pool:
        asked = ask_several(pool, gateway, N_TOKENS, SEVERAL)
        running = await_running(three, gateway, 1, SEVERAL)
        assert {request["replica"] for request in running} == {"r0", "r1", "r2"}
        assert [one.result(timeout=120) for one in asked] == [wanted] * SEVERAL
    topology = gateway.get("/admin/topology")
    assert sum(flow["share"] for flow in topology["flows"]) == pytest.approx(1.0)
    three.await_value(
        lambda: (
            True
            if all(one["measured_tokens_per_s"] > 0 for one in gateway.get("/admin/topology")["replicas"])
            else None
        ),
        timeout_s=4,
        what="every replica's measured rate",
    )
    shown = subprocess.run(
        [sys.executable, "-m", "daemon", "topology", "--url", gateway.url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert all(f"PIPELINE {name}" in shown for name in ("r0", "r1", "r2"))
    assert "% of requests" in shown

    # One of them goes: never unready, and its requests end on the others.
    with ThreadPoolExecutor(SEVERAL) as pool:
        asked = ask_several(pool, gateway, N_TOKENS, SEVERAL)
        running = await_running(three, gateway, 5, SEVERAL)
        used = [request["replica"] for request in running]
        lost, nodes = next(
            (name, nodes)
            for name, nodes in replicas(gateway).items()
            if name in used and nodes != [gateway.node_id]
        )
        by_id(three, nodes[0]).kill_group()
        while not all(one.done() for one in asked):
            assert gateway.client.get_json("/ready", also_ok=(503,))["ready"] is True
        assert [one.result() for one in asked] == [wanted] * SEVERAL
    assert n_recovered(gateway) == used.count(lost)


def test_a_replica_goes_on_in_place_when_another_loses_its_hosts(four: LocalMesh) -> None:
    """The nodes' memory holds one KV pool and no second one beside it."""
    before = replicas(four.daemons[0])
    assert sorted(len(nodes) for nodes in before.values()) == [2, 2]
    assert {node for nodes in before.values() for node in nodes} == {one.node_id for one in four.daemons}
    gateway = by_id(four, before["r1"][1])
    wanted = expected(token_ids(QUESTION), LONG_TOKENS)
    with ThreadPoolExecutor(FEW) as pool:
        asked = ask_several(pool, gateway, LONG_TOKENS, FEW)
        running = await_running(four, gateway, 5, FEW)
        in_r0 = {request["id"] for request in running if request["replica"] == "r0"}
        assert 0 < len(in_r0) < FEW
        plan_id = gateway.get("/admin/topology")["plan_id"]
        for node_id in before["r0"]:
            by_id(four, node_id).kill_group()
        four.await_value(
            lambda: True if gateway.get("/admin/topology")["plan_id"] != plan_id else None,
            timeout_s=30,
            what="a plan without the victims",
        )
        attempts = {request["id"]: request["attempts"] for request in gateway.get("/admin/requests")}
        assert set(attempts) == {request["id"] for request in running}, "requests ended before the new plan"
        assert [one.result(timeout=120) for one in asked] == [wanted] * FEW
    assert replicas(gateway) == {"r1": before["r1"]}
    assert {request for request, n_attempts in attempts.items() if n_attempts > 1} == in_r0
    assert n_recovered(gateway) == len(in_r0)
